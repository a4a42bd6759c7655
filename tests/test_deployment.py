"""Adapters on their base, merged, and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from conftest import LabelledImages, build_images
from pictures import picture, write_base
from trpts_peft import TRPTSConfig, apply_token_selection, calibrate
from trpts_peft.deployment import draw_adapters, labels_of, load_adapted, merge_into_checkpoint
from trpts_peft.vit import keep_rates_in_force

NAMES = {0: "red", 1: "green", 2: "blue"}


@torch.no_grad()
def predict(model: Any) -> torch.Tensor:
    return model.eval()(build_images()).logits


def adapter(folder: Path, *, own_config: bool = True, **options: Any) -> PeftModel:
    """An adapter of random values and three classes, saved in `folder/adapter`; its base, of five, in `folder/base`."""
    write_base(folder / "base")
    base = ViTForImageClassification.from_pretrained(
        folder / "base", num_labels=3, id2label=NAMES, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, TRPTSConfig(modules_to_save=["classifier"], **options))
    calibrate(model, LabelledImages(12), progress=False)
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder / "adapter")
    if own_config:
        base.config.save_pretrained(folder / "adapter")
    return model


SELECTING = {"keep_rate": 0.5, "token_layers": [1, 2]}


@pytest.mark.parametrize("option", [{"exclude_modules": "("}, {"task_type": "CAUSAL_LM"}, {"modules_to_save": ["mlp"]}])
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    adapter(tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **option}))
    with pytest.raises(ValueError, match="`adapter` must fit its base model"):
        load_adapted(tmp_path / "adapter")


@pytest.mark.parametrize("own_config", [True, False])
def test_it_predicts_as_it_was_saved(tmp_path: Path, own_config: bool) -> None:
    model = adapter(tmp_path, own_config=own_config, **SELECTING)
    loaded, processor = load_adapted(tmp_path / "adapter")
    assert torch.equal(predict(loaded), predict(model))
    assert not loaded.training
    assert processor.size["height"] == 32
    if own_config:
        assert loaded.config.id2label == NAMES


def test_merging_keeps_token_selection_on_demand(tmp_path: Path) -> None:
    model = adapter(tmp_path, **SELECTING)
    merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged", "keep")
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    apply_token_selection(merged)
    assert keep_rates_in_force(merged) == {1: 0.5, 2: 0.5}
    torch.testing.assert_close(predict(merged), predict(model), rtol=1e-5, atol=1e-5)
    assert merged.config.id2label == NAMES
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_merging_drops_token_selection_on_demand(tmp_path: Path) -> None:
    model = adapter(tmp_path, **SELECTING)
    merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged", "drop")
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "trpts_keep_rates")
    assert not torch.allclose(predict(merged), predict(model), atol=1e-3)


@pytest.mark.parametrize("options", [{"token_layers": 0}, {"keep_rate": 1.0, "token_layers": [1]}])
def test_without_token_selection_there_is_nothing_to_decide(tmp_path: Path, options: Any) -> None:
    model = adapter(tmp_path, **options)
    merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(predict(merged), predict(model), rtol=1e-5, atol=1e-5)


def test_a_base_in_16_bits_loses_nothing_of_the_updates(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    ViTForImageClassification.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    base = ViTForImageClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(base, TRPTSConfig(modules_to_save=["classifier"]))
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_(std=1e-4)  # less than half a step of bfloat16
    model.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_adapted(tmp_path / "adapter")
    assert torch.equal(predict(loaded), predict(model))
    merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(predict(merged), predict(model), rtol=1e-6, atol=1e-6)


def test_token_selection_is_not_dropped_silently(tmp_path: Path) -> None:
    adapter(tmp_path, **SELECTING)
    with pytest.raises(ValueError, match=r"`token_selection` must be 'keep' or 'drop' .* got None"):
        merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_is_gone(tmp_path: Path) -> None:
    adapter(tmp_path, **SELECTING)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="`adapter` must name a base model that can be loaded"):
        load_adapted(tmp_path / "adapter")


def test_a_base_with_a_part_of_its_weights_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, **SELECTING)
    file = tmp_path / "base" / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layernorm" not in key}, file)
    with pytest.raises(ValueError, match=r"a base model that can be loaded, got .*lacks"):
        load_adapted(tmp_path / "adapter")


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path, token_layers=0)
    monkeypatch.setattr(ViTImageProcessorPil, "save_pretrained", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="no space left"):
        merge_into_checkpoint(tmp_path / "adapter", tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_a_merge_that_is_interrupted_while_it_moves_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path, token_layers=0)
    rename = Path.rename
    left = [KeyboardInterrupt, None]

    def interrupted(self: Path, target: Path) -> Path:
        if error := left.pop():
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_touches_nothing_that_others_have_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path, token_layers=0)
    note, save = tmp_path / "merged" / "notes.txt", ViTImageProcessorPil.save_pretrained

    def save_late(self: Any, folder: Path) -> None:
        save(self, folder)
        note.write_text("mine")

    monkeypatch.setattr(ViTImageProcessorPil, "save_pretrained", save_late)
    with pytest.raises(ValueError, match="`output` must stay empty meanwhile"):
        merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == [note]


@pytest.mark.parametrize("name", ["size", "crop_size"])
def test_a_processor_of_enormous_images_is_refused(tmp_path: Path, name: str) -> None:
    adapter(tmp_path)
    path = tmp_path / "base" / "preprocessor_config.json"
    settings = {**json.loads(path.read_text()), name: {"height": 40_000, "width": 32}}
    (tmp_path / "adapter" / path.name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="up to 4096 pixels a side"):
        load_adapted(tmp_path / "adapter")


def test_code_that_a_processor_names_is_not_passed_on(tmp_path: Path) -> None:
    adapter(tmp_path, token_layers=0)
    path = tmp_path / "base" / "preprocessor_config.json"
    settings = {**json.loads(path.read_text()), "auto_map": {"AutoImageProcessor": "some/repo--code.Processor"}}
    (tmp_path / "adapter" / path.name).write_text(json.dumps(settings))
    merge_into_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    assert "auto_map" not in json.loads((tmp_path / "merged" / path.name).read_text())


def test_a_processor_that_does_not_fit_the_base_is_named(tmp_path: Path) -> None:
    adapter(tmp_path, **SELECTING)
    path = tmp_path / "base" / "preprocessor_config.json"
    settings = {**json.loads(path.read_text()), "rescale_factor": "x"}
    (tmp_path / "adapter" / path.name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="`adapter` must have an image processor that fits"):
        draw_adapters({"a": tmp_path / "adapter"}, [picture(0, 0)])


def test_figures_of_labels_that_are_paths_have_names_of_their_own(tmp_path: Path) -> None:
    adapter(tmp_path, **SELECTING)
    labels = ["Runs/A", "runs\\a", "runs/a"]
    figures = draw_adapters(dict.fromkeys(labels, tmp_path / "adapter"), [picture(0, 0)])
    assert {"tokens-Runs-A.png", "tokens-runs-a-2.png", "tokens-runs-a-3.png"} < set(figures)


def test_labels_are_short_and_distinct() -> None:
    assert labels_of(["runs/a/adapter", "b", "user/c"]) == ["a", "b", "c"]
    assert labels_of(["x/a", "y/a"]) == ["x/a", "y/a"]
    with pytest.raises(ValueError, match="`adapters` must be different ones"):
        labels_of(["x/a", "x/a"])


def test_labels_of_folders_are_those_of_what_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "adapter")
    assert labels_of(["."]) == ["run"]
    with pytest.raises(ValueError, match="`adapters` must be different ones"):
        labels_of([".", "../adapter/"])


def test_a_config_beside_it_names_classes_and_nothing_else(tmp_path: Path) -> None:
    """An adapter from outside does not say how its base computes."""
    model = adapter(tmp_path, **SELECTING)
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    changed = {"hidden_act": "relu", "auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({**config, **changed}))
    loaded, _ = load_adapted(tmp_path / "adapter")
    assert torch.equal(predict(loaded), predict(model))
    assert loaded.config.id2label == NAMES


def test_figures(tmp_path: Path) -> None:
    folders = {}
    for name in ("a", "b"):
        adapter(tmp_path / name, **SELECTING)
        folders[name] = tmp_path / name / "adapter"
    images = [picture(0, 0), picture(1, 1)]
    one = draw_adapters({"a": folders["a"]}, [])
    assert list(one) == ["layer_importance.png"]
    assert list(draw_adapters({"a": folders["a"]}, images)) == ["layer_importance.png", "tokens.png"]
    all_of_them = draw_adapters(folders, images)
    assert list(all_of_them) == ["layer_importance.png", "overlap.png", "tokens-a.png", "tokens-b.png"]
    assert all(isinstance(figure, Figure) for figure in all_of_them.values())
    assert len(all_of_them["tokens-a.png"].axes) == 2 * 3  # two images, each as it is and behind two blocks
