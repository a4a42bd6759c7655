"""A linear layer with a sparse, trainable update of its frozen weight, y = x (W + Δ)ᵀ + b (eqs. 12 to 14)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["added_linear", "compose_weight", "composed_linear", "index_columns"]


def index_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factor columns (out, C) into `used` (U,), distinct and ascending, and `slots` (out, C): used[slots] = columns."""
    used, slots = torch.unique(columns, return_inverse=True)
    return used, slots


def compose_weight(weight: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """W + Δ in the dtype of `weight`: (out, in) plus `values` (out, C) at `columns` (out, C); equal columns add up."""
    return weight.scatter_add(1, columns, values.to(weight.dtype))


class _ComposedLinear(torch.autograd.Function):
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
        x_used = x.index_select(-1, used) if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(x_used, weight, columns, values, slots)
        return F.linear(x, compose_weight(weight, columns, values).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x_used, weight, columns, values, slots = ctx.saved_tensors
        grad_x = grad_bias = grad_values = None
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[0]:
            # Composed again, so that no dense copy of W is kept between forward and backward.
            grad_x = grad_output @ compose_weight(weight, columns, values).to(grad_output.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(dim=0)
        if ctx.needs_input_grad[4]:
            grad_used = grad_rows.t() @ x_used.reshape(-1, x_used.shape[-1])
            grad_values = grad_used.gather(1, slots).to(values.dtype)
        return grad_x, None, grad_bias, None, grad_values, None, None


def composed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, values: Tensor, used: Tensor, slots: Tensor
) -> Tensor:
    """x (W + Δ)ᵀ + b with no gradient for W; keeps U of the in_features input columns for backward.

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
    y: Tensor = _ComposedLinear.apply(x, weight, bias, columns, values, used, slots)  # type: ignore[no-untyped-call]
    return y


def added_linear(base_output: Tensor, x: Tensor, values: Tensor, used: Tensor, slots: Tensor) -> Tensor:
    """base_output + x Δᵀ as a thin product over the used columns, by plain autograd; see `composed_linear`."""
    thin = values.new_zeros(values.shape[0], used.shape[0]).scatter_add(1, slots, values)
    return base_output + F.linear(x.index_select(-1, used), thin.to(x.dtype))
