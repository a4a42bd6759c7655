"""A linear layer with a sparse, trainable update of its frozen weight, y = x (W + Δ)ᵀ + b (eqs. 12 to 14)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import tokens_with_gradient

# fmt: off
__all__ = [
    "add_update_", "added_linear", "adds_faster", "compose_weight", "converted", "digest", "flat_places",
    "index_columns", "keeps_used", "sparse_linear",
]
# fmt: on

# A rule of thumb: q, k and v share one input, but no used columns, so from some share on all of it takes less memory.
_WHOLE_INPUT_SHARE = 1 / 2
# Measured with ViT-B/16 on a CPU: a weight is composed in the time that it takes to multiply so many rows by it, and to
# take a batch apart and together takes this share of the product.
_ROWS_TO_COMPOSE, _SHARE_TO_PART = 48, 1 / 16
# Of a weight gradient at a time, where all of the input was kept: what a CPU's cache holds, and enough for a GPU.
_GRADIENT_ENTRIES, _GRADIENT_ENTRIES_OF_GPU = 2**18, 2**24


def index_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factor columns (out, C) into `used` (U,), distinct and ascending, and `slots` (out, C): used[slots] = columns."""
    used, slots = torch.unique(columns, return_inverse=True)
    return used, slots


def flat_places(columns: Tensor, in_features: int) -> Tensor:
    """Where the entries at columns (out, C) of a weight (out, in) lie among all, row after row: (out·C,).

    One long index is followed faster than a short one for each row.

    Raises:
        ValueError: a column is not one of 0 to in_features - 1; its place would be in another row.
    """
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= in_features:
        raise ValueError(
            f"The adapter's columns must be from 0 to {in_features - 1}, got {low} to {high}: load it anew."
        )
    rows = torch.arange(columns.shape[0], device=columns.device).unsqueeze(1)
    return (rows * in_features + columns).flatten()


def digest(columns: Tensor) -> str:
    """Tells one choice of columns from another, on any device; "" where they have no entries here."""
    if columns.is_meta or type(columns) is not Tensor:
        return ""
    return hashlib.blake2b(columns.cpu().contiguous().numpy().tobytes()).hexdigest()


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype; to ask first takes less time than a conversion that changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def compose_weight(
    weight: Tensor, columns: Tensor, values: Tensor, *, dtype: torch.dtype | None = None, distinct: bool = False
) -> Tensor:
    """W + Δ.

    Args:
        weight: W, (out, in).
        columns: int64 (out, C).
        values: (out, C), added in the dtype of W.
        dtype: what the sum is rounded to; None: the dtype of W.
        distinct: a promise that no row of `columns` holds a column twice; else the values of equal ones add up.

    Returns:
        (out, in), a new tensor.
    """
    dtype, values = dtype or weight.dtype, converted(values, weight.dtype)
    if dtype.itemsize >= 4 or not distinct or weight.device.type != "cpu":
        return converted(weight.scatter_add(1, columns, values), dtype)
    # To scatter into 16 bits takes a CPU as long as to copy W; and to round W + Δ is to copy a W of 32 bits twice.
    rows = torch.arange(columns.shape[0], device=columns.device).unsqueeze(1)
    entries = weight.gather(1, columns) + values
    return weight.to(dtype, copy=True).index_put_((rows, columns), converted(entries, dtype))


def keeps_used(used: int, in_features: int) -> bool:
    """Whether backward gets a copy of the input's `used` columns; else the input itself. A rule on shapes alone."""
    return used <= _WHOLE_INPUT_SHARE * in_features


def _composed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bias_update: Tensor | None,
    columns: Tensor,
    values: Tensor,
    distinct: bool,
) -> Tensor:
    given = [part for part in (bias, bias_update) if part is not None]
    total = converted(given[0] if len(given) == 1 else given[0] + given[1], x.dtype) if given else None
    return F.linear(x, compose_weight(weight, columns, values, dtype=x.dtype, distinct=distinct), total)


