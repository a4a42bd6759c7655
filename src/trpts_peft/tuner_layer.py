"""What PEFT finds when it looks for the modules of a TR-PTS adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

__all__ = ["MODEL_PREFIX", "PREFIX", "TRPTSLayer", "integers_stay", "is_unchanged", "version"]

PREFIX = "trpts_"  # transformers' `delete_adapter` derives it from the name of the method
MODEL_PREFIX = "base_model.model."  # of names in a PeftModel and in files; none where an adapter was injected directly


class TRPTSLayer(BaseTunerLayer):
    """Common base of the adapted linears and of the token selection in a block.

    Both follow the adapter that is active, disabled, merged or deleted, and PEFT and transformers reach both by this
    class.
    """

    adapter_layer_names: tuple[str, ...] = ("trpts_values", "trpts_bias")


def integers_stay(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For `Module._apply`: as `fn`, but indices and counts keep their dtype, which `Module.type` would convert, too."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if tensor.is_floating_point() or moved.dtype == tensor.dtype else tensor.to(moved.device)

    return apply


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count, and are taken for changed each time."""
    return -1 if tensor.is_inference() else tensor._version


def is_unchanged(tensor: Tensor, known: tuple[Any, ...] | None) -> bool:
    """Whether it is the tensor that something was derived from, and had been written to as often as now."""
    return known is not None and known[0] is tensor and known[1] == version(tensor) >= 0
