"""Files of adapters: what they hold, and that a bad one is refused and leaves no trace."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, CLIPVisionConfig, CLIPVisionModel

from conftest import build_images, build_vit, needs_adapter_methods
from trpts_peft import TRPTSConfig, calibrate, set_keep_rate, withdrawal
from trpts_peft.checkpoint import check_adapter, pack_columns, unpack_columns
from trpts_peft.layer import TRPTSLinear

LINEAR = "base_model.model.vit.layers.1.mlp.fc1"
TOKENS = "base_model.model.vit.layers.1.token_selection.trpts_keep_ppm"
Tensors = dict[str, Tensor]


def adapted(base: nn.Module | None = None, *, seed: int = 0, **options: Any) -> PeftModel:
    """A PeftModel with a calibrated adapter of random values, two inputs per neuron, tokens selected in block 1."""
    defaults: dict[str, Any] = {"modules_to_save": ["classifier"], "keep_rate": 0.5, "token_layers": [1]}
    defaults.update(min_connections=2, max_connections=2, importance="magnitude")
    model = get_peft_model(base or build_vit(), TRPTSConfig(**{**defaults, **options}))
    calibrate(model, None, probe_head=False, progress=False)
    randomize(model, seed)
    return model.eval()


def randomize(model: nn.Module, seed: int) -> None:
    """Give whatever trains other values, reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "trpts_" in name or "modules_to_save" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def logits(saved: Path) -> Tensor:
    return predict(adapted())


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    return model(build_images()).logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal has to leave alone, outputs included."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "adapters": sorted(getattr(model, "peft_config", {})),
        "flag": getattr(model, "_hf_peft_config_loaded", False),
        "hooks": len(model._forward_pre_hooks),
        "logits": predict(model),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key == "tensors":
            assert before[key].keys() == after[key].keys()
            assert [n for n, t in before[key].items() if not torch.equal(t, after[key][n])] == []
        elif key == "logits":
            assert torch.equal(before[key], after[key])
        else:
            assert before[key] == after[key], key


# ---- what a file can suffer ----


def _columns(change: Callable[[Tensor], Any]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        columns = tensors[f"{LINEAR}.trpts_columns"].long()
        change(columns)
        tensors[f"{LINEAR}.trpts_columns"] = columns.to(torch.uint16)

    return damage


def _drop(key: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[key]

    return damage


def _fill(key: str, value: float) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[key].view(-1)[3] = value

    return damage


def _cut(key: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[key] = tensors[key][:-1].clone()

    return damage


def _other_tokens(tensors: Tensors) -> None:
    tensors[TOKENS.replace("layers.1", "layers.2")] = tensors.pop(TOKENS)


def _other_rate(tensors: Tensors) -> None:
    tensors[TOKENS] = torch.tensor(700_000)


def _wider(tensors: Tensors) -> None:
    """Three inputs per neuron where the config says two."""
    for part in ("trpts_columns", "trpts_values"):
        own = tensors[f"{LINEAR}.{part}"].float()
        tensors[f"{LINEAR}.{part}"] = torch.cat([own, own[:, -1:] + 1], dim=1)
    tensors[f"{LINEAR}.trpts_columns"] = tensors[f"{LINEAR}.trpts_columns"].clamp(max=31).to(torch.uint16)


def _only_head(tensors: Tensors) -> None:
    for key in [key for key in tensors if "trpts_" in key]:
        del tensors[key]


def _cast(key: str, dtype: torch.dtype, factor: float = 1.0) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[key] = tensors[key].to(dtype) * factor if factor != 1 else tensors[key].to(dtype)

    return damage


def _add(key: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"base_model.model.{key}": torch.full(shape, 9.0)})


HEAD = "base_model.model.classifier.weight"
# What transformers' loader cannot tell from a good file: it casts tensors, and knows no adapters' names.
CAST: dict[str, Callable[[Tensors], None]] = {
    "columns as floats": lambda t: t.update({f"{LINEAR}.trpts_columns": t[f"{LINEAR}.trpts_columns"].float()}),
    "values of eight bits": _cast(f"{LINEAR}.trpts_values", torch.float8_e4m3fn),
    "head of eight bits": _cast(HEAD, torch.float8_e4m3fn),
    "head of truth values": _cast(HEAD, torch.bool),
    "keep rate not whole": _cast(TOKENS, torch.float64),
    "keep rate infinite": lambda t: t.update({TOKENS: torch.tensor(float("inf"))}),
    "keep rates instead of one": lambda t: t.update({TOKENS: t[TOKENS].expand(2).contiguous()}),
    "tensor of the base": _add("vit.layernorm.weight", 32),
    "base weight of a linear": _add(f"{LINEAR}.base_layer.weight".removeprefix("base_model.model."), 64, 32),
    "base model's own head": _add("classifier.original_module.weight", 3, 32),
}
OF_ANOTHER: dict[str, Callable[[Tensors], None]] = {
    "values of another adapter": _add(f"{LINEAR}.trpts_values.default".removeprefix("base_model.model."), 64, 2),
    "head of another adapter": _add("classifier.modules_to_save.default.weight", 3, 32),
}
DAMAGES: dict[str, Callable[[Tensors], None]] = {
    **CAST,
    "column out of range": _columns(lambda columns: columns[3].copy_(torch.tensor([4, 32]))),
    "columns descending": _columns(lambda columns: columns[3].copy_(torch.tensor([4, 2]))),
    "column twice": _columns(lambda columns: columns[3].fill_(4)),
    "columns missing": _drop(f"{LINEAR}.trpts_columns"),
    "values missing": _drop(f"{LINEAR}.trpts_values"),
    "bias missing": _drop(f"{LINEAR}.trpts_bias"),
    "fingerprint missing": _drop(f"{LINEAR}.trpts_fingerprint"),
    "token rate missing": _drop(TOKENS),
    "columns too short": _cut(f"{LINEAR}.trpts_columns"),
    "values too short": _cut(f"{LINEAR}.trpts_values"),
    "bias too short": _cut(f"{LINEAR}.trpts_bias"),
    "more columns than the config says": _wider,
    "values not a number": _fill(f"{LINEAR}.trpts_values", float("nan")),
    "bias infinite": _fill(f"{LINEAR}.trpts_bias", float("inf")),
    "other token layers": _other_tokens,
    "other keep rate": _other_rate,
    "other base": _fill(f"{LINEAR}.trpts_fingerprint", 9.0),
    "only the head": _only_head,
    "head too short": _cut(HEAD),
    "head not a number": _fill(HEAD, float("nan")),
    "values too large for float32": _cast(f"{LINEAR}.trpts_values", torch.float64, 1e300),
    "head too large for float32": _cast(HEAD, torch.float64, 1e300),
}


def damaged(saved: Path, target: Path, damage: Callable[[Tensors], None], *, pickled: bool = False) -> Path:
    tensors = load_file(saved / "adapter_model.safetensors")
    damage(tensors)
    if pickled:
        torch.save(tensors, target / "adapter_model.bin")
    else:
        save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((saved / "adapter_config.json").read_text())
    return target


# ---- a good file ----


def test_columns_are_packed_without_loss() -> None:
    columns = torch.tensor([[0, 255], [256, 65_535]])
    assert pack_columns(columns, 65_536).dtype == torch.uint16
    assert pack_columns(columns, 65_537).dtype == torch.int32
    for inputs in (65_536, 65_537):
        assert torch.equal(unpack_columns(pack_columns(columns, inputs)), columns)


def test_file_holds_compact_columns(saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    layer = adapted().get_submodule(LINEAR)
    columns = tensors[f"{LINEAR}.trpts_columns"]
    assert columns.dtype == torch.uint16
    assert torch.equal(columns.long(), layer.trpts_columns["default"])
    assert tensors[f"{LINEAR}.trpts_fingerprint"].dtype == torch.float32
    assert not [key for key in tensors if "used" in key or "slots" in key or "original" in key]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 6), (torch.bfloat16, 4), (torch.float16, 4)])
