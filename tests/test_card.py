"""The model card of a saved adapter: true, loadable, and kind to what others wrote."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from conftest import LabelledImages, build_images, build_vit
from trpts_peft import TRPTSConfig, calibrate
from trpts_peft.card import describe_adapter, drop_local_base


@pytest.fixture
def saved(tmp_path):
    """A calibrated adapter with random values over a base that lies in a folder, both saved."""
    build_vit(num_labels=5).save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    config = TRPTSConfig(keep_rate=0.5, token_layers=[1], modules_to_save=["classifier"], min_connections=2)
    model = get_peft_model(base, config)
    calibrate(model, LabelledImages(12), progress=False)
    for name, parameter in model.named_parameters():
        if "trpts_values" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


def snippet_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text.partition("<!-- TR-PTS: end -->")[0], re.DOTALL)
    return code


def test_names_from_a_config_are_neither_code_nor_markup():
    config = TRPTSConfig(base_model_name_or_path="a/b\n<script>`x`\n```python\nimport os\n[c](javascript:d)")
    text = describe_adapter(config, {}, "ViT\nimport os")
    heading, _, rest = text.partition("\n\n")
    assert heading == "# TR-PTS adapter of a/b--script--x-----python-import os--c--javascript:d-"
    (code,) = re.findall(r"```python\n(.*?)```", rest, re.DOTALL)
    assert "AutoModelForImageClassification.from_pretrained" in code
    assert "\nimport os" not in code
    config.base_model_name_or_path = "https://a.b/c"
    assert "https:-/a.b/c" in describe_adapter(config, {}, None)


def test_the_front_matter_says_what_it_is(saved):
    _, folder = saved
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "peft"
    assert data.pipeline_tag == "image-classification"
    assert {"trpts", "sparse", "token-reduction"} <= set(data.tags)


def test_a_base_in_a_folder_is_not_named_to_the_hub(saved):
    """Which refuses a card that names one."""
    _, folder = saved
    assert ModelCard.load(folder / "README.md").data.base_model == str(folder.parent / "base")
    drop_local_base(folder)
    data = ModelCard.load(folder / "README.md").data
    assert data.to_dict().get("base_model") is None
    assert not [tag for tag in data.tags if tag.startswith("base_model")]


def test_a_base_on_the_hub_is_named(tmp_path):
    base = build_vit()
    base.name_or_path = base.config._name_or_path = "someone/vit"
    get_peft_model(base, TRPTSConfig()).save_pretrained(tmp_path, save_embedding_layers=False)
    drop_local_base(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "someone/vit"
    assert "base_model:adapter:someone/vit" in data.tags


def test_the_trainers_card_keeps_ours(saved, tmp_path):
    """`Trainer.push_to_hub` writes a card of its own over that of the saved adapter."""
    model, _ = saved
    arguments = TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments)
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "Training hyperparameters" in card.text
    assert card.text.count("24 linear layers") == 1
    assert "trpts" in card.data.tags


def test_the_snippet_runs_and_gives_the_adapters_logits(saved):
    model, folder = saved
    code = snippet_of(ModelCard.load(folder / "README.md"))
    names = {}
    exec(code.replace("user/repository", str(folder)), names)
    with torch.no_grad():
        assert torch.equal(names["model"](build_images()).logits, model(build_images()).logits)


def test_adapters_in_folders_of_their_own_are_in_the_card_above(saved, tmp_path):
    """One part each, however often they are saved, beside that of `default`."""
    model, _ = saved
    for name in ("birds", "flowers"):
        model.add_adapter(name, TRPTSConfig(token_layers=0, modules_to_save=["classifier"]))
    for _ in range(2):
        model.save_pretrained(tmp_path / "several")
    text = ModelCard.load(tmp_path / "several" / "README.md").text
    assert [text.count(f"# TR-PTS adapter {name}of") for name in ("", "`birds` ", "`flowers` ")] == [1, 1, 1]
    for name in ("birds", "flowers"):
        part = text.partition(f"# TR-PTS adapter `{name}`")[2]
        (code, *_) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        names = {}
        exec(code.replace("user/repository", str(tmp_path / "several")), names)
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(names["model"](build_images()).logits, model.eval()(build_images()).logits)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_an_adapter_is_saved_over_a_broken_file(saved, content):
    model, folder = saved
    (folder / "adapter_model.safetensors").write_bytes(content)
    model.save_pretrained(folder)
    assert ModelCard.load(folder / "README.md").text.count("24 linear layers") == 1
    assert PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(folder.parent / "base", num_labels=3, ignore_mismatched_sizes=True),
        folder,
    )


def test_no_file_but_a_card_of_pefts_is_written_to_above_an_adapter(saved, tmp_path):
    model, folder = saved
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nmy project\n")
    (folder / "README.md").unlink()
    model.peft_config["default"].save_pretrained(folder)
    assert (tmp_path / "README.md").read_text() == "---\nlicense: mit\n---\nmy project\n"


def test_the_table_counts_what_trains(saved):
    model, folder = saved
    text = ModelCard.load(folder / "README.md").text
    columns = {n: m.trpts_columns["default"].shape for n, m in model.named_modules() if hasattr(m, "trpts_columns")}
    for block in range(4):
        shapes = [shape for name, shape in columns.items() if f"layers.{block}." in name]
        (count,) = {count for _, count in shapes}
        kept = "50 %" if block == 1 else "all"
        share = f"{100 * model.peft_config['default'].unit_importance[f'vit.layers.{block}']:.1f} %"
        assert f"| {block} | {share} | {count} | {sum(a * b for a, b in shapes):,} | {kept} |" in text
    assert f"update of {sum(a * b for a, b in columns.values()):,} weights in 24 linear layers" in text
    assert "not calibrated" not in text


def test_what_is_not_calibrated_says_so(tmp_path):
    get_peft_model(build_vit(), TRPTSConfig()).save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "It is **not calibrated**" in text
    assert "| all |" in text
    assert 'from_pretrained("the/base-model")' in text


def test_saving_again_replaces_our_part_and_leaves_the_rest(saved):
    model, folder = saved
    card = ModelCard.load(folder / "README.md")
    card.text = card.text.replace("24 linear layers", "99 linear layers") + "\nMy own words.\n"
    card.data.license = "apache-2.0"
    card.data.pipeline_tag = "image-feature-extraction"
    card.save(folder / "README.md")
    model.save_pretrained(folder)
    again = ModelCard.load(folder / "README.md")
    assert again.text.count("24 linear layers") == 1
    assert "99 linear" not in again.text
    assert again.text.count("My own words.") == 1
    assert again.data.license == "apache-2.0"
    assert again.data.pipeline_tag == "image-feature-extraction"


def test_a_config_saved_by_itself_writes_no_card(tmp_path):
    TRPTSConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_another_method_is_left_alone(tmp_path):
    get_peft_model(build_vit(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "TR-PTS" not in (tmp_path / "README.md").read_text()
    get_peft_model(build_vit(), LoraConfig(target_modules=["q_proj"])).create_or_update_model_card(str(tmp_path))
    assert "TR-PTS" not in (tmp_path / "README.md").read_text()


def test_several_adapters_are_saved_beside_each_other(tmp_path):
    model = get_peft_model(build_vit(), TRPTSConfig())
    model.add_adapter("other", TRPTSConfig())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "other" / "README.md").exists()
    assert isinstance(PeftModel.from_pretrained(build_vit(), tmp_path / "other"), PeftModel)


def test_linears_outside_of_blocks_and_of_unequal_counts():
    shapes = {
        f"m.{name}.trpts_columns": (5, count) for name, count in {"0.a": 1, "0.b": 3, "0.c": 2, "head": 4}.items()
    }
    shares = {"m.0.a": 0.125, "m.0.b": 0.125}
    config = TRPTSConfig(connections={"m.0.a": 1}, unit_importance=shares, base_model_name_or_path='a"b')
    text = describe_adapter(config, shapes, None)
    assert "| 0 | 25.0 % | 1 to 3 | 30 | all |" in text
    assert "| none | - | 4 | 20 | all |" in text
    assert r'AutoModelForImageClassification.from_pretrained("a\"b")' in text


def test_blocks_of_the_same_number_go_by_their_names():
    shapes = {f"base_model.model.m.{stage}.blocks.0.a.trpts_columns": (5, 1 + stage) for stage in (0, 1)}
    config = TRPTSConfig(
        connections={"m.0.blocks.0.a": 1}, unit_importance={"m.0.blocks.0": 0.25, "m.1.blocks.0": 0.75}
    )
    text = describe_adapter(config, shapes, None)
    assert "| m.0.blocks.0 | 25.0 % | 1 | 5 | all |" in text
    assert "| m.1.blocks.0 | 75.0 % | 2 | 10 | all |" in text
