"""Give a module another class, so that a call of it runs another `forward`."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

__all__ = ["become", "has_own_forward"]


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call of the module passes its class by: its `forward` was replaced or compiled."""
    return "forward" in vars(module) and not _kept_forwards(module)


def become(module: Any, kind: type[nn.Module]) -> None:
    """Give a module another class, and its forward to accelerate's hooks.

    A module with a forward of its own keeps its class, without which what that may call would fail.
    """
    if has_own_forward(module):
        return
    kept = _kept_forwards(module)
    module.__class__ = kind
    for name in kept:
        vars(module)[name] = MethodType(kind.forward, module)


def _kept_forwards(module: Any) -> list[str]:
    """Where accelerate keeps the forward of the module's class: under its hooks, and once they are gone in itself."""
    kept = {name: vars(module).get(name) for name in ("forward", "_old_forward")}
    return [name for name, forward in kept.items() if getattr(forward, "__func__", None) is type(module).forward]
