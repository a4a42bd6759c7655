"""Weighted sums of adapters, against dense matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import build_images, build_vit
from trpts_peft import TRPTSConfig, calibrate, set_keep_rate, set_token_selection, weighted
from trpts_peft.layer import TRPTSLinear
from trpts_peft.vit import keep_rates_in_force
from trpts_peft.weighted import sum_updates


def dense(columns: Tensor, values: Tensor, inputs: int) -> Tensor:
    total = torch.zeros(columns.shape[0], inputs)
    for row in range(columns.shape[0]):
        for column, value in zip(columns[row].tolist(), values[row].tolist(), strict=True):
            total[row, column] += value
    return total


def adapters(*options: dict[str, Any], base: nn.Module | None = None) -> PeftModel:
    """A PeftModel with adapters a, b, ... of random columns and values."""
    model: Any = base or build_vit()
    for name, extra in zip("abc", options, strict=False):
        defaults = {"importance": "random", "seed": ord(name), "token_layers": [1], "keep_rate": 0.5}
        config = TRPTSConfig(**{**defaults, "modules_to_save": ["classifier"], **extra})
        if name == "a":
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
        calibrate(model, None, adapter_name=name, probe_head=False, progress=False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "trpts_" in key or "modules_to_save" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def layers(model: nn.Module) -> dict[str, TRPTSLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TRPTSLinear)}


def test_rows_of_unequal_union_are_padded_with_the_lowest_unused_columns() -> None:
    one = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    other = torch.tensor([[0, 3], [4, 5]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    columns, values = sum_updates([one, other], [1.0, 0.5], 6)
    assert columns.tolist() == [[0, 1, 2, 3], [1, 2, 4, 5]]
    assert values.tolist() == [[6.0, 0.0, 0.0, 12.0], [3.0, 4.0, 15.0, 20.0]]


def test_sum_of_random_updates_is_that_of_dense_matrices() -> None:
    updates = []
    for count in (1, 3, 5):
        columns = torch.rand(7, 9).topk(count, dim=1).indices.sort(dim=1).values
        updates.append((columns, torch.randn(7, count)))
    weights = [0.5, -2.0, 1.0]
    columns, values = sum_updates(updates, weights, 9)
    expected = sum(w * dense(*update, 9) for w, update in zip(weights, updates, strict=True))
    torch.testing.assert_close(dense(columns, values, 9), expected)
    assert (columns.diff(dim=1) > 0).all()
    union = max(len({c for cols, _ in updates for c in cols[row].tolist()}) for row in range(7))
    assert columns.shape == (7, union)


def test_a_sum_is_as_precise_as_what_it_adds_up_on_a_16_bit_base() -> None:
    model = adapters({}, base=build_vit().bfloat16())
    model.base_model.add_weighted_adapter(["a"], [1.0], "sum")
    for layer in layers(model).values():
        assert torch.equal(layer.trpts_values["sum"], layer.trpts_values["a"])
        assert layer.trpts_values["sum"].dtype == torch.float32


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 0.7)])
def test_heads_and_biases_in_16_bits_are_summed_in_32(weights: tuple[float, float]) -> None:
    model = adapters({}, {}, base=build_vit().bfloat16())
    for layer in layers(model).values():
        layer.trpts_bias.bfloat16()
    model.base_model.add_weighted_adapter(["a", "b"], list(weights), "sum")
    for layer in layers(model).values():
        terms = [w * layer.trpts_bias[name].detach().float() for name, w in zip("ab", weights, strict=True)]
        torch.testing.assert_close(layer.trpts_bias["sum"].detach(), sum(terms), rtol=0, atol=1e-6)
    head = model.base_model.model.classifier
    terms = [w * head.modules_to_save[name].weight.float() for name, w in zip("ab", weights, strict=True)]
    exact = head.modules_to_save["sum"].weight - sum(terms)
    assert (exact.abs() <= 0.51 * 2**-7 * sum(terms).abs() + 1e-6).all()


def test_a_head_that_nobody_trained_stays_the_bases() -> None:
    model = adapters({}, {})
    head = model.base_model.model.classifier
    for name in "ab":
        head.modules_to_save[name].load_state_dict(head.original_module.state_dict())
    model.base_model.add_weighted_adapter(["a", "b"], [0.3, -1.7], "sum")
    assert torch.equal(head.modules_to_save["sum"].weight, head.original_module.weight)


def test_a_default_dtype_changes_no_sum() -> None:
    update = torch.tensor([[1]]), torch.tensor([[1.0]])
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, values = sum_updates([update, update], [1.0, 2**-10], 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.dtype == torch.float32 and values.tolist() == [[1 + 2**-10]]


def test_a_sum_has_no_importance_of_its_own() -> None:
    model = adapters({}, {})
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert model.peft_config["a"].unit_importance is not None
    assert model.peft_config["sum"].unit_importance is None


def test_cancelled_entries_stay_trainable() -> None:
    update = torch.tensor([[1]]), torch.tensor([[2.0]])
    columns, values = sum_updates([update, update], [1.0, -1.0], 3)
    assert (columns.tolist(), values.tolist()) == ([[1]], [[0.0]])


def test_weighted_adapter_is_the_dense_sum() -> None:
    model = adapters({}, {"min_connections": 3}, {"train_bias": False})
    weights = {"a": 0.5, "b": -0.25, "c": 2.0}
    model.base_model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert layers(model)
    for layer in layers(model).values():
        expected = sum(
            w * dense(layer.trpts_columns[n], layer.trpts_values[n].detach(), layer.in_features)
            for n, w in weights.items()
        )
        own = dense(layer.trpts_columns["sum"], layer.trpts_values["sum"].detach(), layer.in_features)
        torch.testing.assert_close(own, expected)
        bias = sum(w * layer.trpts_bias[n] for n, w in weights.items() if n in layer.trpts_bias)
        torch.testing.assert_close(layer.trpts_bias["sum"], bias)
    head = model.base_model.model.classifier
    for part in ("weight", "bias"):
        original = getattr(head.original_module, part)
        trained = {n: getattr(head.modules_to_save[n], part) for n in (*weights, "sum")}
        expected = original + sum(w * (trained[n] - original) for n, w in weights.items())
        torch.testing.assert_close(trained["sum"], expected)


def test_one_adapter_at_weight_one_predicts_the_same(tmp_path: Any) -> None:
    model = adapters({}, {})
    model.set_adapter("b")
    before = model(build_images()).logits
    model.base_model.add_weighted_adapter(["b"], [1.0], "sum")
    assert model.active_adapters == ["b"]
    model.set_adapter("sum")
    assert keep_rates_in_force(model) == {1: 0.5}
    torch.testing.assert_close(model(build_images()).logits, before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build_vit(), tmp_path / "sum")
    assert torch.equal(loaded(build_images()).logits, model(build_images()).logits)


def test_adapters_with_different_targets() -> None:
    model = adapters({"target_modules": ["fc1"]}, {"target_modules": ["fc2", "q_proj"]})
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    for name, layer in layers(model).items():
        (source,) = {"a", "b"} & set(layer.trpts_values)
        assert torch.equal(layer.get_delta_weight("sum"), layer.get_delta_weight(source)), name
    assert model.peft_config["sum"].connections.keys() == {
        name.removeprefix("base_model.model.") for name in layers(model)
    }


def test_sources_are_left_alone() -> None:
    model = adapters({}, {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    after = model.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []
    now = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: now[name] for name in flags} == flags
    assert not any(flag for name, flag in now.items() if ".sum" in name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], [1.0], "sum"), "`weights`"),
        (([], [], "sum"), "`weights`"),
        ((["a", "z"], [1.0, 1.0], "sum"), "`adapters`"),
        ((["a", "b"], [1.0, 1.0], "a"), "`adapter_name`"),
        ((["a", "c"], [1.0, 1.0], "sum"), "alike"),
    ],
)
def test_bad_arguments_change_nothing(arguments: Any, message: str) -> None:
    model = adapters({}, {}, {"token_layers": [2]})
    before = list(model.state_dict()), list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert before == (list(model.state_dict()), list(model.peft_config))


def test_a_sum_outlasts_the_switch_of_token_selection() -> None:
    model = adapters({}, {}, {"token_layers": [2]})
    set_token_selection(model, False)
    with pytest.raises(ValueError, match="`adapters` must select tokens alike"):
        model.base_model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum")


def test_adapter_not_calibrated_yet() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(token_layers=0), "a")
    model.add_adapter("b", TRPTSConfig(token_layers=0))
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_()
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    for layer in layers(model).values():
        expected = layer.get_delta_weight("a") + layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)


@pytest.mark.parametrize("weights", [[float("nan"), 1.0], ["1", 1.0]])
def test_weights_are_finite_numbers(weights: Any) -> None:
    model = adapters({}, {})
    before = list(model.state_dict()), list(model.peft_config)
    with pytest.raises((ValueError, TypeError), match="`weights`"):
        model.base_model.add_weighted_adapter(["a", "b"], weights, "sum")
    assert before == (list(model.state_dict()), list(model.peft_config))


def test_weights_of_numpy_are_numbers() -> None:
    sums = []
    for weights in ([np.float32(0.5), np.int64(1)], [0.5, 1]):
        model = adapters({}, {})
        model.base_model.add_weighted_adapter(["a", "b"], weights, "sum")
        sums.append({key: tensor for key, tensor in model.state_dict().items() if ".sum" in key})
    assert sums[0].keys() == sums[1].keys() and all(torch.equal(t, sums[1][key]) for key, t in sums[0].items())


def test_a_sum_that_breaks_off_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapters({}, {})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(weighted, "_sum_modules", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.base_model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    after = model.state_dict()
    assert list(model.peft_config) == ["a", "b"] and before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    model.base_model.add_weighted_adapter(["a", "b"], [1, 1], "sum")


def test_adapters_of_different_blocks_are_all_in_the_sum() -> None:
    model = adapters({"layers_to_transform": [1]}, {"layers_to_transform": [2]})
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    blocks = {name.split(".")[2] for name in model.peft_config["sum"].connections}
    assert blocks == {"1", "2"} and model.peft_config["sum"].layers_to_transform is None
    held = [name for name, m in model.get_base_model().named_modules() if "sum" in getattr(m, "trpts_values", {})]
    assert {name.split(".")[2] for name in held} == blocks


def test_a_sum_of_what_is_kept_in_16_bits_is_kept_in_them() -> None:
    config = TRPTSConfig(token_layers=0, modules_to_save=["classifier"])
    model = get_peft_model(build_vit().bfloat16(), config, "a", autocast_adapter_dtype=False)
    model.base_model.add_weighted_adapter(["a"], [1.0], "sum")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    own = {name.removesuffix(".a"): dtype for name, dtype in dtypes.items() if name.endswith(".a")}
    sums = {name.removesuffix(".sum"): dtype for name, dtype in dtypes.items() if name.endswith(".sum")}
    assert own == sums and set(own.values()) == {torch.bfloat16}


def test_a_sum_has_the_token_layers_and_the_rate_that_its_parts_have_now(tmp_path: Path) -> None:
    model = adapters({"keep_rate": 0.9}, {"keep_rate": 0.9})
    for rate in (1.0, 0.5):
        for name in ("a", "b"):
            set_keep_rate(model, rate, name)
        model.peft_config["a"].keep_rate = 0.7  # which is not followed
        model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], f"at_{rate:g}".replace(".", "_"))
    assert model.peft_config["at_1"].keep_rate == 1.0
    set_keep_rate(model, 0.5, "at_1")
    outputs = []
    for name in ("at_1", "at_0_5"):
        model.set_adapter(name)
        assert keep_rates_in_force(model) == {1: 0.5}
        outputs.append(model(build_images()).logits)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        loaded = PeftModel.from_pretrained(build_vit(), tmp_path / name).eval()
        outputs.append(loaded(build_images()).logits)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
