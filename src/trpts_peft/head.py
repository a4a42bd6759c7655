"""The classification head: find it, read its inputs, replace its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .compiled import has_compilers

__all__ = ["Head", "check_head", "find_head", "find_heads", "head_names"]

_NAMES = ("classifier", "score", "head", "fc")
_HOST: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults
_ROUNDING = 0.05  # of the largest entry: that of bfloat16, in which a model may compute its head, and then some


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

    def flaw(self, predict: Callable[[], Any]) -> str:
        """Why a linear in its place would not predict, or "": what a probe reaches would say nothing of the model.

        Args:
            predict: runs the model and gives what it returns, of which `logits` are looked at, where there are any.
        """
        calls: list[tuple[Tensor, Tensor]] = []
        with self.capture(calls):
            predict()
        if not calls:
            return "which the model does not call"
        seen, prediction = calls.pop()
        features = seen.to(copy=True, **_HOST)  # of a ViT it is a view of all tokens
        del seen
        weight = self.linear._parameters.get("weight")
        if self.trainable and (weight is None or weight.is_meta):  # a probe could not be written there
            return "whose weight is computed from others at each call, or offloaded"
        if self.trainable and not _are_close(prediction, _product(features, self.linear.weight, self.linear.bias)):
            return "which does more than to multiply and add"
        drawn = torch.randn(num_labels(self), features.shape[-1], generator=torch.Generator().manual_seed(0), **_HOST)
        drawn /= features.norm(dim=-1).mean().item() or 1.0
        with self.replaced(drawn, None):
            logits = getattr(predict(), "logits", None)
        if isinstance(logits, Tensor) and not _are_close(_normalized(logits), _normalized(_product(features, drawn))):
            return "whose output is not what the model returns"
        return ""

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


def find_heads(model: nn.Module, adapter_name: str) -> list[Head]:
    """What may be the head of a classification model, as far as its name tells, the likeliest first.

    Those that the adapter trains come first, then those further out, then those behind others.

    Raises:
        ValueError: there is none, or it is itself a target of the adapter.
    """
    own, idle = _copies(model, adapter_name)
    named = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in _NAMES and m not in idle]
    found = [head for name, module in reversed(named) if (head := _head_at(name, module, adapter_name, own))]
    if not found:
        compiled = ", in which parts are compiled: calibrate before `torch.compile`" if has_compilers(model) else ""
        raise ValueError(
            f"`probe_head` must be False for a model without a linear head named {', '.join(_NAMES)}, got True for "
            f"{type(model).__name__}{compiled}."
        )
    found.sort(key=lambda head: (not head.trainable, head.name.count(".")))
    if isinstance(found[0].module, BaseTunerLayer):
        raise ValueError(
            f"`probe_head` must be False where the head is a target of the adapter, got True with {found[0].name} "
            "among its targets: move it to `modules_to_save`, or put it in `exclude_modules`."
        )
    return [head for head in found if not isinstance(head.module, BaseTunerLayer)]


def find_head(model: nn.Module, adapter_name: str) -> Head:
    """The likeliest of `find_heads`."""
    return find_heads(model, adapter_name)[0]


def check_head(heads: Sequence[Head], predict: Callable[[], Any]) -> int:
    """The place of the first of these that predicts; a ValueError, about the likeliest, where none does."""
    flaws = []
    for place, head in enumerate(heads):
        flaws.append(head.flaw(predict))
        if not flaws[-1]:
            return place
    raise ValueError(
        f"`probe_head` must be False for a model whose logits do not come from a plain linear, got {heads[0].name}, "
        f"{flaws[0]}: train the head first, since the scores are measured through it as it is."
    )


def _head_at(name: str, module: nn.Module, adapter_name: str, own: set[nn.Module]) -> Head | None:
    if isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Linear):
        trains = adapter_name in module.modules_to_save
        own_linear = module.modules_to_save[adapter_name] if trains else module.original_module
        return Head(name, module, cast(nn.Linear, own_linear), trains)
    linear: Any = module.base_layer if isinstance(module, BaseTunerLayer) else module
    return Head(name, module, linear, linear in own) if isinstance(linear, nn.Linear) else None


def _product(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a plain linear gives, in 32 bits on the CPU."""
    return F.linear(_host(features), _host(weight), None if bias is None else _host(bias))


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _normalized(logits: Tensor) -> Tensor:
    """Equal for logits that a softmax does not tell apart."""
    return _host(logits).log_softmax(dim=-1)


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of 16 bits; what is not finite is somebody else's to refuse."""
    one, other = _host(one), _host(other)
    if not bool(one.isfinite().all() and other.isfinite().all()):
        return True
    return one.shape == other.shape and bool((one - other).abs().max() <= _ROUNDING * other.abs().max())


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
