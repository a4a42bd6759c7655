"""What each method of the command line trains."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from conftest import build_vit
from trpts_peft import TRPTSConfig
from trpts_peft.methods import METHODS

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}


def trains(method: str, options: dict[str, Any] | None = None) -> tuple[nn.Module, set[str]]:
    model = METHODS[method].apply(build_vit(), options or {})
    return model, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_the_head_trains_with_every_method(method: str) -> None:
    _, names = trains(method)
    assert len([name for name in names if "classifier" in name]) == 2


def test_linear_trains_the_head_alone() -> None:
    assert trains("linear")[1] == {"classifier.weight", "classifier.bias"}


def test_bitfit_trains_biases_and_the_head() -> None:
    model, names = trains("bitfit")
    expected = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert names == expected | {"classifier.weight"}
    assert "vit.layernorm.bias" in names


def test_full_trains_all() -> None:
    model, names = trains("full")
    assert names == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("method, config", [("lora", LoraConfig), ("trpts", TRPTSConfig)])
def test_adapters_train_the_same_linears(method: str, config: type[Any]) -> None:
    model, names = trains(method)
    assert isinstance(model, PeftModel)
    assert isinstance(model.peft_config["default"], config)
    assert {part for name in names for part in name.split(".")} & LINEARS == LINEARS
    assert not [name for name in names if "base_layer" in name or "original_module" in name]


def test_options_reach_the_config() -> None:
    model, _ = trains("trpts", {"keep_rate": 0.5, "token_layers": [2]})
    assert (model.peft_config["default"].keep_rate, model.peft_config["default"].token_layers) == (0.5, [2])


def test_lora_is_the_usual_one() -> None:
    model, _ = trains("lora")
    assert model.peft_config["default"].r == 8
    assert set(model.peft_config["default"].target_modules) == LINEARS


def resnet() -> nn.Module:
    config = AutoConfig.for_model("resnet", num_labels=3, embedding_size=8, hidden_sizes=[8], depths=[1])
    return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_a_linear_head_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"`(model|method)` must .* ResNetForImageClassification"):
        METHODS[method].apply(resnet(), {})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_families_train_by_other_methods(method: str) -> None:
    """A Swin: TR-PTS does not know it; LoRA takes all its linears but the head."""
    options = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    }
    swin = AutoModelForImageClassification.from_config(AutoConfig.for_model("swin", num_labels=3, **options))
    with pytest.raises(ValueError, match="`method` must be another than 'trpts' for SwinForImageClassification"):
        METHODS["trpts"].apply(swin, {})
    model = METHODS[method].apply(swin, {})
    assert sum(parameter.requires_grad for parameter in model.parameters()) > 10