def test_bytes_per_trainable_weight(tmp_path: Path, dtype: torch.dtype, most: int) -> None:
    config = TRPTSConfig(target_modules=["fc1", "fc2"], token_layers=[1])
    model = get_peft_model(build_vit().to(dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    size = sum(t.nbytes for key, t in tensors.items() if key.endswith(("columns", "values")))
    assert size <= most * sum(t.numel() for key, t in tensors.items() if key.endswith("values"))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_is_cast_as_it_is_loaded_trains_only_if_it_is_to(
    saved: Path, low_cpu_mem_usage: bool, is_trainable: bool
) -> None:
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    model = PeftModel.from_pretrained(build_vit().to(torch.bfloat16), saved, **options)
    trained = {n: p for n, p in model.named_parameters() if "trpts_" in n}
    assert {p.requires_grad for p in trained.values()} == {is_trainable}
    if low_cpu_mem_usage:
        file = load_file(saved / "adapter_model.safetensors")
        assert all(torch.equal(p, file[n.replace(".default", "")]) for n, p in trained.items())  # not rounded


def test_a_base_whose_weights_are_yet_to_come_keeps_what_the_file_holds(saved: Path) -> None:
    model = PeftModel.from_pretrained(build_vit().to("meta"), saved, low_cpu_mem_usage=True)
    file = load_file(saved / "adapter_model.safetensors")
    trained = {n: p for n, p in model.named_parameters() if "trpts_" in n}
    assert trained
    assert all(torch.equal(p, file[n.replace(".default", "")]) for n, p in trained.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_good_file_loads(saved: Path, logits: Tensor, low_cpu_mem_usage: bool, is_trainable: bool) -> None:
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    model = PeftModel.from_pretrained(build_vit(), saved, **options).eval()
    assert torch.equal(predict(model), logits)
    layer = model.get_submodule(LINEAR)
    assert layer.trpts_columns["default"].dtype == torch.int64
    assert layer.trpts_values["default"].requires_grad == is_trainable


def test_file_written_with_safe_serialization_off(tmp_path: Path, logits: Tensor) -> None:
    adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path)), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtype_of_the_same_base_passes(saved: Path, dtype: torch.dtype) -> None:
    model = PeftModel.from_pretrained(build_vit().to(dtype), saved)
    base = PeftModel.from_pretrained(build_vit(), saved)
    assert torch.equal(*(m.get_submodule(LINEAR).trpts_columns["default"] for m in (model, base)))


def test_float32_base_of_a_16_bit_adapter_passes(tmp_path: Path) -> None:
    narrow = adapted(build_vit().bfloat16())
    narrow.save_pretrained(tmp_path)
    wide = PeftModel.from_pretrained(build_vit(), tmp_path)
    assert torch.equal(*(m.get_submodule(LINEAR).trpts_columns["default"] for m in (wide, narrow)))


def test_fingerprint_is_of_the_unmerged_base(tmp_path: Path) -> None:
    model = adapted()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path)), predict(model))


def test_file_cannot_be_loaded_while_merged(saved: Path) -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        model.load_adapter(saved, "default")


