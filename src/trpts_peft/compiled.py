"""Take the compilers from around blocks, by which all that lies in them has other names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn

__all__ = ["COMPILER", "without_compilers"]

COMPILER = "_orig_mod."  # in the names of what lies in a block that `torch.compile(block)` has wrapped


@contextmanager
def without_compilers(model: nn.Module) -> Iterator[None]:
    """Within, a block that `torch.compile(block)` has wrapped stands in its own place, and adapters can be put into it.

    A linear that is wrapped itself stays so: it cannot be adapted, which whoever meets it says.
    """
    wrapped: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None
        and is_compiled_module(child)
        and not isinstance(child.get_submodule("_orig_mod"), nn.Linear)
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child._orig_mod
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            if parent._modules.get(name) is child._orig_mod:  # else something was put around it that has to stay
                parent._modules[name] = child
