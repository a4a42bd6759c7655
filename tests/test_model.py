"""The life of an adapter: made, trained, saved, loaded, switched, added up, merged, removed."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from accelerate.utils import compile_regions
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedConfig, ViTForImageClassification, ViTModel

from conftest import LabelledImages, build_images, build_vit, needs_adapter_methods
from trpts_peft import TRPTSConfig, apply_token_selection, calibrate
from trpts_peft.layer import TRPTSLinear
from trpts_peft.vit import keep_rates_in_force, token_selections

DATA = LabelledImages(13)
FC1 = "base_model.model.vit.layers.1.mlp.fc1"


def adapter(
    base: nn.Module | None = None, *, calibrated: bool = True, seed: int | None = 0, **options: Any
) -> PeftModel:
    """A PeftModel, calibrated by weight magnitude and with random values, that selects tokens in block 1."""
    defaults: dict[str, Any] = {"modules_to_save": ["classifier"], "keep_rate": 0.5, "token_layers": [1]}
    config = TRPTSConfig(**{"importance": "magnitude", **defaults, **options})
    model = get_peft_model(base or build_vit(), config)
    if calibrated:
        calibrate(model, None, probe_head=False, progress=False)
    if seed is not None:
        randomize(model, seed)
    return model.eval()


def randomize(model: nn.Module, seed: int, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@torch.no_grad()
def predict(model: nn.Module, count: int = 2, **options: Any) -> Tensor:
    return model(build_images(count), **options).logits


def linears(model: nn.Module) -> dict[str, TRPTSLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TRPTSLinear)}


def assert_stock(model: nn.Module, seed: int = 0) -> None:
    """Bit for bit what `build_vit` makes, classes included."""
    stock = build_vit(seed=seed)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in stock.named_modules()}
    state = model.state_dict()
    assert state.keys() == stock.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stock.state_dict().items())
    assert torch.equal(predict(model), predict(stock))
    assert not hasattr(model.config, "trpts_keep_rates")


def dense_reference(model: PeftModel, names: dict[str, float]) -> nn.Module:
    """A plain ViT with Σ w_i Δ_i written into its weights by a naive loop, and the same token selection."""
    base = build_vit()
    for name, layer in linears(model.get_base_model()).items():
        linear = base.get_submodule(name)
        for adapter_name, weight in names.items():
            if adapter_name not in layer.trpts_values:
                continue
            columns, values = layer.trpts_columns[adapter_name], layer.trpts_values[adapter_name].detach()
            for row in range(columns.shape[0]):
                for column, value in zip(columns[row].tolist(), values[row].tolist(), strict=True):
                    linear.weight.data[row, column] += weight * value
            if adapter_name in layer.trpts_bias:
                linear.bias.data += weight * layer.trpts_bias[adapter_name].detach()
    rates = keep_rates_in_force(model)
    if rates:
        apply_token_selection(base, rates)
    return base


# ---- injection ----


def test_forward_is_that_of_dense_weights() -> None:
    model = adapter()
    reference = dense_reference(model, {"default": 1.0})
    reference.classifier = model.base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(predict(model), predict(reference), rtol=1e-4, atol=1e-5)


def test_adapter_starts_as_the_identity() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(token_layers=0)).eval()
    torch.testing.assert_close(predict(model), predict(build_vit()), rtol=1e-5, atol=1e-5)


def test_not_calibrated_is_said_once_by_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trpts_peft"):  # and not by `warnings`, which are errors here
        model = get_peft_model(build_vit(), TRPTSConfig(target_modules=["fc1"]))
        predict(model)
    assert [record.name for record in caplog.records] == ["trpts_peft.model"]
    assert "not calibrated" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_config_of_a_calibrated_adapter_makes_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    adapter().save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.connections is not None
    config.inference_mode = False
    model = get_peft_model(build_vit(), config).to(dtype)  # which weights are the largest may change by it
    assert "not calibrated: default" in repr(model)
    caplog.clear()
    model.train()
    assert "its config has the results of another one" in caplog.text
    calibrate(model, LabelledImages(6), progress=False)  # and nothing has to be overwritten for it
    caplog.clear()
    model.train()
    assert "not calibrated" not in repr(model) + caplog.text


def test_a_training_step_does_not_look_at_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = adapter(), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: looked.append(x))
    model.train()  # as transformers' Trainer says in each step
    assert not looked


def test_a_conversion_of_all_tensors_leaves_the_file_whole(tmp_path: Path) -> None:
    model = adapter(token_layers=[1], keep_rate=0.95)
    model.type(torch.bfloat16).save_pretrained(tmp_path)  # integers, too, says torch
    loaded = PeftModel.from_pretrained(build_vit(), tmp_path)
    columns = loaded.get_submodule("base_model.model.vit.layers.0.mlp.fc1").trpts_columns["default"]
    assert torch.equal(
        columns, adapter().get_submodule("base_model.model.vit.layers.0.mlp.fc1").trpts_columns["default"]
    )


def test_without_weights_nothing_is_said_of_a_config_used_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter().save_pretrained(tmp_path)
    caplog.clear()
    with torch.device("meta"):
        model = get_peft_model(build_vit(), PeftConfig.from_pretrained(tmp_path))
    model.train()
    assert "not calibrated" not in caplog.text + repr(model)


@pytest.mark.parametrize("chosen", [False, True])
def test_the_whole_model_is_written_and_read(tmp_path: Path, chosen: bool) -> None:
    model, other = (adapter() if chosen else get_peft_model(build_vit(), TRPTSConfig()) for _ in range(2))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "trpts_values" in n).add_(1.0)
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(predict(other), predict(model))


def test_calibrated_adapter_is_loaded_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter().save_pretrained(tmp_path)
    caplog.clear()
    model = PeftModel.from_pretrained(build_vit(), tmp_path, is_trainable=True).train()
    assert "not calibrated" not in caplog.text + repr(model)


def test_not_calibrated_adapter_trains_the_largest_weights() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(min_connections=2, max_connections=2))
    assert linears(model)
    for layer in linears(model).values():
        expected = layer.base_layer.weight.abs().topk(2, dim=1).indices.sort(dim=1).values
        assert torch.equal(layer.trpts_columns["default"], expected)


def test_explicit_token_layers_need_no_calibration() -> None:
    model = adapter(calibrated=False, token_layers=[0, 2])
    assert keep_rates_in_force(model) == {0: 0.5, 2: 0.5}


def test_integer_token_layers_wait_for_calibration() -> None:
    assert token_selections(adapter(calibrated=False, token_layers=3)) == {}


def test_only_the_adapter_trains() -> None:
    model = adapter()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("trpts_values" in n or "trpts_bias" in n or "classifier.modules_to_save" in n for n in trainable)


def test_train_bias_off() -> None:
    model = adapter(train_bias=False)
    assert not any("trpts_bias" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(
        predict(model.merge_and_unload()), predict(adapter(train_bias=False)), rtol=1e-4, atol=1e-5
    )


def test_layers_to_transform_and_exclude_modules() -> None:
    config = TRPTSConfig(target_modules=["fc1", "fc2"], layers_to_transform=[1, 3], exclude_modules=["fc2"])
    model = get_peft_model(build_vit(), config)
    assert set(linears(model.get_base_model())) == {"vit.layers.1.mlp.fc1", "vit.layers.3.mlp.fc1"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["layernorm_before"]}, TypeError, "LayerNorm"),
        ({"target_modules": ["fc1"], "connections": {"vit.layers.0.mlp.fc1": 1}}, ValueError, "`connections`"),
        ({"target_modules": ["layers.0.mlp.fc1"], "connections": {"vit.layers.0.mlp.fc1": 33}}, ValueError, "33"),
        ({"token_layers": [4]}, ValueError, "`token_layers`"),
        ({"selected_token_layers": [0, 9]}, ValueError, "`selected_token_layers`"),
        ({"target_modules": ["nothing"]}, ValueError, "nothing"),
        ({"modules_to_save": ["layers.1"]}, ValueError, r"`modules_to_save`.*got vit\.layers\.1:"),
        ({"modules_to_save": ["attention"], "token_layers": 0}, ValueError, r"got vit\.layers\.0\.attention:"),
        ({"modules_to_save": ["vit"]}, ValueError, r"`modules_to_save`.*got vit:"),
    ],
)
def test_configs_that_do_not_fit_change_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    base, model = build_vit(), adapter()
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with pytest.raises(error, match=message):
        get_peft_model(base, TRPTSConfig(**options))
    assert_stock(base)
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags
    before = predict(model), [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(error, match=message):
        model.add_adapter("second", TRPTSConfig(**options))
    assert torch.equal(before[0], predict(model))
    assert before[1:] == ([type(m) for m in model.modules()], list(model.state_dict()))
    assert list(model.peft_config) == ["default"]


# ---- training, saving, loading ----


def train_step(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    optimizer.zero_grad()
    model(**DATA.batch()).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2_with_registers"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_life_cycle(tmp_path: Path, family: str, low_cpu_mem_usage: bool, is_trainable: bool) -> None:
    model = get_peft_model(build_vit(family), TRPTSConfig(modules_to_save=["classifier"], keep_rate=0.6, top_percent=5))
    selection = calibrate(model, DATA, progress=False)
    train_step(model)
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    loaded = PeftModel.from_pretrained(build_vit(family), tmp_path, **options)
    assert torch.equal(predict(loaded), predict(model))
    assert keep_rates_in_force(loaded) == dict.fromkeys(selection.token_layers, 0.6)
    assert any(p.requires_grad for p in loaded.parameters()) == is_trainable
    if is_trainable:
        train_step(model)
        train_step(loaded)
        assert torch.equal(predict(loaded), predict(model))


def test_second_process_predicts_the_same(tmp_path: Path) -> None:
    model = adapter()
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch; from conftest import build_images, build_vit; from peft import PeftModel\n"
        "model = PeftModel.from_pretrained(build_vit(), sys.argv[1])\n"
        "torch.save(model(build_images()).logits.detach(), sys.argv[1] + '/logits.pt')\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": path})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), predict(model))


def test_auto_peft_model(tmp_path: Path) -> None:
    build_vit().save_pretrained(tmp_path / "base")
    model = adapter(ViTForImageClassification.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(predict(loaded), predict(model))
    whole = ViTForImageClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(predict(whole), predict(model))


def test_state_of_a_calibrated_adapter_is_all_in_the_state_dict() -> None:
    one, other = adapter(seed=1), adapter(seed=2, importance="random")
    other.load_state_dict(one.state_dict())
    assert torch.equal(predict(other), predict(one))


def test_deepcopy_is_independent() -> None:
    model = adapter()
    before = predict(model)
    randomize(copy.deepcopy(model), 3)
    assert torch.equal(predict(model), before)
    assert torch.equal(predict(copy.deepcopy(model)), before)


# ---- merging, leaving ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_are_exact(dtype: torch.dtype) -> None:
    model = adapter(build_vit().to(dtype))
    images = build_images(dtype=dtype)
    weights = {name: layer.base_layer.weight.clone() for name, layer in linears(model).items()}
    before = model(images).logits
    model.merge_adapter()
    assert not torch.equal(linears(model)[FC1].base_layer.weight, weights[FC1])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(images).logits, before, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in linears(model).items())
    assert torch.equal(model(images).logits, before)


def encoder_and_head(**options: Any) -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, **options}), nn.Linear(8, 2))


@pytest.mark.parametrize("targets", [["linear1", "1"], "all-linear"])
def test_linears_that_evaluation_would_read_past_the_adapter_are_refused(targets: Any) -> None:
    encoder = encoder_and_head()
    message = r"must name linears that the model calls, got 0.linear1 of an nn.TransformerEncoderLayer"
    with pytest.raises(TypeError, match=message):
        get_peft_model(encoder, TRPTSConfig(target_modules=targets))
    assert not linears(encoder)


def test_linears_of_an_encoder_without_a_fast_path_are_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]
            return self.linear2(self.linear1(src))

    config = TRPTSConfig(target_modules=["linear1"])
    for encoder in (encoder_and_head(batch_first=False), Own(8, 2, 16, batch_first=True)):
        assert len(linears(get_peft_model(encoder, config))) == 1
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    assert len(linears(get_peft_model(encoder_and_head(), config))) == 1


def test_an_adapter_that_attention_never_calls_is_named(caplog: pytest.LogCaptureFixture) -> None:
    get_peft_model(encoder_and_head(), TRPTSConfig(target_modules=["1"]))
    assert "reads the weight" not in caplog.text
    get_peft_model(encoder_and_head(), TRPTSConfig(target_modules=["out_proj", "1"]))
    assert "reads the weight of 0.self_attn.out_proj without a call" in caplog.text


def test_computed_weights_are_refused() -> None:
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    with pytest.raises(TypeError, match="got 0, whose weight is computed from others"):
        get_peft_model(base, TRPTSConfig(target_modules=["0", "1"]))
    assert not linears(base)


def test_disabling_a_merged_adapter_is_exact() -> None:
    model = adapter()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(predict(model), predict(build_vit()))


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2_with_registers"])
def test_merge_and_unload_goes_on_selecting(family: str) -> None:
    model = adapter(build_vit(family))
    before = predict(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(predict(merged), before, rtol=1e-4, atol=1e-5)
    assert keep_rates_in_force(merged) == {1: 0.5}
    assert merged.state_dict().keys() == build_vit(family).state_dict().keys()
    assert merged.config.trpts_keep_rates == {"1": 0.5}


def test_rates_stand_in_the_config_of_a_vit_within_another_module(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = build_vit().vit
            self.one, self.other = nn.Linear(32, 2), nn.Linear(32, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.vit(images).last_hidden_state[:, 0]
            return torch.cat([self.one(tokens), self.other(tokens)], dim=1)

    model = get_peft_model(Heads(), TRPTSConfig(target_modules=["fc1"], token_layers=[1], keep_rate=0.5))
    merged = model.merge_and_unload()
    merged.vit.save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path)
    apply_token_selection(loaded)
    assert keep_rates_in_force(loaded) == keep_rates_in_force(merged) == {1: 0.5}


def test_rates_of_two_vits_stand_in_no_config_of_one() -> None:
    pair = nn.ModuleList([build_vit().vit, build_vit().vit])
    apply_token_selection(pair, {1: 0.5})
    assert not any(hasattr(vit.config, "trpts_keep_rates") for vit in pair)


def test_merge_and_unload_without_tokens_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = adapter()
    reference = dense_reference(model, {"default": 1.0})
    reference.classifier = model.base_model.model.classifier.modules_to_save["default"]
    apply_token_selection(reference, {})
    merged = model.merge_and_unload(keep_token_selection=False)
    assert "outputs" in caplog.text
    torch.testing.assert_close(predict(merged), predict(reference), rtol=1e-4, atol=1e-5)
    assert {type(m) for m in merged.modules()} == {type(m) for m in build_vit().modules()}
    assert not hasattr(merged.config, "trpts_keep_rates")


def test_merge_and_unload_of_a_named_adapter() -> None:
    model = adapter(modules_to_save=None)
    model.add_adapter("second", TRPTSConfig(token_layers=[2], keep_rate=0.3))
    randomize(model, 4, "second")
    model.set_adapter("second")
    before = predict(model)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["second"])
    assert keep_rates_in_force(merged) == {2: 0.3}
    torch.testing.assert_close(predict(merged), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["classifier", "mlp"])
def test_modules_with_children_that_are_trained_whole_are_merged(trained: str) -> None:
    base = build_vit()
    base.classifier = nn.Sequential(nn.Dropout(), nn.Linear(32, 3))
    model = adapter(base, modules_to_save=[trained])
    before = predict(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(predict(merged), before, rtol=1e-4, atol=1e-5)
    assert not any("trpts" in name or "modules_to_save" in name for name in merged.state_dict())


@pytest.mark.parametrize("heads", [("default", "second"), ("second",), ("default",)])
def test_merging_a_named_adapter_takes_its_head(heads: tuple[str, ...]) -> None:
    model = adapter(modules_to_save=["classifier"] if "default" in heads else None, token_layers=0)
    config = TRPTSConfig(token_layers=0, modules_to_save=["classifier"] if "second" in heads else None)
    model.add_adapter("second", config)
    randomize(model, 4, "second")
    model.set_adapter("second")
    before = predict(model)
    model.set_adapter("default")
    torch.testing.assert_close(predict(model.merge_and_unload(adapter_names=["second"])), before, rtol=1e-4, atol=1e-5)


def test_two_adapters_with_heads_of_their_own_are_not_merged_into_one() -> None:
    model = pair(["classifier"])
    before = predict(model)
    with pytest.raises(ValueError, match=r"`adapter_names` must .*classifier.*\['default', 'second'\]"):
        model.merge_and_unload(adapter_names=["default", "second"])
    assert torch.equal(predict(model), before)


def test_merging_beside_the_head_of_another_adapter_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = pair(["classifier"])
    caplog.clear()
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    assert not caplog.text
    model.merge_adapter(["second"])
    assert "classifier" in caplog.text and "['second']" in caplog.text


@pytest.mark.parametrize("names", [["second", "second"], None])
def test_an_adapter_that_is_named_twice_is_merged_once(names: list[str] | None) -> None:
    model = pair()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if names is None:
        model.base_model.set_adapter(["second", "second"])
    model.merge_adapter(names)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_disabling_what_is_merged_into_some_linears_is_silent() -> None:
    model = adapter(modules_to_save=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter("few", TRPTSConfig(target_modules=["q_proj"], token_layers=0, init_weights=False))
    model.merge_adapter(["few"])
    with model.disable_adapter():
        pass
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_merging_within_disabling_leaves_no_rate_of_the_merged() -> None:
    model = adapter(token_layers=0, modules_to_save=None)
    model.add_adapter("tokens", TRPTSConfig(token_layers=[1], keep_rate=0.5))
    before = predict(model)
    with model.disable_adapter():
        model.merge_adapter(["tokens"])
        predict(model)
    assert torch.equal(predict(model), before)


def test_enabling_what_is_merged_keeps_its_rate() -> None:
    model = adapter(layers_to_transform=[0], token_layers=0, modules_to_save=None)
    model.add_adapter("tokens", TRPTSConfig(layers_to_transform=[2], token_layers=[1], keep_rate=0.5))
    model.merge_adapter(["tokens"])
    before = predict(model)
    model.base_model.enable_adapter_layers()
    assert torch.equal(predict(model), before)
    assert keep_rates_in_force(model) == {1: 0.5}


def test_a_list_of_adapters_that_cannot_be_switches_nothing() -> None:
    model = adapter(token_layers=0)
    model.add_adapter("both", TRPTSConfig(token_layers=0, modules_to_save=["layernorm", "classifier"]))
    randomize(model, 3, "both")
    before = predict(model)
    with pytest.raises(ValueError, match="Only one adapter can be set"):
        model.base_model.set_adapter(["both", "default"])
    assert torch.equal(predict(model), before)


def test_giving_up_rates_of_the_base_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    base = build_vit()
    apply_token_selection(base, {1: 0.5})
    get_peft_model(base, TRPTSConfig(token_layers=0)).merge_and_unload(keep_token_selection=False)
    assert "outputs of the merged model differ" in caplog.text


def test_an_injected_adapter_may_be_merged_before_its_first_pass() -> None:
    base, expected = build_vit(), adapter(token_layers=0, modules_to_save=None)
    inject_adapter_in_model(TRPTSConfig(importance="magnitude", token_layers=0), base)
    calibrate(base, None, probe_head=False, progress=False)
    randomize(base, 0)
    for layer in linears(base).values():
        layer.merge()
    torch.testing.assert_close(predict(base), predict(expected), rtol=1e-4, atol=1e-5)


def test_safe_merge_refuses_broken_values() -> None:
    model = adapter()
    linears(model)[FC1].trpts_values["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


def test_merged_model_is_calibrated_and_merged_again() -> None:
    merged = adapter().merge_and_unload()
    apply_token_selection(merged, {})
    assert torch.isfinite(predict(adapter(merged, seed=3).merge_and_unload())).all()


def test_unload_returns_the_untouched_base() -> None:
    model = adapter()
    train_step(model)
    assert_stock(model.unload())


def test_unload_of_a_model_whose_blocks_were_compiled_meanwhile() -> None:
    base = build_vit()
    base.vit.embeddings.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in base.parameters()]
    model = adapter(base)
    blocks = base.vit.layers
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")
    assert [parameter.requires_grad for parameter in model.unload().parameters()] == trained


def test_unload_gives_the_base_its_own_head_where_the_trained_one_was_compiled() -> None:
    model = adapter()
    train_step(model)
    base = model.get_base_model()
    base.classifier = torch.compile(base.classifier, backend="eager")
    assert_stock(model.unload())


def test_unload_of_a_merged_adapter() -> None:
    model = adapter(modules_to_save=None)
    model.merge_adapter()
    assert_stock(model.unload())


# ---- several adapters ----


def test_on_a_16_bit_base_only_what_is_active_trains(tmp_path: Path) -> None:
    model = get_peft_model(build_vit().bfloat16(), TRPTSConfig())
    model.add_adapter("inactive", TRPTSConfig())
    model.save_pretrained(tmp_path)
    assert model.get_model_status().requires_grad == {"default": True, "inactive": False}
    loaded = PeftModel.from_pretrained(build_vit().bfloat16(), tmp_path)
    loaded.load_adapter(tmp_path / "inactive", "inactive")
    assert loaded.get_model_status().requires_grad == {"default": False, "inactive": False}
    assert {p.dtype for n, p in loaded.named_parameters() if "trpts_" in n} == {torch.float32}


@pytest.mark.parametrize("names", [["default", "defualt"], "default"])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_an_adapter_that_is_not_there_changes_nothing(
    merge: str, names: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapter()
    expected = predict(model)
    caplog.clear()
    with pytest.raises(ValueError, match=r"`adapter_names` must be a list of adapters of the model.*\['default'\]"):
        getattr(model, merge)(adapter_names=names)
    assert not caplog.text
    assert torch.equal(predict(model), expected)
    assert not [m for m in model.modules() if getattr(m, "merged_adapters", [])]


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@pytest.mark.parametrize("act", ["unmerge_adapter", "disable_adapter_layers", "set_adapter"])
def test_a_weight_that_two_linears_share_is_what_it_was(act: str) -> None:
    base = build_vit()
    base.vit.layers[1].mlp.fc1.weight = base.vit.layers[0].mlp.fc1.weight
    before = base.vit.layers[0].mlp.fc1.weight.clone()
    model = adapter(base)
    model.merge_adapter()
    assert not torch.equal(linears(model)["base_model.model.vit.layers.0.mlp.fc1"].weight, before)
    getattr(model.base_model, act)(*(["default"] if act == "set_adapter" else []))
    assert torch.equal(linears(model)["base_model.model.vit.layers.0.mlp.fc1"].weight, before)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
def test_an_adapter_added_beside_a_merged_one_starts_from_the_base_weights() -> None:
    model = adapter(token_layers=0)
    model.add_adapter("before", TRPTSConfig(token_layers=0))
    model.merge_adapter()
    model.add_adapter("after", TRPTSConfig(token_layers=0))
    for layer in linears(model).values():
        assert torch.equal(layer.trpts_columns["before"], layer.trpts_columns["after"])


@pytest.mark.parametrize(
    "name",
    [
        "copy",
        "values",
        "training",
        "v1.0",
        "trpts_values",
        "trpts_keep_ppm",
        "0",
        "vit",
        "fc1",
        "weight",
        "classifier",
        "model",
    ],
)
def test_a_name_that_other_tensors_have_is_refused(name: str) -> None:
    model = adapter()
    expected = predict(model)
    with pytest.raises(ValueError, match=f"`adapter_name` must .* got '{name}'"):
        model.add_adapter(name, TRPTSConfig())
    with pytest.raises(ValueError, match=f"`adapter_name` must .* got '{name}'"):
        get_peft_model(build_vit(), TRPTSConfig(), adapter_name=name)
    model.set_adapter("default")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(predict(model), expected)


def pair(modules_to_save: list[str] | None = None) -> PeftModel:
    """Two adapters that select tokens alike, of different columns and numbers of connections."""
    model = adapter(min_connections=2, max_connections=2, modules_to_save=modules_to_save)
    config = TRPTSConfig(token_layers=[1], keep_rate=0.5, importance="random", min_connections=3, seed=1)
    config.modules_to_save = modules_to_save
    model.add_adapter("second", config)
    calibrate(model, None, adapter_name="second", probe_head=False, progress=False)
    randomize(model, 1, "second")
    return model


def test_switching() -> None:
    model = adapter()
    first = predict(model)
    model.add_adapter("second", TRPTSConfig(token_layers=[0, 3], keep_rate=0.2, modules_to_save=["classifier"]))
    randomize(model, 1, "second")
    assert torch.equal(predict(model), first)
    model.set_adapter("second")
    assert keep_rates_in_force(model) == {0: 0.2, 3: 0.2}
    second = predict(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert keep_rates_in_force(model) == {1: 0.5}
    assert torch.equal(predict(model), first)


def test_two_active_adapters_add_up() -> None:
    model = pair()
    model.base_model.set_adapter(["default", "second"])
    reference = dense_reference(model, {"default": 1.0, "second": 1.0})
    both = predict(model)
    torch.testing.assert_close(both, predict(reference), rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(predict(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(predict(model), both)


def test_adapters_with_other_token_layers_are_not_added_up() -> None:
    model = adapter()
    model.add_adapter("second", TRPTSConfig(token_layers=[2], keep_rate=0.5, modules_to_save=["classifier"]))
    before = predict(model), model.active_adapters, [p.requires_grad for p in model.parameters()]
    for act in (model.base_model.set_adapter, lambda names: model.merge_adapter(names)):
        with pytest.raises(ValueError, match="alike"):
            act(["default", "second"])
    with pytest.raises(ValueError, match="alike"):
        model.merge_and_unload(adapter_names=["default", "second"])
    with pytest.raises(ValueError, match="alike"):
        model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert torch.equal(predict(model), before[0])
    assert before[1:] == (model.active_adapters, [p.requires_grad for p in model.parameters()])
    assert list(model.peft_config) == ["default", "second"]


def test_deleting() -> None:
    model = adapter()
    model.add_adapter("second", TRPTSConfig(token_layers=[2], keep_rate=0.5, modules_to_save=["classifier"]))
    first = predict(model)
    model.delete_adapter("second")
    assert torch.equal(predict(model), first)
    assert set(token_selections(model)) == {1}
    assert not any(".second" in name for name in model.state_dict())


def test_an_adapter_with_a_head_is_not_deleted_beside_two_active_ones() -> None:
    model = adapter(token_layers=0)
    for name in ("b", "c"):
        model.add_adapter(name, TRPTSConfig(token_layers=0))
    model.base_model.set_adapter(["default", "b", "c"])
    before = predict(model)
    with pytest.raises(ValueError, match=r"`adapter_name` must not train .* got 'default' beside \['b', 'c'\]"):
        model.delete_adapter("default")
    assert torch.equal(predict(model), before)
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default", "c"] and model.active_adapters == ["default", "c"]


@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_deleting_the_last_adapter_restores_the_blocks() -> None:
    model = adapter(modules_to_save=None)
    model.delete_adapter("default")
    base = model.base_model.model
    assert [type(block) for block in base.vit.layers] == [type(block) for block in build_vit().vit.layers]
    assert torch.equal(predict(base), predict(build_vit()))


def test_disabling() -> None:
    model = adapter()
    before = predict(model)
    with model.disable_adapter():
        assert torch.equal(predict(model), predict(build_vit()))
    assert torch.equal(predict(model), before)


def test_set_adapter_during_disabling_follows() -> None:
    model = adapter()
    with model.disable_adapter():
        assert keep_rates_in_force(model) == {}
    assert keep_rates_in_force(model) == {1: 0.5}


# ---- mixed batches ----


def _compile_in_place(model: PeftModel) -> PeftModel:
    for block in model.get_base_model().vit.layers:
        block.compile(backend="eager")
    return model


def test_mixed_batches() -> None:
    model = pair(["classifier"])
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(predict(model, 4))
    mixed = predict(model, 4, adapter_names=["default", "second", "second", "default"])
    expected = torch.stack([alone[0][0], alone[1][1], alone[1][2], alone[0][3]])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_mixed_batches_with_the_base() -> None:
    model = adapter(token_layers=0)
    mixed = predict(model, 2, adapter_names=["__base__", "default"])
    torch.testing.assert_close(mixed[0], predict(build_vit())[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], predict(model)[1], rtol=1e-4, atol=1e-5)


def test_mixed_batches_that_cannot_be() -> None:
    model = adapter()
    model.add_adapter("second", TRPTSConfig(token_layers=[2], keep_rate=0.5, modules_to_save=["classifier"]))
    for names, message in (
        (["default", "second"], "alike"),
        (["default", "__base__"], "alike"),
        (["default", "third"], "third"),
        (["second", "second"], "select tokens"),
        (["default"], "Length"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(model, 2, adapter_names=names)
    with pytest.raises(ValueError, match="training"):
        predict(model.train(), 2, adapter_names=["default", "default"])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("compile_model", [partial(compile_regions, backend="eager"), _compile_in_place])
def test_mixed_batches_of_compiled_parts(compile_model: Any) -> None:
    model = pair(["classifier"])
    names = ["default", "second", "second", "default"]
    mixed, alike = predict(model, 4, adapter_names=names), predict(model, 4)
    torch.compiler.reset()  # it gives up what was compiled too often in other tests
    model = compile_model(model)
    for _ in range(2):
        torch.testing.assert_close(predict(model, 4), alike)
        torch.testing.assert_close(predict(model, 4, adapter_names=names), mixed)


def test_mixed_batches_of_models_that_are_compiled_as_a_whole_are_refused() -> None:
    model = pair(["classifier"])
    names = ["default", "second", "second", "default"]
    mixed = predict(model, 4, adapter_names=names)
    compiled = torch.compile(model, backend="eager")
    predict(compiled, 4)
    with pytest.raises(ValueError, match=r"compiled as a whole, got \['default', 'second'\] for one: .*set_stance"):
        predict(compiled, 4, adapter_names=names)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(predict(compiled, 4, adapter_names=names), mixed)


# ---- transformers' own methods ----


def transformers_model(**options: Any) -> ViTForImageClassification:
    base = build_vit()
    base.add_adapter(
        TRPTSConfig(**{"token_layers": [1], "keep_rate": 0.5, "importance": "magnitude", **options}), "mine"
    )
    calibrate(base, None, adapter_name="mine", probe_head=False, progress=False)
    randomize(base, 0, "mine")
    return base


@needs_adapter_methods
def test_transformers_add_adapter_equals_peft() -> None:
    peft_model = get_peft_model(
        build_vit(), TRPTSConfig(token_layers=[1], keep_rate=0.5, importance="magnitude"), "mine"
    )
    calibrate(peft_model, None, probe_head=False, progress=False)
    randomize(peft_model, 0, "mine")
    assert torch.equal(predict(transformers_model()), predict(peft_model.eval()))


@needs_adapter_methods
def test_transformers_disables_and_enables() -> None:
    base = transformers_model()
    before = predict(base)
    base.disable_adapters()
    assert torch.equal(predict(base), predict(build_vit()))
    base.enable_adapters()
    assert torch.equal(predict(base), before)


@needs_adapter_methods
def test_transformers_saves_and_loads(tmp_path: Path) -> None:
    base = transformers_model()
    base.save_pretrained(tmp_path)
    for loaded in (build_vit(), PeftModel.from_pretrained(build_vit(), tmp_path)):
        if isinstance(loaded, ViTForImageClassification):
            loaded.load_adapter(str(tmp_path))
        assert torch.equal(predict(loaded), predict(base))


@needs_adapter_methods
def test_transformers_deletes() -> None:
    base = transformers_model()
    base.delete_adapter("mine")
    assert torch.equal(predict(base), predict(build_vit()))
    blocks = [(type(block), type(block.attention)) for block in base.vit.layers]
    assert blocks == [(type(block), type(block.attention)) for block in build_vit().vit.layers]


@needs_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_transformers_switches() -> None:
    base = transformers_model()
    before = predict(base)
    base.add_adapter(TRPTSConfig(token_layers=[2], keep_rate=0.3), "other")
    randomize(base, 2, "other")
    base.set_adapter("other")
    assert keep_rates_in_force(base) == {2: 0.3}
    assert not torch.equal(predict(base), before)
    base.set_adapter("mine")
    assert torch.equal(predict(base), before)


# ---- number formats ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapter(build_vit().to(dtype))
    images = build_images(dtype=dtype)
    logits = model(images).logits
    assert logits.dtype == dtype or logits.dtype == torch.float32
    torch.testing.assert_close(logits.float(), predict(adapter()), rtol=0.1, atol=0.3)
    logits.float().sum().backward()
    assert torch.isfinite(linears(model)[FC1].trpts_values["default"].grad).all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_vit().to(dtype), tmp_path)
    assert torch.equal(loaded(images).logits, logits)


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_16_bit_adapters_train(autocast_adapter_dtype: bool) -> None:
    config = TRPTSConfig(token_layers=[1], keep_rate=0.5)
    model = get_peft_model(build_vit().bfloat16(), config, autocast_adapter_dtype=autocast_adapter_dtype)
    values = linears(model)[FC1].trpts_values["default"]
    assert values.dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    model(build_images(dtype=torch.bfloat16)).logits.float().sum().backward()
    assert values.grad is not None and values.grad.any()


def test_a_training_step_off_the_cpu_looks_into_no_tensor() -> None:
    model = adapter().train().to("meta")  # whose tensors have no entries: to ask for one is an error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    batch = {name: tensor.to("meta") for name, tensor in DATA.batch().items()}
    outputs = model(**batch)
    outputs.loss.backward()
    optimizer.step()
    assert outputs.logits.shape == (13, 3)
    assert optimizer.state.keys() == set(trained)


def test_a_refused_safe_merge_merges_nothing() -> None:
    model = adapter()
    last = list(linears(model).values())[-1]
    last.trpts_values["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not any(linear.merged for linear in linears(model).values())


def test_a_safe_merge_does_not_look_at_what_is_merged_already() -> None:
    model = adapter()
    linears(model)[FC1].trpts_values["default"].data[0, 0] = 2e38  # finite once, not twice
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_weights_that_accelerate_has_moved_away_are_fetched_to_merge(safe_merge: bool) -> None:
    model = adapter()
    expected, merged_in_place, kept = predict(model), adapter(), {}
    merged_in_place.merge_adapter()
    for name, linear in linears(model).items():
        kept[name] = {key: parameter.detach().clone() for key, parameter in linear.base_layer.named_parameters()}
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=kept[name])
        add_hook_to_module(linear.base_layer, hook)
        assert linear.base_layer.weight.is_meta
    before = copy.deepcopy(kept)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(predict(model), predict(merged_in_place))
    model.unmerge_adapter()
    torch.testing.assert_close(predict(model), expected, rtol=1e-5, atol=1e-5)
    for name, linear in linears(model).items():
        assert not linear.merged
        assert all(torch.equal(kept[name][key], tensor) for key, tensor in before[name].items())


@pytest.mark.parametrize("merged", [False, True])
def test_linears_that_are_offloaded_as_a_whole_are_not_merged(merged: bool) -> None:
    model = adapter()
    if merged:
        model.merge_adapter()
    expected = predict(model)
    cpu_offload(model, torch.device("cpu"), preload_module_classes=["TRPTSLinear"])
    for victim in (
        (model.unmerge_adapter, model.base_model.disable_adapter_layers) if merged else (model.merge_adapter,)
    ):
        with pytest.raises(ValueError, match="`model` must hold the weights that merging writes to"):
            victim()
    assert all(linear.merged == merged for linear in linears(model).values())
    assert torch.equal(predict(model), expected)


def test_disabling_a_merged_adapter_fetches_what_is_offloaded() -> None:
    model = adapter()
    model.merge_adapter()
    for linear in linears(model).values():
        kept = {key: parameter.detach().clone() for key, parameter in linear.base_layer.named_parameters()}
        add_hook_to_module(linear.base_layer, AlignDevicesHook("cpu", offload=True, weights_map=kept))
    with model.disable_adapter():
        assert torch.equal(predict(model), predict(build_vit()))


def test_under_hooks_of_accelerate_an_adapter_is_calibrated_trained_and_merged() -> None:
    models = []
    for hooked in (False, True):
        base = build_vit()
        if hooked:
            attach_execution_device_hook(base, "cpu")  # as for a model that is spread over devices
        model = get_peft_model(base, TRPTSConfig(keep_rate=0.5, modules_to_save=["classifier"]))
        calibrate(model, DATA, progress=False)
        model.train()(**DATA.batch()).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        models.append(model.eval())
    plain, hooked = models
    for name, linear in linears(plain).items():
        assert torch.equal(linear.trpts_columns["default"], linears(hooked)[name].trpts_columns["default"])
    expected = predict(plain)
    torch.testing.assert_close(predict(hooked), expected, rtol=1e-4, atol=1e-5)
    hooked.merge_adapter()
    torch.testing.assert_close(predict(hooked), expected, rtol=1e-4, atol=1e-5)
    hooked.unmerge_adapter()
    torch.testing.assert_close(predict(hooked), expected, rtol=1e-4, atol=1e-5)


def test_adapters_for_offloaded_linears_are_refused() -> None:
    base = build_vit()
    expected = predict(base)
    cpu_offload(base, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"`model` must hold the weights of the targeted linears, got .*q_proj"):
        get_peft_model(base, TRPTSConfig())
    assert torch.equal(predict(base), expected)


def test_an_adapter_is_loaded_onto_a_model_that_was_offloaded(tmp_path: Path) -> None:
    model = adapter()
    model.save_pretrained(tmp_path)
    base = dispatch_model(build_vit(), {"vit": "cpu", "classifier": "cpu"}, force_hooks=True)  # PEFT takes them off
    torch.testing.assert_close(predict(PeftModel.from_pretrained(base, tmp_path)), predict(model))


def test_weights_computed_since_are_not_merged() -> None:
    model = adapter()
    linear = linears(model)[FC1]
    nn.utils.parametrizations.weight_norm(linear.base_layer)
    with pytest.raises(TypeError, match="remove the parametrization"):
        model.merge_adapter()
    assert not any(linear.merged for linear in linears(model).values())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_layers_of_other_methods_are_fetched_to_merge() -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model = get_peft_model(base, TRPTSConfig(target_modules=["0"], init_weights=False)).eval()
    inject_adapter_in_model(LoraConfig(target_modules=["2"], init_lora_weights=False), base)
    inputs = torch.randn(2, 6)
    expected, linear = model(inputs), base[2].base_layer
    kept = {key: parameter.detach().clone() for key, parameter in linear.named_parameters()}
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=kept))
    model.merge_adapter()
    torch.testing.assert_close(model(inputs), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(inputs), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_linears_within_layers_of_other_methods_follow() -> None:
    model = adapter(modules_to_save=None, token_layers=0)
    model.add_adapter("second", TRPTSConfig(token_layers=0))
    randomize(model, 1, "second")
    model.eval().set_adapter("second")
    expected = predict(model)
    model.set_adapter("default")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model.get_base_model())
    model.set_adapter("second")
    assert model.active_adapters == model.base_model.active_adapters == ["second"]
    torch.testing.assert_close(predict(model), expected)
    model.merge_adapter()
    assert all(linear.merged for linear in linears(model).values())
    torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-5)


def test_linears_that_share_a_weight_are_unmerged_in_the_opposite_order() -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    base[2].weight = base[0].weight
    model = get_peft_model(base, TRPTSConfig(target_modules=["0", "2"], init_weights=False))
    before = base[0].base_layer.weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(base[0].base_layer.weight, before)


def test_a_block_in_two_places_is_merged_once() -> None:
    block = nn.Sequential(nn.Linear(6, 6))
    base = nn.Sequential(nn.Sequential(block), nn.Tanh(), nn.Sequential(block))
    model = get_peft_model(base, TRPTSConfig(target_modules=["0.0.0"], init_weights=False)).eval()
    inputs = torch.randn(2, 6)
    expected = model(inputs)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs), expected)
    model.unmerge_adapter()
    assert torch.equal(model(inputs), expected)


def test_merging_into_a_tied_embedding_is_warned_of() -> None:
    base = nn.ModuleDict({"lm_head": nn.Linear(6, 6)})
    base.config = PreTrainedConfig(tie_word_embeddings=True)
    model = get_peft_model(base, TRPTSConfig(target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()


def test_merging_does_not_compose_a_warning_that_cannot_be_due(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter()
    monkeypatch.delattr(BaseTuner, "_check_merge_allowed")
    model.merge_adapter()
    assert all(linear.merged for linear in linears(model).values())


def test_wrapped_base_layers_are_merged_and_unmerged() -> None:
    model = adapter()
    expected, weights = predict(model), {}
    for name, linear in linears(model).items():
        linear.base_layer = checkpoint_wrapper(linear.base_layer)  # finds weight and bias by `__getattr__` only
        weights[name] = linear.base_layer.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(linear.base_layer.weight, weights[name]) for name, linear in linears(model).items())


def test_autocast() -> None:
    model = adapter().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(build_images()).logits
    torch.testing.assert_close(logits.float(), predict(model), rtol=0.1, atol=0.3)
    logits.float().sum().backward()
    assert linears(model)[FC1].trpts_values["default"].grad.dtype == torch.float32


# ---- merging and tokens ----


def two_adapters() -> PeftModel:
    """The active one selects tokens in block 1, b in block 2."""
    model = adapter(modules_to_save=None)
    model.add_adapter("b", TRPTSConfig(token_layers=[2], keep_rate=0.5))
    randomize(model, 1, "b")
    return model.eval()


def test_merging_another_adapter_onto_a_merged_one_has_to_agree_on_tokens() -> None:
    model = two_adapters()
    model.merge_adapter(["default"])
    merged = predict(model)
    with pytest.raises(ValueError, match="alike"):
        model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="alike"):
        model.merge_and_unload(adapter_names=["b"])
    assert torch.equal(predict(model), merged)


def test_disabling_without_a_pass_unmerges_linears_and_tokens_alike() -> None:
    model = two_adapters()
    expected = predict(model)
    model.merge_adapter(["b"])
    with model.disable_adapter():
        assert not any(layer.merged for layer in linears(model).values())
    assert torch.equal(predict(model), expected)


@pytest.mark.parametrize("leave", ["merge", "unload"])
def test_rates_that_nobody_asked_for_do_not_stay_in_the_config(leave: str) -> None:
    base = build_vit()
    base.config.trpts_keep_rates = {"0": 0.5}
    model = adapter(base)
    plain = model.unload() if leave == "unload" else model.merge_and_unload(keep_token_selection=False)
    assert not hasattr(plain.config, "trpts_keep_rates")


def test_mixed_batch_of_adapters_at_rate_one() -> None:
    model = adapter(keep_rate=1.0)
    assert torch.allclose(predict(model, adapter_names=["default"] * 2), predict(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found:UserWarning")
def test_a_calibrated_config_injected_without_a_file_starts_as_the_identity() -> None:
    """Beside another adapter, on linears of its own, where transformers' loader would have put a file's tensors."""
    base = build_vit()
    inject_adapter_in_model(TRPTSConfig(target_modules=["fc1"]), base, "a")
    connections = {f"vit.layers.{index}.attention.q_proj": 2 for index in range(4)}
    config = TRPTSConfig(target_modules=["q_proj"], connections=connections, selected_token_layers=[])
    inject_adapter_in_model(config, base, "b")
    assert torch.equal(predict(base), predict(build_vit()))
    columns = base.vit.layers[0].attention.q_proj.trpts_columns["b"]
    assert int(columns.min()) >= 0