# ---- damaged files, by each way in ----


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_pretrained_refuses(saved: Path, tmp_path: Path, logits: Tensor, damage: str) -> None:
    base = build_vit()
    before = snapshot(base)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, damaged(saved, tmp_path, DAMAGES[damage]))
    assert_same(before, snapshot(base))
    assert torch.equal(predict(PeftModel.from_pretrained(base, saved)), logits)


@pytest.mark.parametrize("damage", ["column out of range", "values missing", "values not a number", "other base"])
@pytest.mark.parametrize("pickled", [False, True])
def test_low_memory_loading_refuses(saved: Path, tmp_path: Path, damage: str, pickled: bool) -> None:
    base = build_vit()
    before = snapshot(base)
    path = damaged(saved, tmp_path, DAMAGES[damage], pickled=pickled)
    with pytest.raises(ValueError, match="adapter's"):
        PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True, is_trainable=True)
    assert_same(before, snapshot(base))


@pytest.mark.parametrize("damage", [*DAMAGES, *OF_ANOTHER])
def test_second_adapter_is_refused(saved: Path, tmp_path: Path, logits: Tensor, damage: str) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError):
        model.load_adapter(damaged(saved, tmp_path, (DAMAGES | OF_ANOTHER)[damage]), "second")
    assert_same(before, snapshot(model))
    assert model.active_adapters == ["default"]
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(predict(model), logits)


@pytest.mark.parametrize("damage", DAMAGES)
def test_trained_adapter_survives_a_refused_resume(saved: Path, tmp_path: Path, damage: str) -> None:
    model = adapted(seed=5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter's"):
        model.load_adapter(damaged(saved, tmp_path, DAMAGES[damage]), "default", is_trainable=True)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("damage", DAMAGES)
def test_set_peft_model_state_dict_refuses(saved: Path, damage: str) -> None:
    model = adapted(seed=5)
    before = snapshot(model)
    tensors = load_file(saved / "adapter_model.safetensors")
    DAMAGES[damage](tensors)
    with pytest.raises(ValueError, match="adapter's"):
        set_peft_model_state_dict(model, tensors)
    assert_same(before, snapshot(model))


def test_an_adapter_that_the_user_injected_stays_for_another_try(saved: Path, logits: Tensor) -> None:
    base = build_vit()
    inject_adapter_in_model(TRPTSConfig.from_pretrained(saved), base)
    tensors = {
        k.removeprefix("base_model.model."): v for k, v in load_file(saved / "adapter_model.safetensors").items()
    }
    bad = {k: v.clone() for k, v in tensors.items()}
    bad[f"{LINEAR}.trpts_values".removeprefix("base_model.model.")][0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        set_peft_model_state_dict(base, bad)
    set_peft_model_state_dict(base, tensors)
    assert torch.equal(predict(base), logits)


def test_an_adapter_of_a_calibrated_config_stays_for_another_try(saved: Path, tmp_path: Path, logits: Tensor) -> None:
    model = get_peft_model(build_vit(), TRPTSConfig.from_pretrained(saved))
    before = snapshot(model)
    bad = damaged(saved, tmp_path, DAMAGES["values not a number"])
    with pytest.raises(ValueError, match="finite"):
        model.load_adapter(bad, "default")
    assert_same(before, snapshot(model))
    model.load_adapter(saved, "default")
    assert torch.equal(predict(model), logits)


def _remove(path: Path) -> None:
    (path / "adapter_model.safetensors").unlink()


def _truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _without_head(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors[HEAD]
    save_file(tensors, path / "adapter_model.safetensors")


def _saving_a_linear(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["fc1"]}))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_remove, ValueError),
        (_truncate, SafetensorError),
        (_without_head, KeyError),
        (_saving_a_linear, (KeyError, TypeError)),
    ],
)
def test_what_peft_refuses_by_itself_leaves_no_trace(
    saved: Path, tmp_path: Path, logits: Tensor, damage: Any, error: Any
) -> None:
    damage(damaged(saved, tmp_path, lambda _tensors: None))
    base = build_vit()
    before = snapshot(base)
    with pytest.raises(error):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same(before, snapshot(base))
    model = PeftModel.from_pretrained(base, saved)
    before = snapshot(model)
    with pytest.raises(error):
        model.load_adapter(tmp_path, "second")
    assert_same(before, snapshot(model))
    assert torch.equal(predict(model), logits)


