"""The autograd function against the dense product x (W + Δ)ᵀ + b."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from trpts_peft.sparse_linear import (
    _rows_to_visit,
    add_update_,
    added_linear,
    adds_faster,
    compose_weight,
    flat_places,
    index_columns,
    keeps_used,
    sparse_linear,
)

ROWS, INPUTS = 6, 64
PATHS = {"used columns": 10, "whole input": 40}  # what is kept of the input, and used columns that make it so


def case(dtype=torch.float32, columns=None, shape=(2, 5, INPUTS), bias=True, path="used columns"):
    """x, weight, bias, columns, values, with gradients for all but weight and columns."""
    if columns is None:
        used = torch.randperm(INPUTS)[: PATHS[path]].sort().values
        slots = torch.stack([torch.roll(torch.arange(len(used)), -7 * o)[: min(7, len(used))] for o in range(ROWS)])
        columns = used[slots].sort(dim=1).values
        assert set(columns.flatten().tolist()) == set(used.tolist())
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


def sparse(x, weight, bias, columns, values):
    return sparse_linear(x, weight, bias, columns, values, *index_columns(columns), distinct=True)


def added(x, weight, bias, columns, values):
    return added_linear(F.linear(x, weight, bias), x, values, *index_columns(columns))


each_product = pytest.mark.parametrize("product", [sparse, added])
each_path = pytest.mark.parametrize("path", PATHS)


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


def test_flat_places_find_the_entries_at_the_columns():
    _, weight, _, columns, _ = case()
    assert torch.equal(weight.flatten()[flat_places(columns, INPUTS)], weight.gather(1, columns).flatten())


@pytest.mark.parametrize("column", [-1, INPUTS])
def test_flat_places_refuse_a_column_that_would_lie_in_another_row(column):
    columns = torch.tensor([[0, 1], [0, column], [0, 1]])
    low, high = min(column, 0), max(column, 1)
    with pytest.raises(
        ValueError, match=rf"^The adapter's columns must be from 0 to {INPUTS - 1}, got {low} to {high}: "
    ):
        flat_places(columns, INPUTS)


def test_compose_weight_leaves_the_weight_alone():
    _, weight, _, columns, values = case()
    before = weight.clone()
    torch.testing.assert_close(compose_weight(weight, columns, values), dense_weight(weight, columns, values))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, None])
def test_compose_weight_of_distinct_columns_gives_the_same_bits(base, target):
    _, weight, _, columns, values = case()
    weight, options = weight.to(base), {"dtype": target}
    before, expected = weight.clone(), dense_weight(weight, columns, values).to(target or base)
    for distinct in (True, False):
        composed = compose_weight(weight, columns, values, distinct=distinct, **options)
        assert composed.dtype == expected.dtype
        assert torch.equal(composed, expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_compose_weight_adds_equal_columns_up(target):
    _, weight, _, columns, values = case()
    twice = compose_weight(weight, columns.repeat(1, 2), values.repeat(1, 2), dtype=target)
    torch.testing.assert_close(twice, dense_weight(weight, columns, 2 * values).to(target))


def test_the_share_of_used_columns_decides_what_is_kept():
    assert [keeps_used(used, 768) for used in (1, 384, 385, 768)] == [True, True, False, False]


@each_path
def test_the_weight_is_never_written(path, monkeypatch):
    x, weight, bias, columns, values = case(path=path)
    before, seen, product, linear = weight.clone(), [], torch.Tensor.__matmul__, F.linear

    def look(multiply, *args):
        seen.append(torch.equal(weight, before))
        return multiply(*args)

    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *args: look(product, *args))
    monkeypatch.setattr(F, "linear", lambda *args: look(linear, *args))
    sparse(x, weight, bias, columns, values).sum().backward()
    assert seen == [True, True, True]  # forward; the gradient of x; that of the values
    assert torch.equal(weight, before)


@each_product
@each_path
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(INPUTS,), (3, INPUTS), (2, 5, INPUTS), (2, 2, 3, INPUTS)])
def test_outputs_and_gradients_equal_the_dense_product(product, path, bias, shape):
    arguments = case(bias=bias, shape=shape, path=path)
    results = outputs_and_gradients(product, *arguments)
    expected = outputs_and_gradients(dense, *arguments)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@each_path
@pytest.mark.parametrize("trained", [("bias",), ("update",), ("bias", "update")])
@pytest.mark.parametrize("tokens", [5, 1])  # of five, that have a gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_of_the_bias_has_the_gradient_of_the_bias(path, trained, tokens, dtype):
    x, weight, bias, columns, values = case(dtype, path=path)
    biases = {"bias": bias.detach(), "update": torch.randn(ROWS)}
    leaves = [biases[name].requires_grad_() for name in trained]
    grad = torch.zeros(2, 5, ROWS, dtype=dtype)
    grad[:, :tokens] = torch.randn(2, tokens, ROWS).to(dtype)
    y = sparse_linear(x, weight, biases["bias"], columns, values, *index_columns(columns), biases["update"])
    total = (biases["bias"] + biases["update"]).to(dtype)
    assert torch.equal(y, sparse_linear(x, weight, total, columns, values, *index_columns(columns)))
    with torch.no_grad():
        predicted = sparse_linear(x, weight, biases["bias"], columns, values, *index_columns(columns), biases["update"])
    assert torch.equal(predicted, y)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y, [x, values, *leaves], grad)[2:], strict=True):
        assert gradient.dtype == leaf.dtype
        expected = grad.float().sum((0, 1)).to(leaf)
        torch.testing.assert_close(gradient, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_an_update_of_a_bias_that_is_not_there_is_the_bias():
    x, weight, bias, columns, values = case()
    update = sparse_linear(x, weight, None, columns, values, *index_columns(columns), bias)
    assert torch.equal(update, sparse(x, weight, bias, columns, values))
    torch.testing.assert_close(torch.autograd.grad(update.sum(), bias), (torch.full((ROWS,), 10.0),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_gives_to_the_bit_what_the_merged_weight_gives(dtype):
    x, weight, bias, columns, values = case(dtype)
    merged = compose_weight(weight, columns, values.detach())
    with torch.no_grad():
        for given in (x, x.transpose(0, 1), x[0]):
            assert torch.equal(sparse(given, weight, bias, columns, values), F.linear(given, merged, bias))


@each_product
@each_path
def test_outputs_and_gradients_in_bfloat16(product, path):
    x, weight, bias, columns, values = case(torch.bfloat16, path=path)
    results = outputs_and_gradients(product, x, weight, bias, columns, values)
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    full = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    expected = outputs_and_gradients(dense, *full, columns, values)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.float(), reference, rtol=0.03, atol=0.2)


@each_path
def test_bfloat16_inputs_with_a_float32_weight(path):
    x, weight, bias, columns, values = case(torch.bfloat16, path=path)
    weight = weight.float()
    results = outputs_and_gradients(sparse, x, weight, bias, columns, values)
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    full = [t.detach().float().requires_grad_() for t in (x, bias)]
    expected = outputs_and_gradients(dense, full[0], weight, full[1], columns, values)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.float(), reference, rtol=0.03, atol=0.2)


@each_product
@pytest.mark.parametrize("columns", [[2, 2, 5], list(range(5)) * 2, list(range(36)) * 2])
def test_equal_columns_add_up(product, columns):
    arguments = case(columns=torch.tensor([columns]).expand(ROWS, -1).contiguous())
    expected = outputs_and_gradients(dense, *arguments)
    for result, reference in zip(outputs_and_gradients(product, *arguments), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@each_path
def test_used_columns_may_repeat(path):
    """As they do for two adapters that are active together."""
    x, weight, bias, columns, values = case(path=path)
    used, slots = index_columns(columns)
    twice = torch.cat([used, used]), torch.cat([slots, slots + len(used)], dim=1)
    both, double = torch.cat([columns, columns], dim=1), torch.cat([values, 2 * values], dim=1)
    y = sparse_linear(x, weight, bias, both, double, *twice)
    gradients = torch.autograd.grad(y.square().sum(), [x, bias, values])
    reference = dense(x, weight, bias, columns, 3 * values)
    torch.testing.assert_close(y, reference)
    expected = torch.autograd.grad(reference.square().sum(), [x, bias, values])
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@each_product
@each_path
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(product, path, bias):
    x, weight, b, columns, values = case(torch.float64, shape=(2, INPUTS), bias=bias, path=path)
    leaves = [t for t in (x, values, b) if t is not None]
    assert torch.autograd.gradcheck(lambda x, values, b=None: product(x, weight, b, columns, values), leaves)


@each_path
def test_an_update_of_zero_changes_no_bit(path):
    x, weight, bias, columns, values = case(shape=(33, INPUTS), path=path)
    y = sparse(x, weight, bias, columns, torch.zeros_like(values))
    assert torch.equal(y, F.linear(x, weight, bias))


@each_path
@pytest.mark.parametrize("shape", [(4, INPUTS), (2, 5, INPUTS)])
def test_the_output_may_be_changed_in_place(path, shape):
    x, weight, bias, columns, values = case(shape=shape, path=path)
    y = F.relu_(sparse(x, weight, bias, columns, values))
    reference = F.relu(dense(x, weight, bias, columns, values))
    gradients = torch.autograd.grad(y.square().sum(), [x, values])
    for gradient, expected in zip(gradients, torch.autograd.grad(reference.square().sum(), [x, values]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_values_add_up_in_their_own_precision():
    """A column that occurs twice, with values whose sum 16 bits can hold, though not the first of them."""
    columns = torch.tensor([[1, 1]]).expand(ROWS, -1).contiguous()
    x = torch.randn(4, INPUTS).bfloat16()
    values = torch.tensor([[257.0, -256.0]]).expand(ROWS, -1)
    weight, indices = torch.zeros(ROWS, INPUTS), index_columns(columns)
    for y in (
        sparse_linear(x, weight, None, columns, values, *indices),
        added(x, weight.bfloat16(), None, columns, values),
    ):
        assert torch.equal(y, x[:, 1:2].expand_as(y))


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch(path, dtype):
    arguments = case(dtype, shape=(0, 5, INPUTS), path=path)
    y, *gradients = outputs_and_gradients(sparse, *arguments)
    assert y.shape == (0, 5, ROWS)
    assert [g.shape for g in gradients] == [(0, 5, INPUTS), (ROWS,), arguments[4].shape]
    assert not any(g.any() for g in gradients)


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_only_the_used_columns_of_the_input(dtype):
    x, weight, bias, columns, values = case(dtype)
    used, _ = index_columns(columns)
    saved = saved_by(lambda: sparse(x, weight, bias, columns, values))
    (kept,) = [t for t in saved if t.is_floating_point() and t.shape[1] == 10]
    assert torch.equal(kept.t(), torch.cat([x.detach().reshape(10, INPUTS)[:, used], torch.ones(10, 1)], dim=1))
    assert kept.untyped_storage().nbytes() == kept.nbytes
    assert kept.is_contiguous() == (dtype == torch.bfloat16)
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in saved)


def test_backward_keeps_the_input_itself_where_most_of_it_is_used():
    x, weight, bias, columns, values = case(path="whole input")
    for given in (x, x.transpose(0, 1)):  # of the second, the rows would be a copy
        saved = saved_by(lambda given=given: sparse(given, weight, bias, columns, values))
        (kept,) = [t for t in saved if t.is_floating_point() and t.numel() == x.numel()]
        assert kept.data_ptr() == x.data_ptr()


@each_path
@pytest.mark.parametrize("tokens", [[], [0], [1, 3], [4]])
def test_tokens_without_a_gradient_are_left_out(path, tokens, monkeypatch):
    x, weight, bias, columns, values = case(shape=(3, 5, INPUTS), path=path)
    rows, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: rows.append(a.shape[0]) or product(a, b))
    y, reference = sparse(x, weight, bias, columns, values), dense(x, weight, bias, columns, values)
    rows.clear()
    grad = torch.zeros_like(y)
    grad[:, tokens] = torch.randn(3, len(tokens), ROWS)
    results = torch.autograd.grad(y, [x, bias, values], grad)
    assert rows[0] == (15 if tokens == [4] else 3 * len(tokens))  # only a zero gradient of the last makes it look
    for result, expected in zip(results, torch.autograd.grad(reference, [x, bias, values], grad), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_an_update_that_does_not_train_passes_the_gradient_on():
    x, weight, bias, columns, values = case()
    values, bias = values.detach(), bias.detach()
    grad = torch.zeros(2, 5, ROWS)
    grad[:, 0] = torch.randn(2, ROWS)  # the last token has none, so that rows are left out
    (result,) = torch.autograd.grad(sparse(x, weight, bias, columns, values), x, grad)
    (expected,) = torch.autograd.grad(dense(x, weight, bias, columns, values), x, grad)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_device_that_would_have_to_wait_is_not_asked(monkeypatch):
    monkeypatch.setattr("trpts_peft.sparse_linear.tokens_with_gradient", lambda grads: pytest.fail("asked"))
    assert _rows_to_visit(torch.zeros(10, ROWS, device="meta"), torch.Size([2, 5, INPUTS])) is None
    assert _rows_to_visit(torch.zeros(10, ROWS), torch.Size([10, INPUTS])) is None


def test_rows_to_visit_lie_where_the_gradient_lies():
    grad_rows = torch.zeros(10, ROWS)
    grad_rows[::5] = 1
    with torch.device("meta"):  # the default device
        rows = _rows_to_visit(grad_rows, torch.Size([2, 5, INPUTS]))
    assert rows.tolist() == [0, 5]


def test_the_gradient_of_the_bias_comes_with_that_of_the_values(monkeypatch):
    x, weight, bias, columns, values = case()
    y = sparse(x, weight, bias, columns, values)
    monkeypatch.setattr(torch.Tensor, "sum", lambda *_, **__: pytest.fail("summed"))
    (gradient,) = torch.autograd.grad(y, bias, torch.ones_like(y), retain_graph=True)
    torch.testing.assert_close(gradient, torch.full((ROWS,), 10.0))


@each_path
def test_nothing_is_gathered_to_be_thrown_away(path, monkeypatch):
    arguments, gathered, select = case(path=path), [], torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *args: gathered.append(1) or select(*args))
    with torch.no_grad():
        sparse(*arguments)
    assert not gathered


@each_path
def test_prediction_gives_to_the_bit_what_training_sees(path):
    arguments = case(path=path)
    trained = sparse(*arguments)
    with torch.no_grad():
        assert torch.equal(sparse(*arguments), trained)


def test_a_large_gradient_is_formed_some_rows_at_a_time(monkeypatch):
    arguments = case(path="whole input", shape=(3, 5, INPUTS))
    expected = outputs_and_gradients(dense, *arguments)
    monkeypatch.setattr("trpts_peft.sparse_linear._GRADIENT_ENTRIES", 4 * INPUTS)
    shapes, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.append((len(a), b.shape[-1])) or product(a, b))
    results = outputs_and_gradients(sparse, *arguments)
    assert shapes == [(15, INPUTS), (4, INPUTS), (2, INPUTS)]  # the input's gradient, then the weight's in two parts
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


def test_a_gpu_gets_larger_parts_of_a_gradient(monkeypatch):
    monkeypatch.setattr("trpts_peft.sparse_linear._GRADIENT_ENTRIES", 4 * INPUTS)
    products, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(len(a)) or product(a, b))
    x, weight, bias, columns, values = (part.detach().to("meta") for part in case(path="whole input"))
    y = sparse_linear(x, weight, bias, columns, values.requires_grad_(), torch.arange(40, device="meta"), columns)
    y.sum().backward()
    assert products[-1] == ROWS


class Sparse(nn.Module):
    """The product with what a layer holds of it; a compiler takes what belongs to a module for kept anyway."""

    def __init__(self, weight, bias, columns, values):
        super().__init__()
        used, slots = index_columns(columns)
        self.values = nn.Parameter(values.detach())
        for name, part in (("weight", weight), ("bias", bias), ("columns", columns), ("used", used), ("slots", slots)):
            self.register_buffer(name, part.detach())

    def forward(self, x):
        return sparse_linear(x, self.weight, self.bias, self.columns, self.values, self.used, self.slots, distinct=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own
@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_keeps_no_second_dense_weight(path, dtype):
    x, *parts = case(dtype, path=path)
    layer = Sparse(*parts)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)  # parted as by the default
    y = compiled(x)
    expected = torch.autograd.grad(layer(x).sum(), [x, layer.values])
    for result, reference in zip(torch.autograd.grad(y.sum(), [x, layer.values]), expected, strict=True):
        torch.testing.assert_close(result, reference)
    saved = saved_by(lambda: compiled(x))
    assert {t.data_ptr() for t in saved if t.shape == layer.weight.shape} <= {layer.weight.data_ptr()}


@each_path
def test_backward_keeps_no_second_dense_weight(path):
    x, weight, bias, columns, values = case(path=path)
    saved = saved_by(lambda: sparse(x, weight, bias, columns, values))
    dense_ones = [t for t in saved if t.shape == weight.shape]
    assert [t.data_ptr() for t in dense_ones] == [weight.data_ptr()]


@each_path
def test_backward_keeps_no_input_where_the_values_do_not_train(path):
    x, weight, bias, columns, values = case(path=path)
    saved = saved_by(lambda: sparse(x, weight, bias, columns, values.detach()))
    assert not any(t.is_floating_point() and t.shape[0] in (2, 10) for t in saved)


def test_bias_trains_where_the_values_do_not():
    x, weight, bias, columns, values = case()
    (gradient,) = torch.autograd.grad(sparse(x, weight, bias, columns, values.detach()).sum(), bias)
    torch.testing.assert_close(gradient, torch.full((ROWS,), 10.0))


@each_path
def test_no_gradient_of_the_weight_is_formed(path):
    x, weight, bias, columns, values = case(path=path)
    weight.requires_grad_()
    sparse(x, weight, bias, columns, values).sum().backward()
    assert weight.grad is None
    assert values.grad is not None


@each_path
def test_input_without_gradient(path):
    x, weight, bias, columns, values = case(path=path)
    y = sparse(x.detach(), weight, bias, columns, values)
    reference = dense(x.detach(), weight, bias, columns, values)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), values), torch.autograd.grad(reference.sum(), values))


@each_path
def test_gradient_checkpointing(path):
    x, weight, bias, columns, values = case(path=path)
    plain = torch.autograd.grad(sparse(x, weight, bias, columns, values).square().sum(), [x, values])
    y = checkpoint(sparse, x, weight, bias, columns, values, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, values]), plain)


def test_a_second_derivative_is_refused():
    # Before there is a first one to go on with: `torch.autograd.grad` would leave out what has no second one.
    x, weight, bias, columns, values = case(torch.float64)
    with pytest.raises(RuntimeError, match="`create_graph` must be False"):
        torch.autograd.grad(sparse(x, weight, bias, columns, values).square().sum(), values, create_graph=True)


# ---- several adapters in one batch ----


def test_few_columns_or_few_rows_are_added_and_others_composed():
    batch = torch.empty(8, 100, 768, device="meta")
    assert [adds_faster(batch, 1, used) for used in (1, 48, 416, 417, 768)] == [True, True, True, False, False]
    assert [adds_faster(batch, 8, used) for used in (48, 94, 95)] == [True, True, False]
    assert adds_faster(batch[:, 0], 8, 768)
    assert adds_faster(batch[:, :0], 8, 768)


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("shape", [(4, INPUTS), (4, 5, INPUTS), (4, 2, 3, INPUTS)])
def test_an_update_is_added_to_the_samples_that_it_belongs_to(shape, update):
    x, weight, _, columns, values = case(shape=shape)
    used, slots = index_columns(columns)
    bias = torch.randn(ROWS, requires_grad=True) if update else None
    leaves = [t for t in (x, values, bias) if t is not None]
    y, factors = F.linear(x, weight), torch.randn(*shape[:-1], ROWS)
    untouched = y.detach().clone()
    add_update_(y, x, [3, 0], values, used, slots, bias)
    assert torch.equal(y[[1, 2]], untouched[[1, 2]])
    own = F.linear(x, dense_weight(weight, columns, values), bias)
    plain = F.linear(x, weight)
    expected = torch.stack([own[0], plain[1], plain[2], own[3]])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(y, leaves, factors)
    for result, reference in zip(gradients, torch.autograd.grad(expected, leaves, factors), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, INPUTS), (4, 5, INPUTS)])
def test_an_update_is_computed_in_the_dtype_of_what_it_is_added_to(shape):
    x, _, _, columns, values = case(shape=shape)
    y = torch.zeros(*shape[:-1], ROWS, dtype=torch.bfloat16)
    with torch.no_grad():
        add_update_(y, x, range(4), values, *index_columns(columns), torch.ones(ROWS))
    reference = F.linear(x, dense_weight(torch.zeros(ROWS, INPUTS), columns, values), torch.ones(ROWS))
    torch.testing.assert_close(y.float(), reference, rtol=0.03, atol=0.2)


def test_equal_columns_and_used_ones_that_repeat_add_up_in_place():
    x, _, _, columns, values = case()
    used, slots = index_columns(columns)
    y = torch.zeros(2, 5, ROWS)
    with torch.no_grad():
        both = torch.cat([slots, slots, slots + len(used)], dim=1)
        add_update_(y, x, [0, 1], values.repeat(1, 3), torch.cat([used, used]), both)
    torch.testing.assert_close(y, dense(x, torch.zeros(ROWS, INPUTS), None, columns, 3 * values), rtol=1e-5, atol=1e-5)


def test_single_rows_are_one_product(monkeypatch):
    x, _, _, columns, values = case(shape=(4, INPUTS))
    rows, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: rows.append(len(a)) or product(a, b))
    add_update_(torch.zeros(4, ROWS), x, [0, 1, 3], values, *index_columns(columns))
    assert rows == [3]
