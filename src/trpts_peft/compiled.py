"""Take the compilers from around blocks, by which all that lies in them has other names, or have them stand aside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

# fmt: off
__all__ = [
    "COMPILER", "compilers_unnamed", "force_eager", "has_compilers", "without_compilers", "without_names_of_compilers",
]
# fmt: on

COMPILER = "_orig_mod."  # in the names of what lies in a block that `torch.compile(block)` has wrapped

_unnamed = ContextVar("compilers_unnamed", default=False)


class _Users:
    """Who has compiled code stand aside. torch keeps one stance for all threads, and each would restore another's."""

    lock = threading.RLock()  # of one thread: what is collected meanwhile may be such a context that was left open
    count = 0
    stance: Any = None  # the first, which knows what was before


@contextmanager
def force_eager() -> Iterator[None]:
    """Within, compiled code is left aside, in all threads: it does not heed hooks that came after it.

    Raises:
        RuntimeError: compiled code has called.
    """
    with _Users.lock:
        _Users.count += 1  # first: whoever is done from here on leaves the stance as it is
    try:
        with _Users.lock:
            stance = torch.compiler.set_stance("force_eager")  # also where it is so already, to be refused by torch
            _Users.stance = _Users.stance or stance
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if not _Users.count and _Users.stance is not None:
                _Users.stance.__exit__(None, None, None)
                _Users.stance = None


@contextmanager
def compilers_unnamed() -> Iterator[None]:
    """Within, the state dict of an adapter is got as a file holds it, which is of the model itself."""
    token = _unnamed.set(True)
    try:
        yield
    finally:
        _unnamed.reset(token)


def without_names_of_compilers(name: str) -> str:
    """The name of a tensor in a state dict that is got, as `compilers_unnamed` wants it."""
    return name.replace(COMPILER, "") if _unnamed.get() else name


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