def test_an_injection_that_breaks_off_leaves_no_trace(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_vit()
    model = PeftModel.from_pretrained(base, saved)
    update, calls = TRPTSLinear.update_layer, []

    def full(layer: TRPTSLinear, *args: Any, **kwargs: Any) -> None:
        calls.append(layer)
        if len(calls) == 5:
            raise torch.OutOfMemoryError
        update(layer, *args, **kwargs)

    monkeypatch.setattr(TRPTSLinear, "update_layer", full)
    for put_in in (lambda: model.add_adapter("second", TRPTSConfig()), lambda: model.load_adapter(saved, "second")):
        before = snapshot(model)
        calls.clear()
        with pytest.raises(torch.OutOfMemoryError):
            put_in()
        assert_same(before, snapshot(model))
    fresh = build_vit()
    before = snapshot(fresh)
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        PeftModel.from_pretrained(fresh, saved)
    assert_same(before, snapshot(fresh))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
def test_a_base_used_again_does_not_keep_an_adapter_by_half(saved: Path, tmp_path: Path) -> None:
    base = build_vit()
    PeftModel.from_pretrained(base, saved)
    with pytest.raises(ValueError, match="finite"):
        PeftModel.from_pretrained(base, damaged(saved, tmp_path, DAMAGES["values not a number"]))
    assert {n: type(m) for n, m in base.named_modules()} == {n: type(m) for n, m in build_vit().named_modules()}


def test_a_model_without_the_head_takes_the_rest(saved: Path) -> None:
    base = build_vit()
    base.classifier = nn.Identity()
    model = PeftModel.from_pretrained(base, saved)
    own = PeftModel.from_pretrained(build_vit(), saved)
    assert torch.equal(
        model.get_submodule(LINEAR).trpts_values["default"], own.get_submodule(LINEAR).trpts_values["default"]
    )


def test_embeddings_of_tokens_may_come_with_an_adapter(tmp_path: Path) -> None:
    def bert() -> nn.Module:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))

    model = get_peft_model(bert(), TRPTSConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    key = "base_model.model.bert.embeddings.word_embeddings.weight"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key])
    damaged(tmp_path, tmp_path, _fill(key, float("nan")))
    with pytest.raises(ValueError, match=r"word_embeddings.weight` must be finite"):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_no_file_brings_embeddings_of_positions(tmp_path: Path) -> None:
    """They are the base model's, and a loader would overwrite them for good."""

    def clip() -> nn.Module:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes))

    get_peft_model(clip(), TRPTSConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    (name,) = (name for name, _ in clip().named_parameters() if name.endswith("position_embedding.weight"))
    save_file({**load_file(file), f"base_model.model.{name}": torch.zeros(17, 16)}, file)
    with pytest.raises(ValueError, match=r"position_embedding.weight` must be absent"):
        PeftModel.from_pretrained(clip(), tmp_path)


def test_embeddings_saved_on_request_may_come_if_they_are_the_bases(tmp_path: Path, logits: Tensor) -> None:
    adapted().save_pretrained(tmp_path, save_embedding_layers=True)
    key = "base_model.model.vit.embeddings.patch_embeddings.projection.bias"
    assert key in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path).eval()), logits)
    rounded = PeftModel.from_pretrained(build_vit().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    assert rounded.get_base_model().vit.embeddings.patch_embeddings.projection.bias.dtype == torch.bfloat16
    damaged(tmp_path, tmp_path, _fill(key, 1.0))
    with pytest.raises(ValueError, match=r"patch_embeddings.projection.bias` must be absent"):
        PeftModel.from_pretrained(build_vit(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embeddings_saved_in_another_dtype_are_the_bases(tmp_path: Path, dtype: torch.dtype) -> None:
    adapted(build_vit().bfloat16()).save_pretrained(tmp_path, save_embedding_layers=True)
    PeftModel.from_pretrained(build_vit().to(dtype), tmp_path)
    with pytest.raises(ValueError, match=r"embeddings\S+` must be absent"):
        PeftModel.from_pretrained(build_vit(seed=1).to(dtype), tmp_path, config=_of_any_base(tmp_path))


def _of_any_base(folder: Path) -> TRPTSConfig:
    config = TRPTSConfig.from_pretrained(folder)
    config.allow_other_base = True
    return config


def test_a_trained_embedding_is_not_taken_for_the_bases(tmp_path: Path) -> None:
    model = adapted()
    model.get_base_model().vit.embeddings.patch_embeddings.projection.bias.data *= 1.001
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"patch_embeddings.projection.bias` must be absent"):
        PeftModel.from_pretrained(build_vit(), tmp_path)


@pytest.mark.parametrize(
    ("assigned", "rule"),
    [
        ({"token_layers": [2]}, r"config\.token_layers` must be .* \[1\], got \[2\]"),
        ({"token_layers": 0}, r"config\.token_layers` must be .* \[1\], got \[\]"),
        ({"keep_rate": 0.7}, r"config\.keep_rate` must be .* 0\.5, got 0\.7: call `trpts_peft\.set_keep_rate`"),
        ({"train_bias": False}, r"config\.train_bias` must be .* True, got False"),
        ({"min_connections": 3, "max_connections": 3}, r"config\.min_connections` must be .*: 2 inputs .*, got 3"),
    ],
)
def test_a_config_that_the_adapter_does_not_follow_is_not_saved(
    assigned: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    options = {"token_layers": [1], "keep_rate": 0.5, "min_connections": 2, "max_connections": 2}
    model = get_peft_model(build_vit(), TRPTSConfig(**options))
    vars(model.peft_config["default"]).update(assigned)
    with pytest.raises(ValueError, match=rule):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("saved_module", ["classifier", "layernorm_after"])
def test_a_model_with_compiled_blocks_is_saved_under_its_own_names(tmp_path: Path, saved_module: str) -> None:
    model = adapted(modules_to_save=[saved_module])
    before = predict(model)
    blocks = model.base_model.model.vit.layers
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path).eval()), before)
    randomize(model, 5)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(predict(model), before)
    assert all(type(block).__name__ == "OptimizedModule" for block in blocks)


@pytest.mark.parametrize("bias", [True, False])
def test_a_config_is_followed_in_other_ways_than_by_its_own_numbers(bias: bool, tmp_path: Path) -> None:
    model = adapted(build_vit(qkv_bias=bias), min_connections=1, max_connections=5, top_percent=2)
    assert 3 not in model.peft_config["default"].connections.values()  # halfway, where calibration is to come
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(qkv_bias=bias), tmp_path)), predict(model))


def compiled_blocks(base: nn.Module | None = None) -> nn.Module:
    base = base or build_vit()
    for index, block in enumerate(base.vit.layers):
        base.vit.layers[index] = torch.compile(block, backend="eager")
    return base


