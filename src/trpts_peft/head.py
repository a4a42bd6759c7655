"""The classification head: find it, read its inputs, replace its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

__all__ = ["Head", "find_head", "head_names"]

_NAMES = ("classifier", "score", "head", "fc")


@dataclass(frozen=True)
class Head:
    """The linear head of a classifier.

    Attributes:
        name: its name in the model.
        module: the module that the model calls, a wrapper of PEFT's or the linear itself.
        linear: the linear that an adapter trains, where it has one (`modules_to_save`); else the base model's own.
        trainable: whether `linear` is the adapter's copy.
    """

    name: str
    module: nn.Module
    linear: nn.Linear
    trainable: bool

    @contextmanager
    def capture(self, inputs: list[Tensor]) -> Iterator[None]:
        """Within, every forward pass appends the head's input (B, features) to `inputs`."""

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0].detach())

        handle = self.module.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def replaced(self, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
        """Within, the model predicts with this head; the parameters of its own stay as they are."""

        def predict(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            x = args[0]
            return F.linear(x, weight.to(x), None if bias is None else bias.to(x))

        handle = self.module.register_forward_hook(predict)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor) -> None:
        """Write a fitted head into `linear`, whose gradients were those of another."""
        self.linear.weight.copy_(weight)
        if self.linear.bias is not None:
            self.linear.bias.copy_(bias)
        self.linear.zero_grad()


def find_head(model: nn.Module, adapter_name: str) -> Head:
    """The head of a classification model, as far as its name tells: of several the outermost, of those the last.

    Raises:
        ValueError: there is none, or it is itself a target of the adapter.
    """
    own, idle = _copies(model, adapter_name)
    named = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in _NAMES and m not in idle]
    named.reverse()
    for name, module in sorted(named, key=lambda item: item[0].count(".")):
        if isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Linear):
            trains = adapter_name in module.modules_to_save
            linear = module.modules_to_save[adapter_name] if trains else module.original_module
            return Head(name, module, cast(nn.Linear, linear), trains)
        if isinstance(module, nn.Linear):
            return Head(name, module, module, module in own)
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            raise ValueError(
                f"`probe_head` must be False where the head is a target of the adapter, got True with {name} targeted: "
                f"move it to `modules_to_save`, or put it in `exclude_modules`."
            )
    raise ValueError(
        f"`probe_head` must be False for a model without a linear head named {', '.join(_NAMES)}, got True for "
        f"{type(model).__name__}."
    )


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters of whatever bears the name of a head, however deep."""
    return tuple(f"{name}." for name, _ in model.named_modules() if name.rpartition(".")[2] in _NAMES)


def _copies(model: nn.Module, adapter_name: str) -> tuple[set[nn.Module], set[nn.Module]]:
    """What lies in the adapter's own copies of `modules_to_save`, and in modules that it does not call beside those.

    A module that is trained whole may hold the head, as timm's do.
    """
    own: set[nn.Module] = set()
    idle: set[nn.Module] = set()
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for name, copy in wrapper.modules_to_save.items():
            (own if name == adapter_name else idle).update(copy.modules())
        if adapter_name in wrapper.modules_to_save:
            idle.update(wrapper.original_module.modules())
    return own, idle


def num_labels(head: Head) -> int:
    """Rows of the head."""
    return cast(int, cast(Any, head.linear).out_features)
