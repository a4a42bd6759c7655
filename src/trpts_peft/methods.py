"""The ways to fine-tune a classifier that `trpts finetune` offers: what each trains, and its usual learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from .config import TRPTSConfig
from .families import FAMILIES, find_family
from .head import find_head

__all__ = ["METHODS", "Method"]

_LORA_RANK = 8


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        learning_rate: the peak of Adam's rate where none is asked for. docs/finetuning.md says what it rests on.
        apply: (base model, options of TRPTSConfig) -> the model that trains.
    """

    learning_rate: float
    apply: Callable[[nn.Module, dict[str, Any]], nn.Module]


def _trpts(base: nn.Module, options: dict[str, Any]) -> nn.Module:
    if find_family(base) is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"`method` must be another than 'trpts' for {type(base).__name__}: it knows {known}.")
    return get_peft_model(base, TRPTSConfig(modules_to_save=[_head_of(base)], **options))


def _lora(base: nn.Module, _options: dict[str, Any]) -> nn.Module:
    family = find_family(base)
    targets = list(family.target_modules) if family else "all-linear"
    config = LoraConfig(r=_LORA_RANK, target_modules=targets, modules_to_save=[_head_of(base)])
    return get_peft_model(base, config)


def _only(base: nn.Module, trains: Callable[[str], bool]) -> nn.Module:
    head = _head_of(base)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.startswith(f"{head}.") or trains(name))
    return base


def _linear(base: nn.Module, _options: dict[str, Any]) -> nn.Module:
    return _only(base, lambda name: False)


def _bitfit(base: nn.Module, _options: dict[str, Any]) -> nn.Module:
    return _only(base, lambda name: name.rpartition(".")[2] == "bias")


def _full(base: nn.Module, _options: dict[str, Any]) -> nn.Module:
    return _only(base, lambda name: True)


def _head_of(base: nn.Module) -> str:
    try:
        return find_head(base, "default").name
    except ValueError as error:
        raise ValueError(
            f"`model` must have a linear head named classifier, score, head or fc, got {type(base).__name__}."
        ) from error


METHODS = {
    "trpts": Method(1e-2, _trpts),
    "lora": Method(3e-3, _lora),
    "linear": Method(1e-2, _linear),
    "bitfit": Method(3e-3, _bitfit),
    "full": Method(5e-4, _full),
}