def test_adapters_are_loaded_into_a_model_with_compiled_blocks(saved: Path, logits: Tensor, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(compiled_blocks(), saved).eval()
    assert torch.equal(predict(model), logits)
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(predict(model), logits)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    torch.testing.assert_close(predict(model), logits)
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    for base in (build_vit(), compiled_blocks()):
        loaded = PeftModel.from_pretrained(base, tmp_path / "mean").eval()
        torch.testing.assert_close(predict(loaded), logits)


def test_a_head_that_was_compiled_takes_the_files(saved: Path, logits: Tensor, tmp_path: Path) -> None:
    base = compiled_blocks()
    base.classifier = torch.compile(base.classifier, backend="eager")
    model = PeftModel.from_pretrained(base, saved).eval()
    assert torch.equal(predict(model), logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path).eval()), logits)


def _compile_blocks(model: PeftModel) -> PeftModel:
    compiled_blocks(model.get_base_model())
    return model


def _compile_base(model: PeftModel, compiler: Callable[[nn.Module], nn.Module]) -> PeftModel:
    model.base_model.model = compiler(model.base_model.model)
    return model


_compiled, _regions = partial(torch.compile, backend="eager"), partial(compile_regions, backend="eager")
COMPILED: dict[str, Callable[[PeftModel], Any]] = {
    "blocks": _compile_blocks,
    "regions, the head too": _regions,
    "the whole model": _compiled,
    "the base": partial(_compile_base, compiler=_compiled),
    "regions of the base": partial(_compile_base, compiler=_regions),
}


def test_adapters_are_loaded_into_a_base_whose_regions_were_compiled(saved: Path, logits: Tensor) -> None:
    model = PeftModel.from_pretrained(_regions(build_vit()), saved).eval()
    assert torch.equal(predict(model), logits)
    randomize(model, 1)
    assert not torch.equal(predict(model), logits)
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(predict(model), logits)


@pytest.mark.parametrize("compile_model", COMPILED.values(), ids=COMPILED)
def test_weights_kept_in_memory_are_put_back_into_compiled_models(compile_model: Any, tmp_path: Path) -> None:
    model = compile_model(adapted(modules_to_save=["classifier", "layernorm_after"]))
    before = predict(model)
    best = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    randomize(model, 1)
    assert not torch.equal(predict(model), before)
    set_peft_model_state_dict(model, best)
    assert torch.equal(predict(model), before)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path).eval()), before)


@needs_adapter_methods
def test_transformers_saves_an_adapter_of_compiled_blocks_under_the_models_own_names(tmp_path: Path) -> None:
    base = build_vit()
    base.add_adapter(TRPTSConfig(modules_to_save=["classifier", "layernorm_after"]))
    randomize(base, 1)
    before = predict(base.eval())
    compiled_blocks(base).save_pretrained(tmp_path)
    loaded = build_vit()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(predict(loaded.eval()), before)


def test_a_refused_file_is_taken_out_where_the_active_adapter_was_deleted(tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(target_modules=["fc1"]))
    model.save_pretrained(tmp_path)
    damaged(tmp_path, tmp_path, _fill(f"{LINEAR}.trpts_values", float("nan")))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="must be finite"):
        model.load_adapter(tmp_path, "second")
    assert not [name for name in model.state_dict() if "trpts_" in name]
    assert list(model.peft_config) == []


def test_transformers_loads_no_file_into_compiled_blocks_and_says_so(saved: Path) -> None:
    base = compiled_blocks()
    before = list(base.state_dict())
    base.load_adapter(str(saved))
    (check,) = base._forward_pre_hooks.values()
    for _ in ("the first pass", "one that has waited for it"):
        with pytest.raises(ValueError, match="Blocks were compiled before: load the adapter first"):
            check(base, ())
    assert list(base.state_dict()) == before


def test_blocks_compiled_after_a_file_was_loaded_are_not_why_it_is_refused(saved: Path, tmp_path: Path) -> None:
    base = build_vit()
    base.load_adapter(str(damaged(saved, tmp_path, DAMAGES["values not a number"])))
    base.vit.layers[0] = torch.compile(base.vit.layers[0], backend="eager")
    with pytest.raises(ValueError, match="must be finite") as refusal:
        base(build_images())
    assert "compiled" not in str(refusal.value)


def test_a_file_may_be_checked_once_the_blocks_are_compiled(saved: Path, logits: Tensor) -> None:
    base = build_vit()
    base.load_adapter(str(saved))
    assert torch.equal(predict(compiled_blocks(base).eval()), logits)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@needs_adapter_methods
def test_a_refused_file_that_was_merged_unseen_is_taken_out_of_the_base(saved: Path, tmp_path: Path) -> None:
    base = build_vit()
    base.load_adapter(str(saved), "good")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = predict(base)
    base.load_adapter(str(damaged(saved, tmp_path, DAMAGES["values not a number"])), "bad")
    for layer in base.modules():
        if isinstance(layer, TRPTSLinear):
            layer.merge(adapter_names=["good", "bad"])
    with pytest.raises(ValueError, match="finite"):
        base(build_images())
    assert all(layer.merged_adapters == ["good"] for layer in base.modules() if isinstance(layer, TRPTSLinear))
    for layer in base.modules():
        if isinstance(layer, TRPTSLinear):
            layer.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    base.set_adapter("good")
    assert torch.equal(predict(base), expected)


