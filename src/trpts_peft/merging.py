"""What merging writes to a base layer, and what it has overwritten there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .sparse_linear import converted

__all__ = ["Overwritten", "add_at", "base_parameter", "write_at"]


class Overwritten(NamedTuple):
    """What `merge` has overwritten: where among all entries of the weight, those entries, and a bias that trains."""

    places: Tensor
    entries: Tensor
    bias: Tensor | None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Overwritten:
        return Overwritten(fn(self.places), fn(self.entries), None if self.bias is None else fn(self.bias))

    def beside(self, weight: Tensor) -> Overwritten:
        """On the device of a weight, which accelerate moves past every method of a module."""
        return self if self.places.device == weight.device else self.apply(lambda tensor: tensor.to(weight.device))


def base_parameter(base: nn.Module, name: str) -> nn.Parameter:
    """A weight or bias of the base layer to write to, past the slow lookup of nn.Module unless a wrapper has it.

    Raises:
        ValueError: it has no entries here.
        TypeError: it is computed from others at each call.
    """
    parameter = base._parameters.get(name)
    if parameter is None:
        parameter = getattr(base, name)
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(
                f"`model` must hold the weights that merging writes to, got a {name} that is computed from others at "
                "each call: remove the parametrization first."
            )
    if parameter.is_meta:
        raise ValueError(
            f"`model` must hold the weights that merging writes to, got a {name} without entries, on the meta device "
            "or offloaded with all of its adapted linear: merge before it is offloaded, or in a model loaded anew."
        )
    return parameter


def add_at(weight: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    """Add updates to some entries of a weight, and give the entries as they were.

    Args:
        weight: of any shape, changed in place.
        places: int64 (N,), where the entries lie among all, row after row; each once.
        updates: of N entries, rounded to the dtype of `weight` first.

    Returns:
        (N,), the entries before.
    """
    entries = weight.flatten()  # those of the weight itself, unless it is not contiguous
    overwritten, updates = entries.index_select(0, places), converted(updates, weight.dtype).flatten()
    if weight.device.type == "cpu":
        entries.index_add_(0, places, updates)
    else:  # a GPU that adds in 16 bits may write to the entry beside, too
        entries.index_copy_(0, places, overwritten + updates)
    _put_back(weight, entries)
    return overwritten


def write_at(weight: Tensor, places: Tensor, new: Tensor) -> None:
    """Write entries (N,) to those places of a weight: what `add_at` gave undoes it, to the bit."""
    entries = weight.flatten()
    if weight.device.type == "cpu":  # its memory answers many reads at a time, writes one after the other
        entries.index_select(0, places)
    entries.index_copy_(0, places, new)
    _put_back(weight, entries)


def _put_back(weight: Tensor, entries: Tensor) -> None:
    """`flatten` had to copy the entries of a weight that is not contiguous."""
    if not weight.is_contiguous():
        weight.copy_(entries.view_as(weight))
