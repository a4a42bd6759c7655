"""An accelerator made of CPU memory: it refuses what lies elsewhere, and counts how often the CPU has to wait for it.

`import pretend_accelerator` gives torch the device `pretend`. A tensor there wraps one on the CPU, whose kernels do the
computing; the rules are those of a GPU. Errors in backward end the process, so run it in one of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["DEVICE", "refuse_float64", "waits", "wrapped"]

_MOVES = ("aten::copy_", "aten::_to_copy")
_ANSWERS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::bincount", "aten::equal")

waits: Counter[str] = Counter()  # {operator: times that the CPU had to wait for an answer}
refuse_float64 = False  # as Apple's GPUs do


class Pretended(torch.Tensor):
    """A tensor on the device, around one on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=DEVICE)
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        super().__init__()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Pretended) -> None:
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner.detach()

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, *args, **kwargs or {})


def wrapped(value: Any) -> Any:
    """What is on the CPU, on the device."""
    return Pretended(value) if isinstance(value, torch.Tensor) and not isinstance(value, Pretended) else value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "pretend":
        return torch.device("cpu")
    return value.inner if isinstance(value, Pretended) else value


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    name, tensors = operator._schema.name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = any(isinstance(tensor, Pretended) for tensor in tensors)
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
    if here and name not in _MOVES and any(tensor.dim() for tensor in elsewhere):
        raise RuntimeError(f"{name} got tensors on the CPU and on the accelerator")
    target = kwargs.get("device")
    to_cpu = target is not None and torch.device(target).type == "cpu"
    if name == "aten::copy_" and not isinstance(args[0], Pretended):
        waits[name] += 1
        return operator(args[0], args[1].inner, *args[2:])
    if here and (name in _ANSWERS or to_cpu):
        waits[name] += 1
    result = operator(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if to_cpu or (not here and target is None):
        return result
    result = tree_map(wrapped, result)
    if refuse_float64 and any(t.dtype == torch.float64 for t in tree_leaves(result) if isinstance(t, Pretended)):
        raise TypeError(f"{name} made float64, which the accelerator does not have")
    return return_and_correct_aliasing(operator, args, kwargs, result) if here else result


_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda operator, *args, **kwargs: _run(operator, *args, **kwargs), "PrivateUse1")
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
_on_cpu = torch.tensor


def _tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """`torch.tensor`, whose own way to such a device does not come by here."""
    made = _on_cpu(*args, device=None if torch.device(device or "cpu").type == "pretend" else device, **kwargs)
    return wrapped(made) if torch.device(device or "cpu").type == "pretend" else made


torch.tensor = _tensor