def test_a_weight_that_two_linears_share_is_rid_of_a_refused_file(saved: Path, tmp_path: Path) -> None:
    base = build_vit()
    base.load_adapter(str(damaged(saved, tmp_path, DAMAGES["values not a number"])))
    first, second = (base.vit.layers[index].mlp.fc1 for index in (0, 1))
    second.base_layer.weight = first.base_layer.weight
    before = first.base_layer.weight.clone()
    for layer in (first, second):
        layer.merge()
    with pytest.raises(ValueError, match="adapter's"):
        base(build_images())
    assert torch.equal(base.vit.layers[0].mlp.fc1.weight, before)


def test_a_folder_whose_config_was_changed_says_so(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "keep_rate": 0.25}))
    with pytest.raises(ValueError, match=r"at 0\.25, got .* at 0\.5: the tensors were saved with another"):
        PeftModel.from_pretrained(build_vit(), tmp_path, is_trainable=True)


def test_a_checkpoint_of_another_rate_says_how_to_resume_it(saved: Path, logits: Tensor) -> None:
    model = adapted(keep_rate=0.6)
    with pytest.raises(ValueError, match=r"call `trpts_peft\.set_keep_rate\(model, 0\.5, 'default'\)` first"):
        model.load_adapter(saved, "default", is_trainable=True)
    set_keep_rate(model, 0.5)
    model.load_adapter(saved, "default", is_trainable=True)
    assert torch.equal(predict(model), logits)


def test_the_remedy_for_another_rate_names_the_adapter(saved: Path, logits: Tensor) -> None:
    model = adapted(keep_rate=0.6)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    calibrate(model, None, adapter_name="second", probe_head=False, progress=False)
    with pytest.raises(ValueError, match=r"`trpts_peft\.set_keep_rate\(model, 0\.5, 'second'\)`"):
        model.load_adapter(saved, "second")
    set_keep_rate(model, 0.5, "second")
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(predict(model), logits)


def test_a_refused_file_beside_two_active_adapters_leaves_no_trace(saved: Path, tmp_path: Path) -> None:
    model = adapted(token_layers=0)
    model.add_adapter("b", TRPTSConfig(token_layers=0))
    model.base_model.set_adapter(["default", "b"])
    before = snapshot(model)
    damaged(saved, tmp_path, _fill(f"{LINEAR}.trpts_values", float("nan")))
    with pytest.raises(ValueError, match=r"trpts_values.*` must be finite"):
        model.load_adapter(tmp_path, "c")
    assert_same(before, snapshot(model))
    assert list(model.peft_config) == ["default", "b"]


def test_a_refused_file_leaves_merged_what_was(saved: Path, tmp_path: Path) -> None:
    model = adapted()
    model.merge_adapter()
    before = snapshot(model)
    damaged(saved, tmp_path, _fill(f"{LINEAR}.trpts_values", float("nan")))
    with pytest.warns(UserWarning, match="merged"), pytest.raises(ValueError, match="must be finite"):
        model.load_adapter(tmp_path, "c")
    assert_same(before, snapshot(model))
    model.unmerge_adapter()
    assert torch.equal(predict(model), predict(adapted()))


def test_a_state_dict_brings_its_rate(logits: Tensor) -> None:
    tensors = {name: tensor.clone() for name, tensor in adapted().state_dict().items()}
    model = adapted(keep_rate=0.9)
    model.load_state_dict(tensors)
    assert torch.equal(predict(model), logits)


