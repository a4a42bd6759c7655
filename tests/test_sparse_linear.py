"""The autograd function against the dense product x (W + Δ)ᵀ + b."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trpts_peft.sparse_linear import added_linear, compose_weight, composed_linear, index_columns

ROWS, INPUTS = 6, 8


def case(dtype=torch.float32, columns=None, shape=(2, 5, INPUTS), bias=True):
    """x, weight, bias, columns, values, with gradients for all but weight and columns."""
    if columns is None:
        columns = torch.stack([torch.randperm(INPUTS - 2)[:3] for _ in range(ROWS)]).sort(dim=1).values
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, INPUTS).to(dtype)
    values = torch.randn(columns.shape).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return x, weight, torch.randn(ROWS).to(dtype).requires_grad_() if bias else None, columns, values


def dense_weight(weight, columns, values):
    delta = torch.zeros_like(weight)
    for o in range(ROWS):
        for c in range(columns.shape[1]):
            delta[o, columns[o, c]] = delta[o, columns[o, c]] + values[o, c]
    return weight + delta


def composed(x, weight, bias, columns, values):
    return composed_linear(x, weight, bias, columns, values, *index_columns(columns))


def added(x, weight, bias, columns, values):
    return added_linear(F.linear(x, weight, bias), x, values, *index_columns(columns))


def outputs_and_gradients(product, x, weight, bias, columns, values):
    leaves = [t for t in (x, bias, values) if t is not None]
    y = product(x, weight, bias, columns, values)
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 2, ROWS, dtype=y.dtype)).sum(), leaves)]


def dense(x, weight, bias, columns, values):
    return F.linear(x, dense_weight(weight, columns, values), bias)


def test_index_columns_factors_the_columns():
    columns = torch.tensor([[1, 7], [4, 7], [1, 4]])
    used, slots = index_columns(columns)
    assert used.tolist() == [1, 4, 7]
    assert torch.equal(used[slots], columns)


def test_compose_weight_leaves_the_weight_alone():
    _, weight, _, columns, values = case()
    before = weight.clone()
    torch.testing.assert_close(compose_weight(weight, columns, values), dense_weight(weight, columns, values))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("product", [composed, added])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(INPUTS,), (3, INPUTS), (2, 5, INPUTS), (2, 2, 3, INPUTS)])
def test_outputs_and_gradients_equal_the_dense_product(product, bias, shape):
    arguments = case(bias=bias, shape=shape)
    results = outputs_and_gradients(product, *arguments)
    expected = outputs_and_gradients(dense, *arguments)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", [composed, added])
def test_outputs_and_gradients_in_bfloat16(product):
    x, weight, bias, columns, values = case(torch.bfloat16)
    results = outputs_and_gradients(product, x, weight, bias, columns, values)
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    full = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    expected = outputs_and_gradients(dense, *full, columns, values)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.float(), reference, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("product", [composed, added])
def test_equal_columns_add_up(product):
    columns = torch.tensor([[2, 2, 5]]).expand(ROWS, -1).contiguous()
    arguments = case(columns=columns)
    expected = outputs_and_gradients(dense, *arguments)
    for result, reference in zip(outputs_and_gradients(product, *arguments), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", [composed, added])
def test_gradcheck(product):
    x, weight, bias, columns, values = case(torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, bias, values: product(x, weight, bias, columns, values), (x, bias, values)
    )


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


def test_backward_keeps_only_the_used_columns_of_the_input():
    x, weight, bias, columns, values = case(columns=torch.tensor([[1, 3]]).expand(ROWS, -1).contiguous())
    saved = saved_by(lambda: composed(x, weight, bias, columns, values))
    assert [t.shape for t in saved if t.dim() == 3] == [(2, 5, 2)]
    assert not any(t.dim() == 3 and t.shape[-1] == INPUTS for t in saved)
    assert torch.equal(next(t for t in saved if t.dim() == 3), x.detach()[..., [1, 3]])


def test_backward_keeps_no_second_dense_weight():
    x, weight, bias, columns, values = case()
    saved = saved_by(lambda: composed(x, weight, bias, columns, values))
    dense_ones = [t for t in saved if t.shape == weight.shape]
    assert [t.data_ptr() for t in dense_ones] == [weight.data_ptr()]


def test_backward_keeps_no_input_where_the_values_do_not_train():
    x, weight, bias, columns, values = case()
    saved = saved_by(lambda: composed(x, weight, bias, columns, values.detach()))
    assert not any(t.dim() == 3 for t in saved)


def test_no_gradient_of_the_weight_is_formed():
    x, weight, bias, columns, values = case()
    weight.requires_grad_()
    composed(x, weight, bias, columns, values).sum().backward()
    assert weight.grad is None
    assert values.grad is not None


def test_input_without_gradient():
    x, weight, bias, columns, values = case()
    y = composed(x.detach(), weight, bias, columns, values)
    reference = dense(x.detach(), weight, bias, columns, values)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), values), torch.autograd.grad(reference.sum(), values))


def test_gradient_checkpointing():
    x, weight, bias, columns, values = case()
    plain = torch.autograd.grad(composed(x, weight, bias, columns, values).square().sum(), [x, values])
    y = checkpoint(composed, x, weight, bias, columns, values, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, values]), plain)


def test_a_second_derivative_is_refused():
    x, weight, bias, columns, values = case(torch.float64)
    (grad,) = torch.autograd.grad(composed(x, weight, bias, columns, values).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
