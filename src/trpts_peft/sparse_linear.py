"""A linear layer with a sparse, trainable update of its frozen weight, y = x (W + Δ)ᵀ + b (eqs. 12 to 14)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional import tokens_with_gradient

__all__ = ["added_linear", "compose_weight", "index_columns", "is_thin", "sparse_linear"]

# Measured on ViT-B/16, batch 4 and 8 (docs/benchmarks.md). Composing W + Δ twice costs the same whatever U; the thin
# products cost more with every used column, and are cheaper below this share.
_THIN_SHARE = 1 / 20
# From this share on, keeping the used columns saves no memory: several linears share one input, but no used columns.
_SHARED_INPUT_SHARE = 1 / 2
_GRADIENT_ENTRIES = 2**20  # of a weight gradient at a time; the largest block of rows that fits


def index_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factor columns (out, C) into `used` (U,), distinct and ascending, and `slots` (out, C): used[slots] = columns."""
    used, slots = torch.unique(columns, return_inverse=True)
    return used, slots


def compose_weight(weight: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """W + Δ in the dtype of `weight`: (out, in) plus `values` (out, C) at `columns` (out, C); equal columns add up."""
    return weight.scatter_add(1, columns, values.to(weight.dtype))


def is_thin(used: int, in_features: int) -> bool:
    """Whether x Δᵀ is a product of its own, over the `used` columns; else W + Δ is composed, whatever U at one cost.

    A rule on shapes alone, so that a run that is resumed computes what the interrupted one would have, to the bit.
    """
    return used <= _THIN_SHARE * in_features


def _thin_update(values: Tensor, slots: Tensor, used: int, dtype: torch.dtype) -> Tensor:
    """Δ over the used columns, (out, U)."""
    return values.new_zeros(values.shape[0], used).scatter_add_(1, slots, values).to(dtype)


def _used_columns(rows: Tensor, used: Tensor, ones: bool) -> Tensor:
    """(T, in) → (T, U), and a column of ones behind them: a product with it is a sum, at no cost of its own."""
    gathered = rows.index_select(1, used)
    return torch.cat([gathered, gathered.new_ones(len(rows), 1)], dim=1) if ones else gathered


class _SparseLinear(torch.autograd.Function):
    """Autograd would keep all of x and form a dense weight gradient; this keeps x[..., used] and forms (out, U)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        columns: Tensor,
        values: Tensor,
        used: Tensor,
        slots: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.thin = is_thin(len(used), x.shape[-1])
        trains = ctx.needs_input_grad[4]
        ctx.keeps_used = trains and len(used) <= _SHARED_INPUT_SHARE * x.shape[-1]
        x_used = _used_columns(rows, used, bias is not None) if ctx.thin or ctx.keeps_used else None
        kept = x_used if ctx.keeps_used else x if trains else None
        ctx.save_for_backward(kept, weight, columns, values, used, slots)
        if not ctx.thin:
            return F.linear(x, compose_weight(weight, columns, values).to(x.dtype), bias)
        assert x_used is not None
        delta = _thin_update(values, slots, len(used), x.dtype)
        if bias is not None:
            delta = torch.cat([delta, bias.unsqueeze(1)], dim=1)
        y = (x_used @ delta.t()).addmm_(rows, weight.t().to(x.dtype))
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, columns, values, used, slots = ctx.saved_tensors
        needs_x, _, needs_bias, _, needs_values, _, _ = ctx.needs_input_grad
        grad_x = grad_bias = grad_values = None
        tokens = _tokens_to_visit(grad_output)
        grads = grad_output if tokens is None else grad_output[:, tokens]
        grad_rows = grads.reshape(-1, grads.shape[-1])
        if needs_x and ctx.thin:
            delta = _thin_update(values, slots, len(used), grads.dtype)
            grad_x = (grad_rows @ weight.to(grads.dtype)).index_add_(1, used, grad_rows @ delta)
        elif needs_x:
            # Composed again, so that no dense copy of W is kept between forward and backward.
            grad_x = grad_rows @ compose_weight(weight, columns, values).to(grads.dtype)
        if needs_values:
            kept = kept.view(*grad_output.shape[:-1], kept.shape[-1])
            kept = kept if tokens is None else kept[:, tokens]
            rows = kept.reshape(-1, kept.shape[-1])
            if ctx.keeps_used:
                grad_used = rows.t() @ grad_rows
                grad_values = grad_used.t().gather(1, slots).to(values.dtype)
                grad_bias = grad_used[len(used)] if needs_bias else None
            else:
                grad_values = _gathered_gradient(rows, grad_rows, columns).to(values.dtype)
        if needs_bias and grad_bias is None:
            grad_bias = grad_rows.sum(dim=0)
        if grad_x is not None:
            grad_x = _all_tokens(grad_x, tokens, grad_output)
        return grad_x, None, grad_bias, None, grad_values, None, None


def _tokens_to_visit(grad_output: Tensor) -> Tensor | None:
    """Tokens that are not all zero, or None for all. To ask would make a GPU wait, and a compiled graph cannot."""
    if grad_output.dim() != 3 or grad_output.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return tokens_with_gradient(grad_output)


def _all_tokens(grad_rows: Tensor, tokens: Tensor | None, grad_output: Tensor) -> Tensor:
    """(T, in) in the shape of the layer's input; zero for the tokens that were not visited."""
    shape = (*grad_output.shape[:-1], grad_rows.shape[-1])
    if tokens is None:
        return grad_rows.view(shape)
    visited = grad_rows.view(shape[0], len(tokens), shape[-1])
    return grad_rows.new_zeros(shape).index_copy_(1, tokens, visited)


def _gathered_gradient(rows: Tensor, grad_rows: Tensor, columns: Tensor) -> Tensor:
    """The entries at `columns` (out, C) of Gᵀ X (out, in), of which only some rows exist at a time."""
    size = max(1, _GRADIENT_ENTRIES // rows.shape[1])
    parts = zip(grad_rows.split(size, dim=1), columns.split(size), strict=True)
    return torch.cat([(part.t() @ rows).gather(1, places) for part, places in parts])


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, values: Tensor, used: Tensor, slots: Tensor
) -> Tensor:
    """x (W + Δ)ᵀ + b with no gradient for W; keeps U of the in_features input columns for backward.

    Where U is more than half of in_features, all of x is kept instead, without a copy.

    Args:
        x: (..., in_features), in the dtype to compute in.
        weight: W, frozen, (out_features, in_features).
        bias: b, (out_features,) in the dtype of `x`, or None.
        columns: int64 (out_features, C); a column may occur twice in a row, then its values add up.
        values: (out_features, C), possibly of higher precision than `x`.
        used: int64 (U,), input columns that cover `columns`.
        slots: int64 (out_features, C), used[slots] = columns.

    Returns:
        (..., out_features) in the dtype of `x`.
    """
    y: Tensor = _SparseLinear.apply(x, weight, bias, columns, values, used, slots)  # type: ignore[no-untyped-call]
    return y


def added_linear(base_output: Tensor, x: Tensor, values: Tensor, used: Tensor, slots: Tensor) -> Tensor:
    """base_output + x Δᵀ as a thin product over the used columns, by plain autograd; see `sparse_linear`."""
    return base_output + F.linear(x.index_select(-1, used), _thin_update(values, slots, len(used), x.dtype))