def test_a_rate_that_was_only_assigned_is_not_saved(tmp_path: Path) -> None:
    model = adapted()
    model.peft_config["default"].keep_rate = 0.25
    with pytest.raises(ValueError, match=r"`config\.keep_rate` must be .*, 0\.5, got 0\.25"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_buffer_of_a_saved_module_may_be_infinite(tmp_path: Path) -> None:
    def masked() -> nn.Module:
        base = build_vit()
        base.classifier.register_buffer("mask", torch.full((3,), float("-inf")))
        return base

    adapted(masked()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(masked(), tmp_path)
    own = model.base_model.model.classifier.modules_to_save["default"]
    assert own.mask.tolist() == [float("-inf")] * 3


def test_uncalibrated_adapter_survives_a_refused_resume(saved: Path) -> None:
    """The remedy that the message names, to calibrate first, has to be possible afterwards."""
    config = TRPTSConfig(importance="magnitude", modules_to_save=["classifier"], token_layers=[1])
    model = get_peft_model(build_vit(), config)
    with pytest.raises(ValueError, match="calibrate this model"):
        model.load_adapter(saved, "default", is_trainable=True)
    calibrate(model, None, probe_head=False, progress=False)


# ---- transformers' own loader ----


def _drop_head(tensors: Tensors) -> None:
    """Through PEFT's own loader this is a KeyError of PEFT's, raised before any hook of ours."""
    del tensors[HEAD]


UNCAST = {name: damage for name, damage in DAMAGES.items() if name not in CAST}
UNCAST["head missing"] = _drop_head


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("damage", UNCAST)
def test_transformers_loader_refuses_at_the_first_forward(
    saved: Path, tmp_path: Path, logits: Tensor, damage: str
) -> None:
    base = build_vit()
    before = snapshot(base)
    path = damaged(saved, tmp_path, UNCAST[damage])
    with pytest.raises((ValueError, RuntimeError)):
        base.load_adapter(str(path))
        predict(base)
    if hasattr(base, "peft_config"):  # transformers has refused it by itself, and left it in
        with pytest.raises(ValueError, match="adapter's"):
            predict(base)
    assert_same(before, snapshot(base))
    base.load_adapter(str(saved))
    assert torch.equal(predict(base), logits)


def test_transformers_loader_takes_a_good_file(saved: Path, logits: Tensor) -> None:
    base = build_vit()
    base.load_adapter(str(saved))
    assert torch.equal(predict(base), logits)
    assert not base._forward_pre_hooks
    columns = base.get_submodule(LINEAR.removeprefix("base_model.model.")).trpts_columns["default"]
    assert columns.dtype == torch.int64


@needs_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_transformers_second_adapter_is_refused(saved: Path, tmp_path: Path, logits: Tensor) -> None:
    base = build_vit()
    base.load_adapter(str(saved), "other")
    base.load_adapter(str(saved), "good")
    before = snapshot(base)
    base.load_adapter(str(damaged(saved, tmp_path, DAMAGES["column twice"])), "bad")
    with pytest.raises(ValueError, match="ascending"):
        predict(base)
    after = snapshot(base)
    assert base.active_adapters() == ["good"]
    assert torch.equal(after["logits"], logits)
    assert (before["adapters"], before["classes"]) == (after["adapters"], after["classes"])


def test_transformers_loader_refuses_another_base(saved: Path) -> None:
    other = build_vit(seed=1)
    other.load_adapter(str(saved))
    with pytest.raises(ValueError, match="base"):
        predict(other)


@pytest.mark.parametrize("change", ["a linear less", "a linear more"])
@pytest.mark.parametrize("loader", ["PeftModel", "transformers"])
def test_connections_of_other_linears_are_refused(saved: Path, tmp_path: Path, loader: str, change: str) -> None:
    path = damaged(saved, tmp_path, lambda _tensors: None)
    config = json.loads((path / "adapter_config.json").read_text())
    if change == "a linear less":
        config["exclude_modules"] = ["fc1"]
    else:
        config["connections"]["vit.layers.9.mlp.fc1"] = 2
    (path / "adapter_config.json").write_text(json.dumps(config))
    base = build_vit()
    before = snapshot(base)
    with pytest.raises(ValueError, match="`connections` must be of exactly the adapted linears"):
        if loader == "PeftModel":
            PeftModel.from_pretrained(base, path)
        else:
            base.load_adapter(str(path))
            predict(base)
    assert_same(before, snapshot(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_is_loaded_in_the_dtype_of_the_models(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    path = damaged(saved, tmp_path, _cast(HEAD, dtype))
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(build_vit(), path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert model.base_model.model.classifier.modules_to_save["default"].weight.dtype == torch.float32
        predict(model)


@pytest.mark.filterwarnings("ignore:Some weights")
def test_a_head_of_another_size_may_be_left_out(saved: Path) -> None:
    """As PEFT does with `ignore_mismatched_sizes`; the sparse part is checked all the same."""
    with pytest.raises(ValueError, match=r"ignore_mismatched_sizes=True\)"):
        PeftModel.from_pretrained(build_vit(num_labels=5), saved)
    base = build_vit(num_labels=5)
    head = base.classifier.weight.clone()
    model = PeftModel.from_pretrained(base, saved, ignore_mismatched_sizes=True)
    assert torch.equal(model.base_model.model.classifier.weight, head)
    same = PeftModel.from_pretrained(build_vit(), saved)
    own, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(same)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], expected[key]) for key in own if "classifier" not in key)
    with pytest.raises(ValueError, match="trpts_"):
        PeftModel.from_pretrained(build_vit(hidden_size=64), saved, ignore_mismatched_sizes=True)
    fresh = get_peft_model(build_vit(num_labels=5), TRPTSConfig.from_pretrained(saved))
    with pytest.raises(ValueError, match=r"ignore_mismatched_sizes=True\)"):
        set_peft_model_state_dict(fresh, expected)


# ---- another base ----


def test_other_base_is_refused(saved: Path) -> None:
    other = build_vit(seed=1)
    before = snapshot(other)
    with pytest.raises(ValueError, match="allow_other_base"):
        PeftModel.from_pretrained(other, saved)
    assert_same(before, snapshot(other))


def test_other_architecture_is_refused_before_injection(saved: Path) -> None:
    small = build_vit(num_hidden_layers=1)
    before = snapshot(small)
    with pytest.raises(ValueError, match="selected_token_layers"):
        PeftModel.from_pretrained(small, saved)
    assert_same(before, snapshot(small))


def test_other_base_can_be_allowed(saved: Path, tmp_path: Path) -> None:
    config = TRPTSConfig.from_pretrained(saved)
    config.allow_other_base = True
    model = PeftModel.from_pretrained(build_vit(seed=1), saved, config=config)
    model.save_pretrained(tmp_path)
    assert "allow_other_base" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_cannot_allow_another_base(saved: Path, tmp_path: Path) -> None:
    damaged(saved, tmp_path, lambda tensors: None)
    options = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**options, "allow_other_base": True}))
    with pytest.raises((ValueError, TypeError)):
        PeftModel.from_pretrained(build_vit(seed=1), tmp_path)


# ---- resuming ----


def test_resume_needs_equal_connections(saved: Path, logits: Tensor) -> None:
    model = adapted(seed=5)
    model.load_adapter(saved, "default", is_trainable=True)
    assert torch.equal(predict(model), logits)


