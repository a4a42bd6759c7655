"""The adapted linear layer."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import functional
from .merging import Overwritten, add_at, base_parameter, write_at
from .sparse_linear import (
    add_update_,
    added_linear,
    adds_faster,
    compose_weight,
    converted,
    digest,
    flat_places,
    index_columns,
    sparse_linear,
)
from .tuner_layer import TRPTSLayer, integers_stay, is_unchanged, version

__all__ = ["TRPTSLinear"]

_FINGERPRINT_SIZE = 64
_GOLDEN = 2654435769  # 2³² over the golden ratio


def _refresh_loaded_columns(layer: nn.Module, _incompatible_keys: object) -> None:
    """Bring what follows from the columns up to date after any `load_state_dict`."""
    assert isinstance(layer, TRPTSLinear)
    for adapter_name in layer.trpts_columns:
        layer.refresh(adapter_name)


def _parameter(module: nn.Module, name: str) -> Any:
    """As `getattr`, past the slow lookup of nn.Module unless something stands in the parameter's place."""
    try:
        parameter = module._parameters[name]  # not by `get`: DeepSpeed's dict gathers what is asked for as an item
    except KeyError:
        parameter = None
    return getattr(module, name) if parameter is None else parameter


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in vars(module)  # accelerate's offloading, which fetches the weight in the layer's own forward
    )


