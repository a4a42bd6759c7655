"""Find the layers of adapters in a model, and act on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import nn

from .tuner_layer import TRPTSLayer

__all__ = ["Found", "base_of", "find_modules", "is_offloaded", "on_each", "tuner_layers"]


def base_of(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, or the model itself; PEFT's own way stops where the active adapter was deleted."""
    inner = model.base_model if isinstance(model, PeftModel) else model
    return inner.model if isinstance(inner, BaseTuner) else inner


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers of PEFT's methods, in the order of the modules."""
    return find_modules(model, (BaseTunerLayer,))


def find_modules(module: nn.Module, kinds: tuple[type, ...]) -> list[Any]:
    """All modules of these kinds; what lies within those of TR-PTS, the larger part of all modules, is not visited."""
    found: list[Any] = []
    seen: set[nn.Module] = set()
    kinds_of: dict[Any, tuple[bool, bool]] = {}  # PEFT's layers are abstract classes, which are slow to ask

    def visit(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is None or child in seen:
                continue
            seen.add(child)
            kind = type(child)
            if kind not in kinds_of:
                kinds_of[kind] = issubclass(kind, kinds), issubclass(kind, TRPTSLayer)
            is_one, is_ours = kinds_of[kind]
            if is_one:
                found.append(child)
            if child._modules and not is_ours:
                visit(child)

    visit(module)
    return found


class Found:
    """Stands for a model where PEFT would walk through all of its modules for the few that are listed."""

    def __init__(self, modules: list[Any]) -> None:
        self._found = modules

    def modules(self) -> list[Any]:
        return self._found


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate has moved the weights of an adapted layer away, until it is called."""
    base = layer._modules.get("base_layer")
    return base is not None and "_hf_hook" in vars(base)


def on_each(layers: Iterable[Any], act: Callable[[Any], None]) -> None:
    """What accelerate has moved away is fetched; for others not even asked, since that looks through all submodules."""
    for layer in layers:
        if is_offloaded(layer):
            with onload_layer(layer):
                act(layer)
        else:
            act(layer)
