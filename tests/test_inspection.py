"""What a saved adapter says of itself, against the model that was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ViTForImageClassification

from conftest import LabelledImages, build_vit
from pictures import write_base
from trpts_peft import Selection, TRPTSConfig, calibrate, estimate_cost
from trpts_peft.inspection import describe_file, find_adapter, read_config, read_selection, table

UNITS = [f"vit.layers.{index}" for index in range(4)]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PeftModel, Selection, Path]:
    """A calibrated adapter over a base in a folder, its Selection, and where it was saved."""
    write_base(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    model = get_peft_model(base, TRPTSConfig(keep_rate=0.5, token_layers=[1, 2], modules_to_save=["classifier"]))
    selection = calibrate(model, LabelledImages(12), progress=False)
    model.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    return model, selection, tmp_path / "adapter"


def test_the_selection_comes_back(saved: Any) -> None:
    _, selection, folder = saved
    read = read_selection(folder)
    for name in ("importance", "connections", "token_layers", "keep_rate", "shapes", "units", "trainable"):
        assert getattr(read, name) == getattr(selection, name), name
    assert all(torch.equal(read.columns[name], columns) for name, columns in selection.columns.items())
    assert read.columns.keys() == selection.columns.keys()


def test_blocks_are_those_of_the_selection(saved: Any) -> None:
    _, selection, folder = saved
    blocks = describe_file(folder)["blocks"]
    assert [block["unit"] for block in blocks] == UNITS
    for index, block in enumerate(blocks):
        linears = [name for name, unit in selection.units.items() if unit == block["unit"]]
        assert block["importance"] == selection.importance[block["unit"]]
        assert block["connections"] == sorted({selection.connections[name] for name in linears})
        assert block["weights"] == sum(selection.columns[name].numel() for name in linears)
        assert block["biases"] == sum(selection.shapes[name][0] for name in linears) == 4 * 32 + 64 + 32
        assert block["keep_rate"] == (0.5 if index in (1, 2) else 1.0)


def test_counts_and_cost_are_those_of_the_model(saved: Any) -> None:
    model, _, folder = saved
    description, cost = describe_file(folder), estimate_cost(model)
    assert sum(description["trainable"].values()) == cost.trainable_parameters
    assert description["trainable"]["modules_to_save"] == 32 * 3 + 3
    assert description["cost"]["base_parameters"] == cost.total_parameters
    assert description["cost"]["macs"] == cost.macs
    assert description["cost"]["speedup"] == cost.speedup
    assert description["cost"]["image_size"] == [32, 32]
    assert description["cost"]["trainable_percent"] == cost.trainable_percent
    assert description["bytes"] == {"file": (folder / "adapter_model.safetensors").stat().st_size, "per_weight": 6.0}
    json.dumps(description)


def test_the_fingerprint_tells_bases_apart(saved: Any, tmp_path: Path) -> None:
    model, _, folder = saved
    digests = [describe_file(folder)["base_fingerprint"]]
    model.save_pretrained(tmp_path / "again")
    digests.append(describe_file(tmp_path / "again")["base_fingerprint"])
    get_peft_model(build_vit(seed=1), TRPTSConfig()).save_pretrained(tmp_path / "other")
    digests.append(describe_file(tmp_path / "other")["base_fingerprint"])
    assert digests[0] == digests[1] != digests[2]
    assert all(len(digest) == 12 for digest in digests)


def test_the_table_shows_what_was_found(saved: Any) -> None:
    _, selection, folder = saved
    lines = table(describe_file(folder)).splitlines()
    assert lines[0].split() == ["unit", "w", "%", "C", "weights", "biases", "tokens", "kept"]
    assert lines[2].split()[:2] == [UNITS[1], f"{100 * selection.importance[UNITS[1]]:.2f}"]
    assert lines[1].endswith("all") and lines[2].endswith("50 %")
    text = "\n".join(lines)
    assert "calibrated    yes" in text and "token layers  1, 2 at keep rate 0.5" in text
    assert f"{selection.trainable:,} weights" in text
    assert "predicted speed-up" in text


def test_an_adapter_that_is_not_calibrated(tmp_path: Path) -> None:
    get_peft_model(build_vit(), TRPTSConfig(train_bias=False)).save_pretrained(tmp_path)
    description = describe_file(tmp_path)
    assert [block["unit"] for block in description["blocks"]] == UNITS
    assert not description["calibrated"] and description["trainable"]["biases"] == 0
    assert "calibrated    no" in table(description)
    with pytest.raises(ValueError, match="`adapter` must be calibrated"):
        read_selection(tmp_path)


def test_without_the_base_model_its_cost_is_unknown(saved: Any, tmp_path: Path) -> None:
    model, selection, _ = saved
    model.peft_config["default"].base_model_name_or_path = "no/such"
    model.save_pretrained(tmp_path / "lost", save_embedding_layers=False)
    description = describe_file(tmp_path / "lost")
    assert description["cost"] is None and "'no/such' cannot be read" in description["cost_unknown"]
    assert "cost          unknown: the base model 'no/such'" in table(description)
    assert read_selection(tmp_path / "lost").shapes == {}
    assert read_selection(tmp_path / "lost").connections == selection.connections


def test_a_base_outside_the_table_of_families(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved
    resnet = AutoConfig.for_model("resnet", num_labels=3, embedding_size=8, hidden_sizes=[8], depths=[1])
    resnet.save_pretrained(folder.parent / "base")
    assert read_selection(folder).shapes == {}
    assert "outside the table of families" in describe_file(folder)["cost_unknown"]


def test_a_base_whose_config_cannot_be_used(saved: Any) -> None:
    _, _, folder = saved
    config = json.loads((folder.parent / "base" / "config.json").read_text())
    (folder.parent / "base" / "config.json").write_text(json.dumps({**config, "hidden_act": "none such"}))
    assert "cannot be read (" in describe_file(folder)["cost_unknown"]


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def other_method(folder: Path) -> None:
    get_peft_model(build_vit(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def too_deep(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000 + "]" * 100_000)


def other_units(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["unit_importance"] = {"x" * 20_000: 0.5}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def no_file(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncated, "`adapter` must be a whole safetensors file"),
        (other_method, "`adapter` must be of TR-PTS, got one of 'LORA'"),
        (no_json, "`adapter` must have a readable adapter_config.json"),
        (too_deep, "`adapter` must have a readable adapter_config.json"),
        (other_units, "`adapter` must name units of its linears in `unit_importance`, got 1 other"),
        (no_file, "got .* without adapter_model.safetensors"),
    ],
)
def test_what_is_no_adapter_is_refused(saved: Any, damage: Any, message: str) -> None:
    folder = saved[2]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        describe_file(find_adapter(str(folder)))


COLUMNS = "base_model.model.vit.layers.1.mlp.fc1.trpts_columns"
VALUES, BIAS, PRINT = (COLUMNS.replace("columns", part) for part in ("values", "bias", "fingerprint"))
HEAD = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({COLUMNS: lambda t: t[0]}, r"columns and values \(out_features, C\)"),
        ({VALUES: lambda t: t[0]}, r"columns and values \(out_features, C\)"),
        ({COLUMNS: lambda t: t.float()}, r"columns and values \(out_features, C\)"),
        ({COLUMNS: lambda t: t.int() - 99}, "fc1.trpts_columns` must be from 0 to"),
        ({COLUMNS: lambda t: t.long() + 2**40}, "fc1.trpts_columns` must be from 0 to"),
        ({COLUMNS: lambda t: t[:, :1].expand(t.shape)}, "fc1.trpts_columns` must be ascending and distinct"),
        ({COLUMNS: lambda t: t.bool()}, "fc1.trpts_columns` must be whole numbers, got torch.bool"),
        ({VALUES: lambda t: t * float("nan")}, "fc1.trpts_values` must be finite"),
        ({BIAS: lambda t: t * float("nan")}, "fc1.trpts_bias` must be finite"),
        ({COLUMNS: None}, "the linears that its config names"),
        ({COLUMNS: None, VALUES: None}, "the linears that its config names"),
        ({VALUES: None}, r"columns and values \(out_features, C\)"),
        ({VALUES: lambda t: t.to(torch.float8_e4m3fn)}, "fc1.trpts_values` must be floating-point numbers of 16 bits"),
        ({PRINT: lambda t: t.to(torch.float8_e4m3fn)}, "fc1.trpts_fingerprint` must be floating-point numbers of 16"),
        ({COLUMNS: lambda t: t[:, :0], VALUES: lambda t: t[:, :0]}, "entries in each tensor, got none in vit.layers.1"),
        ({HEAD: lambda t: t.new_empty(10**9, 0)}, "entries in each tensor, got none in classifier.weight"),
    ],
)
def test_tensors_that_are_no_adapters_are_refused(saved: Any, changes: Any, message: str) -> None:
    file = saved[2] / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, change in changes.items():
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor).contiguous()
    save_file(tensors, file)
    for read in (describe_file, read_selection):
        with pytest.raises(ValueError, match=message):
            read(saved[2])


def test_names_that_no_table_could_hold_are_refused(saved: Any) -> None:
    file = saved[2] / "adapter_model.safetensors"
    save_file({**load_file(file), "x" * 100_000: torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"in up to 256 letters, got 'x{40}'… of 100000"):
        describe_file(saved[2])


@pytest.mark.parametrize("value", [10**9, [32, 10**9]])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels", "image_size", "hidden_size"])
def test_a_base_that_would_take_any_memory_is_not_built(saved: Any, name: str, value: Any) -> None:
    path = Path(read_config(saved[2]).base_model_name_or_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert f"`{name}` of up to" in describe_file(saved[2])["cost_unknown"]


@pytest.mark.parametrize("adapter", ["no/such", "not a name!", "a/b/c"])
def test_a_place_that_is_none(adapter: str) -> None:
    with pytest.raises(ValueError, match="`adapter` must be a folder or a repository on the Hub"):
        find_adapter(adapter)


def test_bytes_per_weight_follow_the_dtype(saved: Any) -> None:
    """16-bit values take four bytes a weight with their columns."""
    folder = saved[2]
    file = folder / "adapter_model.safetensors"
    tensors = {key: t.half() if key.endswith("trpts_values") else t for key, t in load_file(file).items()}
    save_file(tensors, file)
    assert describe_file(folder)["bytes"]["per_weight"] == 4.0
    assert read_config(folder).keep_rate == 0.5


def test_values_without_columns_are_refused(saved: Any) -> None:
    file = saved[2] / "adapter_model.safetensors"
    save_file({**load_file(file), "x.trpts_values": torch.tensor(1.0)}, file)
    with pytest.raises(ValueError, match=r"the columns of each linear, got none for x\.trpts_values"):
        describe_file(saved[2])


def test_names_from_a_file_do_not_steer_the_terminal(saved: Any) -> None:
    model, _, folder = saved
    model.peft_config["default"].base_model_name_or_path = "\x1b]0;title\x07base\ncalibrated    yes"
    model.save_pretrained(folder / "steering", save_embedding_layers=False)
    lines = table(describe_file(folder / "steering")).splitlines()
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith("calibrated ") for line in lines) == 1
    assert any(r"\x1b]0;title\x07base\ncalibrated" in line for line in lines)