@pytest.mark.parametrize(
    "option",
    [
        {"max_connections": 3, "min_connections": 3},
        {"token_layers": [2]},
        {"keep_rate": 0.6},
        {"train_bias": False},
        {"target_modules": ["fc1"]},
    ],
)
def test_resume_refuses_other_shapes_and_token_layers(saved: Path, option: dict[str, Any]) -> None:
    model = adapted(**option)
    before = snapshot(model)
    with pytest.raises(ValueError, match="from_pretrained"):
        model.load_adapter(saved, "default", is_trainable=True)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "config, kept",
    [(TRPTSConfig(token_layers=0), True), (LoraConfig(target_modules=["fc1"]), False)],
    ids=["trpts", "lora goes PEFT's way"],
)
def test_a_file_goes_into_the_parameters_that_are_there(config: Any, kept: bool, tmp_path: Path) -> None:
    model = get_peft_model(build_vit().bfloat16(), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {model.get_parameter(name) is p for name, p in trained.items()} == {kept}


@pytest.mark.parametrize("asked", [(True, None, True), {"autocast_adapter_dtype": True}], ids=["by place", "by name"])
def test_who_asks_for_32_bits_gets_them(asked: Any, tmp_path: Path) -> None:
    model = get_peft_model(build_vit().bfloat16(), TRPTSConfig(token_layers=0), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    if isinstance(asked, dict):
        model.load_adapter(tmp_path, "default", **asked)
    else:
        model.load_adapter(tmp_path, "default", *asked)
    assert {p.dtype for name, p in model.named_parameters() if "trpts_" in name} == {torch.float32}


def test_values_in_32_bits_stay_so_on_a_base_in_16(tmp_path: Path) -> None:
    model = get_peft_model(build_vit().bfloat16(), TRPTSConfig(token_layers=0))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=True)  # puts the file's in their place
    assert {p.dtype for name, p in model.named_parameters() if "trpts_" in name} == {torch.float32}


def test_inputs_of_largest_weight_that_a_file_brought_are_chosen(saved: Path) -> None:
    base = build_vit()
    base.load_adapter(str(saved))
    predict(base)  # checks the file
    assert all(m.is_chosen("default") for m in base.modules() if isinstance(m, TRPTSLinear))


def test_what_was_injected_without_a_file_is_not_taken_for_chosen() -> None:
    config = copy.deepcopy(adapted().peft_config["default"])
    base = inject_adapter_in_model(config, build_vit()).bfloat16()  # in which other weights are the largest
    base(build_images(dtype=torch.bfloat16))  # asks for the file
    assert not any(m.is_chosen("default") for m in base.modules() if isinstance(m, TRPTSLinear))


def test_resumed_columns_reach_forward_and_backward(saved: Path, logits: Tensor) -> None:
    """Other columns of the same number are taken over, and what follows from them."""
    model, reference = adapted(importance="random", seed=5), adapted()
    assert not torch.equal(predict(model), logits)
    model.load_adapter(saved, "default", is_trainable=True)
    model.eval()
    assert torch.equal(predict(model), logits)
    gradients = []
    for trained in (model, reference):
        trained(build_images()).logits.square().sum().backward()
        gradients.append(trained.get_submodule(LINEAR).trpts_values["default"].grad)
    assert torch.equal(*gradients)


def test_a_part_of_the_adapters_model_is_told_where_it_belongs(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"made for another model; load it into that one, .* is vit\.layers\.0\."):
        PeftModel.from_pretrained(build_vit().vit, saved)


def test_adapter_of_an_uncalibrated_config(tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(target_modules=["fc1"], token_layers=[1], keep_rate=0.5))
    randomize(model, 0)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(build_vit(), tmp_path)), predict(model))


# ---- names and leftovers ----


@needs_adapter_methods
@pytest.mark.parametrize("refused", [False, True])
def test_first_passes_that_come_together_wait_for_one_check(
    saved: Path, logits: Tensor, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    base, came, checks = build_vit().eval(), threading.Semaphore(0), 0
    base.load_adapter(str(saved))

    class Counting:
        """A lock, around which it can be counted who came, let in or not."""

        lock = threading.Lock()

        def __enter__(self) -> None:
            came.release()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    def check(*args: Any) -> None:
        nonlocal checks
        checks += 1
        others.append(pool.submit(predict, base))
        assert came.acquire(timeout=60) and came.acquire(timeout=60)
        if refused:
            raise ValueError("damaged")
        check_adapter(*args)

    monkeypatch.setattr(withdrawal, "_checking", Counting())
    monkeypatch.setattr(withdrawal, "check_adapter", check)
    others: list[Future[Tensor]] = []
    with ThreadPoolExecutor(1) as pool:
        passes = (lambda: predict(base), lambda: others[0].result(timeout=60))
        for run in passes:
            if refused:
                with pytest.raises(ValueError, match="damaged"):
                    run()
            else:
                assert torch.equal(run(), logits)
    assert checks == 1


@needs_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found:UserWarning")
def test_one_adapters_name_may_begin_with_anothers(saved: Path, logits: Tensor) -> None:
    base = build_vit()
    base.load_adapter(str(saved), "default")
    base.load_adapter(str(saved), "default_2")
    base.set_adapter("default_2")
    assert torch.equal(predict(base), logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_refused_second_adapter_leaves_no_empty_wrappers(saved: Path, tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(target_modules=["q_proj"]))
    before = list(model.state_dict())
    damaged(saved, tmp_path, DAMAGES["column twice"])
    with pytest.raises(ValueError, match="ascending"):
        model.load_adapter(tmp_path, "b")
    assert list(model.state_dict()) == before


def test_an_allowed_base_is_the_adapters_own_from_then_on(saved: Path, tmp_path: Path) -> None:
    config = TRPTSConfig.from_pretrained(saved)
    config.allow_other_base = True
    PeftModel.from_pretrained(build_vit(seed=1), saved, config=config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(build_vit(seed=1), tmp_path)
    with pytest.raises(ValueError, match="base"):
        PeftModel.from_pretrained(build_vit(), tmp_path)
