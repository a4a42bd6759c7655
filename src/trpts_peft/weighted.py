"""Weighted sums of adapters."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from .checkpoint import trained_parameters
from .config import TRPTSConfig
from .layer import TRPTSLinear
from .vit import adapter_selections, install_keep_rates
from .withdrawal import withdrawn_on_failure

__all__ = ["add_weighted_adapter", "sum_updates"]


def sum_updates(
    updates: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], in_features: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum of sparse updates as one sparse update.

    Args:
        updates: pairs of columns int64 (out, C_i) and values (out, C_i).
        weights: one factor each.
        in_features: the number of columns there are.

    Returns:
        columns int64 (out, C) and values (out, C): per row the union of columns; C is the longest union, and shorter
        rows are filled up with their lowest unused columns at value 0.
    """
    rows, device = updates[0][0].shape[0], updates[0][0].device
    total = torch.zeros(rows, in_features, dtype=torch.float32, device=device)
    touched = torch.zeros(rows, in_features, dtype=torch.bool, device=device)
    for (columns, values), weight in zip(updates, weights, strict=True):
        total.scatter_add_(1, columns, weight * values.detach().float())
        touched.scatter_(1, columns, True)
    count = int(touched.sum(dim=1).max())
    # Touched columns sort before the others, which keep their order: the lowest of them fill the row up.
    order = torch.sort((~touched).to(torch.uint8), dim=1, stable=True).indices
    columns = order[:, :count].sort(dim=1).values
    return columns, total.gather(1, columns)


def _check(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"`weights` must be one number per adapter, got {len(weights)} for {len(adapters)} adapters.")
    for weight in weights:
        if isinstance(weight, (bool, np.bool_)) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"`weights` must be finite numbers, got {weight!r}.")
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        known = list(tuner.peft_config)
        raise ValueError(f"`adapters` must name adapters of the model, got {unknown}: it has {known}.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"`adapter_name` must be new, got {adapter_name!r}: delete that adapter first.")
    for selection in adapter_selections(tuner.model).values():
        rates = {name: selection.own_rate(name) or 1.0 for name in adapters}
        if len(set(rates.values())) > 1:
            raise ValueError(
                f"`adapters` must select tokens alike, got in one block the rates {rates}: give all of them the same "
                "`keep_rate` and the same list as `token_layers`."
            )


def add_weighted_adapter(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Add Σ w_i Δ_i as a new, inactive adapter; biases and `modules_to_save` are combined alike, around the base.

    Args:
        tuner: the model's `TRPTSModel`.
        adapters: names of adapters that select tokens alike.
        weights: one factor per adapter.
        adapter_name: name of the new adapter.

    Raises:
        ValueError: an adapter does not exist, the new one does, the numbers of adapters and weights differ, or the
            adapters select tokens differently. Nothing is changed.
    """
    _check(tuner, adapters, weights, adapter_name)
    weights = [float(weight) for weight in weights]  # numpy's would widen what they are multiplied by
    configs = [cast(TRPTSConfig, tuner.peft_config[name]) for name in adapters]
    config = copy.deepcopy(configs[0])
    names = [name for name, m in tuner.model.named_modules() if isinstance(m, TRPTSLinear)]
    linears = {name: tuner.model.get_submodule(name) for name in names}
    used = {name: m for name, m in linears.items() if any(a in m.trpts_values for a in adapters)}
    sums = {name: _sum_of(layer, adapters, weights) for name, layer in used.items()}
    config.target_modules, config.exclude_modules = sorted(used), None
    config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = sorted({name for other in configs for name in other.modules_to_save or ()}) or None
    config.train_bias = any(other.train_bias for other in configs)
    config.unit_importance = None  # a sum was measured on no data
    config.connections = {name: columns.shape[1] for name, (columns, _) in sums.items()}
    rates = _rates_of(tuner, adapters)
    config.keep_rate = next(iter(rates.values()), config.keep_rate)
    in_32_bits = any(p.dtype.itemsize >= 4 for name in adapters for p in trained_parameters(tuner.model, name))
    with withdrawn_on_failure(tuner.model):
        tuner.peft_config[adapter_name] = config
        try:
            tuner.inject_adapter(tuner.model, adapter_name)
            if in_32_bits:
                tuner._cast_adapter_dtype(adapter_name)  # of a base in 16 bits
            _fill(tuner, adapters, weights, adapter_name, sums)
        except Exception:
            del tuner.peft_config[adapter_name]
            raise
        config.selected_token_layers = sorted(rates)
        install_keep_rates(tuner.model, adapter_name, rates)


def _rates_of(tuner: BaseTuner, adapters: Sequence[str]) -> dict[int, float]:
    """{block index: keep rate} of their token layers; those that keep all tokens at present are token layers, too."""
    own = {
        index: [rate for name in adapters if (rate := selection.own_rate(name)) is not None]
        for index, selection in adapter_selections(tuner.model).items()
    }
    return {index: rates[0] for index, rates in own.items() if rates}


def _fill(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    sums: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    for name, update in sums.items():
        layer: Any = tuner.model.get_submodule(name)
        layer.replace_columns(adapter_name, *update)
        _sum_biases(layer, adapters, weights, adapter_name)
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            _sum_modules(module, adapters, weights, adapter_name)


def _sum_of(layer: Any, adapters: Sequence[str], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.trpts_values]
    updates = [(layer.trpts_columns[name], layer.trpts_values[name]) for name, _ in present]
    return sum_updates(updates, [weight for _, weight in present], layer.in_features)


def _weighted_sum(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Σ w_i x_i in 32 bits at least: what is in 16 is rounded once, by who takes the sum."""
    return torch.stack([weight * _widened(tensor) for tensor, weight in terms]).sum(dim=0)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def _sum_biases(layer: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    present = [
        (layer.trpts_bias[name], weight)
        for name, weight in zip(adapters, weights, strict=True)
        if name in layer.trpts_bias
    ]
    if present:
        layer.trpts_bias[adapter_name].copy_(_weighted_sum(present))


@torch.no_grad()
def _sum_modules(
    wrapper: ModulesToSaveWrapper, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    originals = dict(wrapper.original_module.named_parameters())
    for key, target in wrapper.modules_to_save[adapter_name].named_parameters():
        present = [
            (wrapper.modules_to_save[name].get_parameter(key), weight)
            for name, weight in zip(adapters, weights, strict=True)
            if name in wrapper.modules_to_save
        ]
        original = _widened(originals[key])
        target.copy_(original + _weighted_sum([(_widened(part) - original, weight) for part, weight in present]))