class _SparseLinear(torch.autograd.Function):
    """Autograd would keep all of x and form all of the weight gradient: here x[:, used] and (out, U) of it will do.

    What needs no node of its own is done inside: with small layers the time goes into nodes and calls. Only the shape
    of the output is given outside, for a view that comes out of a function cannot be changed in place. What is decided
    by shapes and modes comes from outside, too: inside, a compiler may know the shapes by symbols only. Gradients are
    converted to the dtypes of the inputs by autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bias_update: Tensor | None,
        columns: Tensor,
        values: Tensor,
        used: Tensor,
        slots: Tensor,
        keep: str | None,
        distinct: bool,
    ) -> Tensor:
        ctx.keep, ctx.shape, ctx.distinct = keep, x.shape, distinct
        rows = x.reshape(-1, x.shape[-1])
        kept = _used_inputs(rows, used) if keep == "used" else x if keep == "input" else None
        ctx.save_for_backward(kept, weight, columns, values, slots)
        return _composed_linear(rows, weight, bias, bias_update, columns, values, distinct)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        # Not by `once_differentiable`: under it `torch.autograd.grad` silently leaves out what goes through here.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "`create_graph` must be False where gradients pass a layer of TR-PTS, got True: it keeps a part of its "
                "input, which gives no second derivatives. Where they are needed, take another method."
            )
        kept, weight, columns, values, slots = ctx.saved_tensors
        needs_x, _, needs_bias, needs_update, _, needs_values, *_ = ctx.needs_input_grad
        grad_x = grad_sum = grad_values = None
        visited, count = _rows_to_visit(grad_rows, ctx.shape), grad_rows.shape[0]
        grad_rows = _visited(grad_rows, 0, visited)
        if needs_x:  # composed again, so that no dense copy of W is kept between forward and backward
            grad_x = grad_rows @ _composed_again(weight, columns, values, grad_rows.dtype, ctx.distinct)
            if visited is not None:
                grad_x = grad_x.new_zeros(count, grad_x.shape[1]).index_copy_(0, visited, grad_x)
            grad_x = grad_x.view(ctx.shape)
        if needs_values and ctx.keep == "used":
            grad_used = _visited(kept, 1, visited) @ grad_rows
            grad_values = grad_used.t().gather(1, slots)
            grad_sum = grad_used[-1] if _sums_by_product(grad_rows) else None
        elif needs_values:
            inputs = _visited(kept.reshape(-1, ctx.shape[-1]), 0, visited)
            grad_values = _gathered_gradient(inputs, grad_rows, columns)
        if grad_sum is None and (needs_bias or needs_update):
            grad_sum = grad_rows.sum(dim=0)
        grad_bias, grad_update = grad_sum if needs_bias else None, grad_sum if needs_update else None
        return grad_x, None, grad_bias, grad_update, None, grad_values, None, None, None, None


def _composed_again(weight: Tensor, columns: Tensor, values: Tensor, dtype: torch.dtype, distinct: bool) -> Tensor:
    """W + Δ in backward. A compiler would find the words of forward here once more, and keep what they gave."""
    if not torch.compiler.is_compiling():
        return compose_weight(weight, columns, values, dtype=dtype, distinct=distinct)
    rows = torch.arange(columns.shape[0], device=columns.device).unsqueeze(1)
    return converted(weight.index_put((rows, columns), converted(values, weight.dtype), accumulate=True), dtype)


def _sums_by_product(rows: Tensor) -> bool:
    """Whether a row of ones sums rows up beside a product, at no cost of its own: a GPU may round products."""
    return rows.device.type == "cpu"


def _used_inputs(rows: Tensor, used: Tensor) -> Tensor:
    """(U, N) of rows (N, in), on a CPU with a row of ones below.

    There products of 16 bits take a third less time if it lies in memory as it is multiplied. Those of 32 bits gain
    little, and row by row it is collected faster.
    """
    if not _sums_by_product(rows):
        return rows.index_select(1, used).t()
    if rows.element_size() < 4:
        return torch.cat([rows.t().index_select(0, used), rows.new_ones(1, rows.shape[0])])
    return torch.cat([rows.index_select(1, used), rows.new_ones(rows.shape[0], 1)], dim=1).t()


def _rows_to_visit(grad_rows: Tensor, shape: torch.Size) -> Tensor | None:
    """The rows of those tokens that have a gradient in some sample of an input (B, T, in), None for all rows.

    To ask would make a GPU wait, and a compiled graph cannot: there all rows are visited.
    """
    if len(shape) != 3 or grad_rows.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    visited = tokens_with_gradient(grad_rows.view(*shape[:2], grad_rows.shape[1]))
    if visited is None:
        return None
    first = torch.arange(0, grad_rows.shape[0], shape[1], device=grad_rows.device).unsqueeze(1)
    return (first + visited).flatten()


def _visited(tensor: Tensor, dim: int, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(dim, rows)


def _gathered_gradient(rows: Tensor, grad_rows: Tensor, columns: Tensor) -> Tensor:
    """The entries at `columns` (out, C) of Gᵀ X (out, in), of which only some rows exist at a time."""
    entries = _GRADIENT_ENTRIES if rows.device.type == "cpu" else _GRADIENT_ENTRIES_OF_GPU
    size = max(1, entries // rows.shape[1])
    parts = zip(grad_rows.split(size, dim=1), columns.split(size), strict=True)
    return torch.cat([(part.t() @ rows).gather(1, places) for part, places in parts])


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    values: Tensor,
    used: Tensor,
    slots: Tensor,
    bias_update: Tensor | None = None,
    *,
    distinct: bool = False,
) -> Tensor:
    """x (W + Δ)ᵀ + b + Δb with no gradient for W; keeps U of the in_features input columns for backward.

    Where U is more than half of in_features, all of x is kept instead, without a copy.
    On a CPU, backward leaves out the tokens of (B, T, in_features) whose gradient is zero in all samples.

    Args:
        x: (..., in_features), in the dtype to compute in.
        weight: W, frozen, (out_features, in_features).
        bias: b, (out_features,), or None.
        columns: int64 (out_features, C).
        values: (out_features, C), possibly of higher precision than `weight`, to which they are rounded, and the sum.
        used: int64 (U,), input columns that cover `columns`.
        slots: int64 (out_features, C), used[slots] = columns.
        bias_update: Δb, (out_features,), or None.
        distinct: a promise that no row of `columns` holds a column twice, which spares a CPU time in 16 bits; else the
            values of equal ones add up.

    Returns:
        (..., out_features) in the dtype of `x`.
    """
    if not torch.is_grad_enabled():  # a Function takes its time where nothing is kept; as `nn.Linear`, once merged
        return _composed_linear(x, weight, bias, bias_update, columns, values, distinct)
    keep = None
    if values.requires_grad:
        keep = "used" if keeps_used(used.shape[0], weight.shape[1]) else "input"
    y: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, bias_update, columns, values, used, slots, keep, distinct
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def added_linear(base_output: Tensor, x: Tensor, values: Tensor, used: Tensor, slots: Tensor) -> Tensor:
    """base_output + x Δᵀ as a thin product over the used columns, by plain autograd; see `sparse_linear`."""
    delta = _thin_update(values, used, slots)
    return base_output + F.linear(x.index_select(-1, used), delta.to(x.dtype))


def _thin_update(values: Tensor, used: Tensor, slots: Tensor) -> Tensor:
    """Δ (out, U), of the used columns alone."""
    return values.new_zeros(values.shape[0], used.shape[0]).scatter_add_(1, slots, values)


def adds_faster(x: Tensor, samples: int, used: int) -> bool:
    """Whether an update is added faster than its weight is composed, where adapters share a batch. A rule on shapes.

    Args:
        x: the batch, (B, ..., in_features).
        samples: how many of the B are the adapter's.
        used: U of the adapter.
    """
    rows = max(1, samples * math.prod(x.shape[1:-1]))
    return used <= (_SHARE_TO_PART + _ROWS_TO_COMPOSE / rows) * x.shape[-1]


def add_update_(
    y: Tensor,
    x: Tensor,
    samples: Sequence[int],
    values: Tensor,
    used: Tensor,
    slots: Tensor,
    bias_update: Tensor | None = None,
) -> None:
    """y[i] += x[i] Δᵀ + Δb for some samples i of a batch, as thin products over the used columns, by plain autograd.

    Args:
        y: (B, ..., out_features), contiguous; written to.
        x: (B, ..., in_features); multiplied in the dtype of `y`.
        samples: the indices i.
        values, used, slots, bias_update: as of `sparse_linear`.
    """
    delta = _thin_update(values, used, slots)
    if bias_update is not None:
        delta = torch.cat([delta, bias_update.to(delta.dtype).unsqueeze(1)], dim=1)
    factor = delta.to(y.dtype).t()

    def inputs(rows: Tensor) -> Tensor:
        collected = rows.index_select(1, used).to(y.dtype)
        ones = [] if bias_update is None else [collected.new_ones(collected.shape[0], 1)]
        return torch.cat([collected, *ones], dim=1)

    if x.dim() == 2:  # to multiply single rows, one by one, would take its time
        index = torch.tensor(samples, device=x.device)
        y.index_add_(0, index, inputs(x.index_select(0, index)) @ factor)
        return
    for sample in samples:  # where they lie: to collect their tokens, and to put them back, would copy them twice
        y[sample].view(-1, y.shape[-1]).addmm_(inputs(x[sample].reshape(-1, x.shape[-1])), factor)
