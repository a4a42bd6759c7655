"""Take the compilers from around blocks, by which all that lies in them has other names, or have them stand aside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["COMPILER", "force_eager", "has_compilers", "without_compilers"]

COMPILER = "_orig_mod."  # in the names of what lies in a block that `torch.compile(block)` has wrapped


class _Users:
    """Who has compiled code stand aside. torch keeps one stance for all threads, and each would restore another's."""

    lock = threading.Lock()
    count = 0
    stance: Any = None


@contextmanager
def force_eager() -> Iterator[None]:
    """Within, compiled code is left aside, in all threads: it does not heed hooks that came after it.

    Raises:
        RuntimeError: compiled code has called.
    """
    with _Users.lock:
        if not _Users.count:
            _Users.stance = torch.compiler.set_stance("force_eager")
        _Users.count += 1
    try:
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if not _Users.count:
                _Users.stance.__exit__(None, None, None)


def has_compilers(model: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped some part of the model."""
    return any(is_compiled_module(module) for module in model.modules())


@contextmanager
def without_compilers(model: nn.Module) -> Iterator[None]:
    """Within, a block that `torch.compile(block)` has wrapped stands in its own place, and adapters can be put into it.

    A linear that is wrapped itself stays so, unless it is trained whole: it cannot be adapted, which whoever meets it
    says.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    trained_whole = {id(part) for wrapper in wrappers for part in wrapper.modules()}
    wrapped: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None
        and is_compiled_module(child)
        and (id(parent) in trained_whole or not isinstance(child.get_submodule("_orig_mod"), nn.Linear))
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child._orig_mod
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            if parent._modules.get(name) is child._orig_mod:  # else something was put around it that has to stay
                parent._modules[name] = child
