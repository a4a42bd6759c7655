"""The classification head: find it, read its inputs, replace its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
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
    def capture(self, calls: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Within, every forward pass appends the head's input (B, features) and output (B, num_labels) to `calls`."""

        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((args[0].detach(), output.detach()))

        handle = self.module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def check_prediction(self, features: Tensor, prediction: Tensor, outputs: Any) -> None:
        """Refuse a head in whose place another linear would not predict: a probe there would say nothing of the model.

        Args:
            features: its input (B, features).
            prediction: its output.
            outputs: what the model returned; looked at if a tensor, or if there are `logits`.

        Raises:
            ValueError: its weight is computed at each call, it is no plain linear, or what it gives are not the logits.
        """
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if "weight" not in self.linear._parameters:
            got = "whose weight is computed from others at each call"
        elif not _are_close(prediction, F.linear(features, self.linear.weight, self.linear.bias)):
            got = "which does more than to multiply and add"
        elif isinstance(logits, Tensor) and not _are_close(prediction, logits):
            got = "whose output is not what the model returns"
        else:
            return
        raise ValueError(
            f"`probe_head` must be False for a model whose logits do not come from a plain linear, got {self.name}, "
            f"{got}: train the head first, since the scores are measured through it as it is."
        )

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
    """The head of a classification model, as far as its name tells.

    Of several it is one that the adapter trains, of those the outermost, and of those the last.

    Raises:
        ValueError: there is none, or it is itself a target of the adapter.
    """
    own, idle = _copies(model, adapter_name)
    named = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in _NAMES and m not in idle]
    found = [head for name, module in reversed(named) if (head := _head_at(name, module, adapter_name, own))]
    if not found:
        raise ValueError(
            f"`probe_head` must be False for a model without a linear head named {', '.join(_NAMES)}, got True for "
            f"{type(model).__name__}."
        )
    head = min(found, key=lambda head: (not head.trainable, head.name.count(".")))
    if isinstance(head.module, BaseTunerLayer):
        raise ValueError(
            f"`probe_head` must be False where the head is a target of the adapter, got True with {head.name} among "
            "its targets: move it to `modules_to_save`, or put it in `exclude_modules`."
        )
    return head


def _head_at(name: str, module: nn.Module, adapter_name: str, own: set[nn.Module]) -> Head | None:
    if isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Linear):
        trains = adapter_name in module.modules_to_save
        own_linear = module.modules_to_save[adapter_name] if trains else module.original_module
        return Head(name, module, cast(nn.Linear, own_linear), trains)
    linear: Any = module.base_layer if isinstance(module, BaseTunerLayer) else module
    return Head(name, module, linear, linear in own) if isinstance(linear, nn.Linear) else None


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding, which a model may do once more; what is not finite is somebody else's to refuse."""
    one, other = one.float(), other.float()
    if not bool(other.isfinite().all()):
        return True
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


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