def _has_to_be_called(base: nn.Module, weight: Tensor) -> bool:
    """Whether the base layer does more than to multiply by a frozen weight; the update is added to its output then."""
    return type(base) is not nn.Linear or weight.requires_grad or _has_hooks(base)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast would convert the input of a linear; it leaves float64 alone, and there is none for meta."""
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _refill(parameter: nn.Parameter, entries: Tensor) -> None:
    """Give a parameter other entries, whatever their shape.

    An output that is still held keeps autograd's notion of the shape alive, which only another dtype dispels.
    """
    other = torch.bfloat16 if parameter.dtype == torch.float32 else torch.float32  # Apple's GPUs have no float64
    parameter.data = entries.new_empty(0, dtype=other)
    parameter.data, parameter.grad = entries, None


class TRPTSLinear(nn.Module, TRPTSLayer):
    """A frozen linear layer with the sparse updates of its adapters, y = x (W + Δ)ᵀ + b + Δb (eqs. 12 to 14).

    Per adapter: `trpts_columns` int64 (out_features, C), `trpts_values` (out_features, C), `trpts_bias`
    (out_features,) where the base has a bias and the config trains it, and `trpts_fingerprint`, up to 64 entries of
    the base weight. `trpts_used` and `trpts_slots` follow from the columns.

    While hooks sit on the base layer, the base layer itself is called and the update is added to its output; without
    hooks the two weights are added first, which is faster.
    """

    adapter_layer_names: tuple[str, ...] = ("trpts_values", "trpts_bias")
    other_param_names: tuple[str, ...] = (
        "trpts_columns",
        "trpts_fingerprint",
        "trpts_used",
        "trpts_slots",
    )

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.trpts_values = nn.ParameterDict()
        self.trpts_bias = nn.ParameterDict()
        self.trpts_columns = BufferDict(persistent=True)
        self.trpts_fingerprint = BufferDict(persistent=True)
        self.trpts_used = BufferDict(persistent=False)
        self.trpts_slots = BufferDict(persistent=False)
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        # Digests of the columns of adapters that were injected, but neither calibrated nor loaded since.
        self.fresh: dict[str, str] = {}
        # No buffers: DDP, for one, wants the same ones in every process, merged there or not.
        self._overwritten: dict[str, Overwritten] = {}  # by adapters that are merged
        # The columns that `trpts_used` and `trpts_slots` follow from, and their version at that time.
        self._derived_from: dict[str, tuple[Tensor, int]] = {}
        # The same of the columns merged last, and their places, for the next merge.
        self._known_places: dict[str, tuple[Tensor, int, Tensor]] = {}
        self.register_load_state_dict_post_hook(_refresh_loaded_columns)  # type: ignore[no-untyped-call]

    # ---- state of one adapter ----

    def update_layer(
        self,
        adapter_name: str,
        columns: Tensor,
        *,
        train_bias: bool,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Give the adapter these columns (out_features, C), with an update of zero (or, for tests, a random one)."""
        start = torch.zeros if init_weights else torch.randn
        values = start(columns.shape, dtype=torch.float32)
        self.trpts_columns[adapter_name] = columns
        self.trpts_values[adapter_name] = nn.Parameter(values)
        if train_bias and self.base_layer.bias is not None:
            self.trpts_bias[adapter_name] = nn.Parameter(start(self.out_features, dtype=torch.float32))
        self.trpts_fingerprint[adapter_name] = self.base_fingerprint()
        super()._move_adapter_to_device_of_base_layer(adapter_name)  # and to its dtype
        self.refresh(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def replace_columns(self, adapter_name: str, columns: Tensor, values: Tensor | None = None) -> None:
        """Exchange an adapter's columns; its values start from zero unless given, its bias from zero.

        The parameters stay the same objects, so that an optimizer that was made before trains what is there now.
        """
        old = self.trpts_values[adapter_name]
        new = old.data.new_zeros(columns.shape) if values is None else values.detach().to(old)
        self.trpts_columns[adapter_name] = columns.to(old.device)
        _refill(old, new)
        if adapter_name in self.trpts_bias:
            _refill(self.trpts_bias[adapter_name], torch.zeros_like(self.trpts_bias[adapter_name].data))
        self.trpts_fingerprint[adapter_name] = self.base_fingerprint()
        self.refresh(adapter_name)
        self.fresh.pop(adapter_name, None)

    def refresh(self, adapter_name: str) -> None:
        """Derive `trpts_used` and `trpts_slots` from the columns."""
        columns = self.trpts_columns[adapter_name]
        with torch.inference_mode(False):  # backward cannot keep what was made in inference mode
            used, slots = (columns, columns) if columns.is_meta else index_columns(columns)
        self.trpts_used[adapter_name], self.trpts_slots[adapter_name] = used, slots
        self._derived_from[adapter_name] = columns, version(columns)

    def train(self, mode: bool = True) -> TRPTSLinear:
        """As of any module; refreshes what a loader has left behind that exchanged columns past `load_state_dict`.

        accelerate's `load_checkpoint_in_model` is one. Not in the forward pass: there it would meet compilers, traces,
        functional calls and replicas.
        """
        if not torch.compiler.is_compiling():
            for name, columns in self.trpts_columns.items():
                there = type(columns) is Tensor and not columns.is_meta  # and not offloaded, nor standing for others
                if there and not is_unchanged(columns, self._derived_from.get(name)):
                    self.refresh(name)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> TRPTSLinear:
        """As of any module; what follows from each other still does, and the tensors before are let go."""
        current = [n for n, columns in self.trpts_columns.items() if is_unchanged(columns, self._derived_from.get(n))]
        self._known_places.clear()
        fn = integers_stay(fn)
        self._overwritten = {name: old.apply(fn) for name, old in self._overwritten.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._derived_from = {n: (self.trpts_columns[n], version(self.trpts_columns[n])) for n in current}
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy derives anew: its tensors count their writes anew, so it could not tell whether they were changed."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_derived_from": {}, "_known_places": {}}

    def _derive_places(self, adapter_name: str) -> Tensor:
        """Where the entries at the columns lie among all of the weight, from the last time if the columns are those.

        A loader may exchange the columns, or write to them, past every method of this class.
        """
        columns: Tensor = cast(Any, self._modules["trpts_columns"])._buffers[adapter_name]
        known = self._known_places.get(adapter_name)
        if known is not None and is_unchanged(columns, known):
            return known[2]
        places = flat_places(columns, self.in_features)
        self._known_places[adapter_name] = columns, version(columns), places
        return places

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters; they alone train, or, with `inference_mode`, none does."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        modules: dict[str, Any] = cast(dict[str, Any], self._modules)  # past the slow lookup of nn.Module
        for part in ("trpts_values", "trpts_bias"):
            for name, parameter in modules[part]._parameters.items():
                trains = name in names and not inference_mode
                if parameter.requires_grad != trains and parameter.is_leaf:  # FSDP's may be no leaves
                    parameter.requires_grad_(trains)
        vars(self)["_active_adapter"] = names  # nn.Module would ask whether it is a parameter, a module or a buffer

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget all that belongs to the adapter; `unmerge` still puts back what it has overwritten if it is merged."""
        super().delete_adapter(adapter_name)
        self._known_places.pop(adapter_name, None)
        self._derived_from.pop(adapter_name, None)
        self.fresh.pop(adapter_name, None)

    def expect_file(self, adapter_name: str) -> None:
        """Put values that no file holds where a loader has to put the file's: what it leaves out is noticed."""
        self.trpts_columns[adapter_name] = torch.full_like(self.trpts_columns[adapter_name], -1)
        self.fresh[adapter_name] = digest(self.trpts_columns[adapter_name])
        self.trpts_fingerprint[adapter_name] = torch.full_like(self.trpts_fingerprint[adapter_name], float("nan"))

    def expect_no_file(self, adapter_name: str) -> None:
        """Take `expect_file` back, unless it was answered: the adapter starts from the largest weights."""
        if int(self.trpts_columns[adapter_name].min()) >= 0:
            return
        count = self.trpts_columns[adapter_name].shape[1]
        self.trpts_columns[adapter_name] = self.magnitude_columns(count)
        self.fresh[adapter_name] = digest(self.trpts_columns[adapter_name])
        self.trpts_fingerprint[adapter_name] = self.base_fingerprint()
        self.refresh(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters; disabling unmerges at once, as it does in the token selection."""
        if not enabled and self.merged:
            with onload_layer(self):
                self.unmerge()
        super().enable_adapters(enabled)

    def trained_parts(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's values, and its bias where it has one."""
        return [part[adapter_name] for part in (self.trpts_values, self.trpts_bias) if adapter_name in part]

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the adapter changes the layer, as far as a zero start tells."""
        return any(bool(part.detach().any()) for part in self.trained_parts(adapter_name) if not part.is_meta)

    def is_chosen(self, adapter_name: str) -> bool:
        """Whether calibration or a file has given the adapter its columns; a config alone gives their number only."""
        injected = self.fresh.get(adapter_name)
        if injected is None:  # as of all that train, which are asked in each step
            return True
        now = digest(self.trpts_columns[adapter_name])
        return not now or now != injected

    def magnitude_columns(self, count: int) -> Tensor:
        """The `count` inputs of largest |W| of each neuron: the choice before there is any data."""
        weight = self.unmerged_weight()
        if weight.is_meta:
            return torch.empty(self.out_features, count, dtype=torch.int64, device="meta")
        return functional.top_connections(weight.float().abs(), count)

    def unmerged_weight(self) -> Tensor:
        """The base weight (out_features, in_features) as it is without any merged adapter."""
        weight = self.base_layer.weight.detach()
        for name in reversed(self.merged_adapters):
            old = self._overwritten[name].beside(weight)
            weight = weight.flatten().scatter(0, old.places, old.entries).view_as(weight)
        return weight

    def base_fingerprint(self) -> Tensor:
        """Up to 64 entries of the unmerged base weight, float32: enough to tell one base from another.

        The places are those of multiples of the golden ratio, which fall into step with neither rows nor columns.
        """
        weight = self.unmerged_weight()
        entries = (weight.full_tensor() if isinstance(weight, DTensor) else weight).reshape(-1)
        turns = torch.arange(min(_FINGERPRINT_SIZE, entries.numel()), device=entries.device) * _GOLDEN % 2**32
        return entries[turns * entries.numel() // 2**32].float()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move what a loader brought, as it is: PEFT's would round it to the dtype of the base, and let it train."""
        if adapter_name not in self.trpts_values:
            return
        target: torch.device = self.base_layer.weight.device if device is None else device
        if target.type == "meta":  # a base whose weights are yet to come
            return
        for parameter in self.trained_parts(adapter_name):
            parameter.data = parameter.data.to(target)
        for part in (self.trpts_columns, self.trpts_fingerprint, self.trpts_used, self.trpts_slots):
            part[adapter_name] = part[adapter_name].to(target)

    # ---- forward ----

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base_forward(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names)
        values: Any = self._modules["trpts_values"]
        names = [] if self.merged_adapters else [name for name in self.active_adapters if name in values]
        return self._adapted_forward(x, names) if names else self._base_forward(x, *args, **kwargs)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _adapted_forward(self, x: Tensor, names: list[str]) -> Tensor:
        base: Any = self._modules["base_layer"]
        weight = _parameter(base, "weight")
        if _has_to_be_called(base, weight):
            return self._add_updates(self._base_forward(x), x, names)
        (columns, values, used, slots), bias_update = self._update(names), self._bias_update(names)
        if _autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias, distinct = _parameter(base, "bias"), len(names) == 1
        return sparse_linear(x, weight, bias, columns, values, used, slots, bias_update, distinct=distinct)

    def _add_updates(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """y + x Δᵀ + Δb, where y is what the base layer makes of x."""
        (_, values, used, slots), bias_update = self._update(names), self._bias_update(names)
        y = added_linear(y, x, values, used, slots)
        return y if bias_update is None else y + bias_update.to(y.dtype)

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        rows: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(adapter_names):
            rows[name if name in self.trpts_values else ""].append(row)
        if len(rows) <= 1:
            return self._own_forward(x, *rows)
        called = _has_to_be_called(self.base_layer, self.base_layer.weight)
        if called or all(adds_faster(x, len(own), len(self.trpts_used[name])) for name, own in rows.items() if name):
            y = self._base_forward(x)  # once, with all samples
            y = y.clone(memory_format=torch.contiguous_format) if called else y.contiguous()  # a hook may hold it
            for name, own in rows.items():
                if name:
                    (_, values, used, slots), bias_update = self._update([name]), self._bias_update([name])
                    add_update_(y, x, own, values, used, slots, bias_update)
            return y
        parts = {name: self._own_forward(x[own], name) for name, own in rows.items()}
        first = next(iter(parts.values()))
        y = first.new_empty(len(x), *first.shape[1:])
        for name, part in parts.items():
            y[rows[name]] = part
        return y

    def _own_forward(self, x: Tensor, name: str = "") -> Tensor:
        return self._adapted_forward(x, [name]) if name else self._base_forward(x)

    def _update(self, names: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Columns, values, used columns and slots of all the named adapters side by side: their updates add up."""
        if len(names) == 1:
            parts: Any = self._modules  # past the slow lookup of nn.Module; only parameters are put elsewhere
            (name,) = names
            return (
                parts["trpts_columns"]._buffers[name],
                _parameter(parts["trpts_values"], name),
                parts["trpts_used"]._buffers[name],
                parts["trpts_slots"]._buffers[name],
            )
        offset, shifted = 0, []
        for name in names:
            shifted.append(self.trpts_slots[name] + offset)
            offset += self.trpts_used[name].shape[0]
        columns = torch.cat([self.trpts_columns[name] for name in names], dim=1)
        values = torch.cat([self.trpts_values[name] for name in names], dim=1)
        used = torch.cat([self.trpts_used[name] for name in names])
        return columns, values, used, torch.cat(shifted, dim=1)

    def _bias_update(self, names: list[str]) -> Tensor | None:
        biases: Any = self._modules["trpts_bias"]
        updates = [_parameter(biases, name) for name in names if name in biases]
        return None if not updates else updates[0] if len(updates) == 1 else torch.stack(updates).sum(dim=0)

    # ---- merging ----

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the updates into the base weight and bias; the entries overwritten are kept for `unmerge`.

        Args:
            safe_merge: check the new entries before any is written.
            adapter_names: the adapters to merge; None: the active ones.

        Raises:
            ValueError: `safe_merge` found an entry that is not finite, a column is outside of the weight, or the weight
                or bias has no entries here.
            TypeError: the weight or bias is computed from others at each call.
        """
        parts: dict[str, Any] = cast(dict[str, Any], self._modules)  # past the slow lookup of nn.Module
        base, all_values, biases = (
            parts["base_layer"],
            parts["trpts_values"]._parameters,
            parts["trpts_bias"]._parameters,
        )
        if adapter_names is None and not self.merged_adapters:  # PEFT's check would take its time to leave none out
            adapter_names = self.active_adapters
        else:
            adapter_names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in dict.fromkeys(adapter_names) if name in all_values]
        if safe_merge:
            self.check_merge(names)
        weight = base_parameter(base, "weight").data
        for name in names:
            places, bias = self._derive_places(name), base_parameter(base, "bias").data if name in biases else None
            entries = add_at(weight, places, all_values[name].data)
            self._overwritten[name] = Overwritten(places, entries, None if bias is None else bias.clone())
            if bias is not None:
                bias.add_(biases[name].data)  # rounded to the dtype of the base's once, as in `forward`
            self.merged_adapters.append(name)

    def check_merge(self, adapter_names: list[str]) -> None:
        """Refuse to merge adapters, one after the other, that would leave entries that are not finite.

        Raises:
            ValueError: an entry would not be finite, or a column is outside of the weight.
        """
        base: Any = self.base_layer
        weight, bias = base.weight.data, base.bias
        for name in [name for name in adapter_names if name in self.trpts_values]:
            self._derive_places(name)  # raises for columns outside of the weight, where `scatter` has words of its own
            weight = compose_weight(weight, self.trpts_columns[name], self.trpts_values[name].data, distinct=True)
            finite = bool(weight.gather(1, self.trpts_columns[name]).isfinite().all())
            if name in self.trpts_bias:
                bias = converted(bias.detach() + self.trpts_bias[name].data, bias.dtype)
                finite = finite and bool(bias.isfinite().all())
            if not finite:
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def unmerge(self) -> None:
        """Put back the entries that `merge` has overwritten, last merged first: exact to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = cast(nn.Module, self._modules["base_layer"])
        weight = base_parameter(base, "weight").data
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            old = self._overwritten[name].beside(weight)
            write_at(weight, old.places, old.entries)
            if old.bias is not None:
                base_parameter(base, "bias").data.copy_(old.bias)
            del self._overwritten[name]
            self.merged_adapters.pop()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Δ of one adapter as a dense (out_features, in_features) tensor, for conversion to other methods."""
        values: Tensor = self.trpts_values[adapter]
        return values.new_zeros(self.out_features, self.in_features).scatter(1, self.trpts_columns[adapter], values)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A low-rank update has no place for a bias, so only adapters that train none convert."""
        return adapter_name not in self.trpts_bias

    def extra_repr(self) -> str:
        counts = {name: columns.shape[1] for name, columns in self.trpts_columns.items()}
        return f"connections={counts}"
