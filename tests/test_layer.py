"""One adapted linear layer against the dense layer with weight W + Δ and bias b + Δb."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate import load_checkpoint_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trpts_peft.layer import TRPTSLinear
from trpts_peft.sparse_linear import index_columns, keeps_used

ROWS, INPUTS = 6, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Products for several adapters, or beside hooks, round more often than the merged weight.
RESOLUTION = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-6},
    torch.float16: {"rtol": 2**-10, "atol": 2**-9},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}


def random_columns(count=3, inputs=INPUTS):
    return torch.stack([torch.randperm(inputs)[:count] for _ in range(ROWS)]).sort(dim=1).values


def make(*adapters, dtype=torch.float32, bias=True, train_bias=True, init_weights=False):
    """A layer with these adapters, random unless `init_weights`, the first of them active."""
    base = nn.Linear(INPUTS, ROWS, bias=bias).to(dtype).requires_grad_(False)
    layer = TRPTSLinear(base)
    for name in adapters or ("a",):
        layer.update_layer(name, random_columns(), train_bias=train_bias, init_weights=init_weights)
    layer.set_adapter([*adapters, "a"][:1])
    return layer


def reference(layer, x, *adapters):
    """x (W + Σ Δ)ᵀ + b + Σ Δb, entry by entry, in the precision of the weights' own sum."""
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias
    for name in adapters:
        for o in range(ROWS):
            for c, i in enumerate(layer.trpts_columns[name][o].tolist()):
                weight[o, i] += layer.trpts_values[name][o, c].detach().to(weight.dtype)
        if name in layer.trpts_bias:
            bias = bias + layer.trpts_bias[name].detach()
    return F.linear(x, weight, bias)


def inputs(dtype=torch.float32, shape=(4, 5, INPUTS)):
    return torch.randn(shape).to(dtype)


# ---- forward ----


@pytest.mark.parametrize("bias, train_bias", [(True, True), (True, False), (False, True)])
def test_output_is_that_of_the_dense_layer(bias, train_bias):
    layer, x = make(bias=bias, train_bias=train_bias), inputs()
    assert ("a" in layer.trpts_bias) == (bias and train_bias)
    torch.testing.assert_close(layer(x), reference(layer, x, "a"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_each_dtype(dtype):
    layer, x = make(dtype=dtype), inputs(dtype)
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, 1e-5)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), reference(layer, x, "a"), rtol=tolerance, atol=tolerance)


def test_a_new_adapter_changes_nothing():
    layer, x = make(init_weights=True), inputs()
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.is_trained("a")


def test_gradients_are_those_of_the_dense_layer():
    layer, x = make(), inputs().requires_grad_()
    dense = nn.Linear(INPUTS, ROWS)
    dense.weight.data = layer.base_layer.weight + layer.get_delta_weight("a")
    dense.bias.data = layer.base_layer.bias + layer.trpts_bias["a"]
    layer(x).square().sum().backward()
    grad_x, weight, bias = torch.autograd.grad(dense(x).square().sum(), [x, dense.weight, dense.bias])
    torch.testing.assert_close(x.grad, grad_x)
    torch.testing.assert_close(layer.trpts_values["a"].grad, weight.gather(1, layer.trpts_columns["a"]))
    torch.testing.assert_close(layer.trpts_bias["a"].grad, bias)
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


@pytest.mark.parametrize("shape", [(4, INPUTS), (4, 5, INPUTS)])
def test_one_node_of_autograd_leads_from_the_output_to_all_that_trains(shape):
    """Each further one takes about as long as a product of a small layer."""
    layer, x = make(), inputs(shape=shape).requires_grad_()
    y = layer(x)  # with torch 2.10 a node does not outlive it
    node = y.grad_fn
    if len(shape) == 3:
        assert node.name() == "ViewBackward0"
        ((node, _),) = node.next_functions
    assert node.name() == "_SparseLinearBackward"
    leaves = [after.variable for after, _ in node.next_functions if after is not None]
    assert [id(leaf) for leaf in leaves] == [id(x), id(layer.trpts_bias["a"]), id(layer.trpts_values["a"])]


def test_parameters_that_are_plain_attributes_are_found():
    """As in the replicas that nn.DataParallel makes, and under the first FSDP while the layer is at work."""
    layer, x = make(), inputs()
    expected = layer(x)
    for module in (layer.base_layer, layer.trpts_values, layer.trpts_bias):
        for name, parameter in dict(module._parameters).items():
            del module._parameters[name]
            vars(module)[name] = parameter.detach()
    assert torch.equal(layer(x), expected)


class Gathering(dict):
    """A dict of parameters as DeepSpeed's: whole are those only that are asked for as items."""

    def __getitem__(self, name):
        return self.whole[name]


def test_parameters_that_are_gathered_when_asked_for_are_whole():
    layer, x = make(), inputs()
    expected = layer(x)
    for module in (layer.trpts_values, layer.trpts_bias):
        parts = Gathering({name: nn.Parameter(torch.empty(0)) for name in module._parameters})
        parts.whole, module._parameters = module._parameters, parts
    assert torch.equal(layer(x), expected)


def test_two_active_adapters_add_up():
    layer, x = make("a", "b"), inputs()
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(x), reference(layer, x, "a", "b"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), reference(layer, x, "a"), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_active_adapters_on_the_same_columns_add_up_and_train_both(dtype):
    layer, x = make("a", "b", dtype=dtype), inputs(dtype)
    layer.replace_columns("b", layer.trpts_columns["a"].clone(), torch.randn(ROWS, 3))
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(x), reference(layer, x, "a", "b").to(dtype), **RESOLUTION[dtype])
    layer(x).sum().backward()
    assert torch.equal(layer.trpts_values["a"].grad, layer.trpts_values["b"].grad)
    assert torch.equal(layer.trpts_bias["a"].grad, layer.trpts_bias["b"].grad)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("inputs_in_use", [2, INPUTS], ids=["used columns kept", "all of the input kept"])
def test_each_of_two_active_adapters_gets_the_gradient_of_its_entries(inputs_in_use, hooked):
    layer, x = make("a", "b"), inputs()
    for name, first in (("a", 0), ("b", INPUTS - inputs_in_use)):
        columns = first + random_columns(2, inputs_in_use)
        layer.replace_columns(name, columns, torch.randn(ROWS, 2))
        layer.trpts_values[name].requires_grad_(True)
    layer.set_adapter(["a", "b"])
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    dense = (layer.base_layer.weight + layer.get_delta_weight("a") + layer.get_delta_weight("b")).detach()
    bias = (layer.base_layer.bias + layer.trpts_bias["a"] + layer.trpts_bias["b"]).detach()
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, dense, bias), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    F.linear(x, dense.requires_grad_(), bias).square().sum().backward()
    for name in ("a", "b"):
        expected = dense.grad.gather(1, layer.trpts_columns[name])
        torch.testing.assert_close(layer.trpts_values[name].grad, expected, rtol=1e-4, atol=1e-4)


def test_adapters_with_different_counts_add_up():
    layer, x = make("a", "b"), inputs()
    layer.replace_columns("b", random_columns(1), torch.randn(ROWS, 1))
    layer.set_adapter(["b", "a"])
    torch.testing.assert_close(layer(x), reference(layer, x, "a", "b"), rtol=1e-5, atol=1e-5)


def test_only_the_active_adapter_trains_and_counts():
    layer, x = make("a", "b"), inputs()
    layer.set_adapter("b")
    torch.testing.assert_close(layer(x), reference(layer, x, "b"))
    assert [p.requires_grad for p in layer.trpts_values.values()] == [False, True]
    assert [p.requires_grad for p in layer.trpts_bias.values()] == [False, True]


def test_parameters_that_a_wrapper_made_no_leaves_keep_their_gradients():
    layer = make("a", "b")
    layer.trpts_values._parameters["a"] = layer.trpts_values["a"] * 1
    layer.set_adapter("b")
    assert [p.requires_grad for p in layer.trpts_values._parameters.values()] == [True, True]


def test_active_adapters_unknown_to_the_layer_are_passed_over():
    layer, x = make("a"), inputs()
    layer.set_adapter(["elsewhere"])
    assert torch.equal(layer(x), layer.base_layer(x))


def test_disabled_adapters_leave_the_base_layer():
    layer, x = make(), inputs()
    expected = layer.base_layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    layer.enable_adapters(True)
    torch.testing.assert_close(layer(x), reference(layer, x, "a"))


# By the rule on shapes, updates are added to the first and third, and weights composed for the second.
each_mixed_shape = pytest.mark.parametrize("shape", [(4, 5, INPUTS), (4, 100, INPUTS), (4, INPUTS)])


@each_mixed_shape
def test_mixed_batches_use_each_samples_own_adapter(shape):
    layer, x = make("a", "b"), inputs(shape=shape)
    names = ["b", "__base__", "a", "b"]
    y = layer(x, adapter_names=names)
    for i, name in enumerate(names):
        expected = reference(layer, x[i], *([] if name == "__base__" else [name]))
        torch.testing.assert_close(y[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names, tokens, expected",
    [
        (["b", "__base__", "a", "b"], 5, [4]),  # one product for all; the updates of few rows are added
        (["b", "__base__", "a", "b"], 100, [2, 1, 1]),
        (["b"] * 4, 5, [4]),
        (["__base__"] * 4, 5, [4]),
    ],
)
def test_mixed_batches_multiply_each_sample_by_a_dense_weight_once(names, tokens, expected, monkeypatch):
    samples, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: samples.append(x.numel() // tokens // INPUTS) or linear(x, *rest))
    layer, x = make("a", "b"), inputs(shape=(4, tokens, INPUTS))
    with torch.no_grad():
        layer(x, adapter_names=names)
    assert samples == expected


@pytest.mark.parametrize("names", [["b", "__base__", "a", "b"], ["b"] * 4, ["__base__"] * 4])
def test_hooks_on_the_base_see_a_mixed_batch_once(names):
    layer, x, seen = make("a", "b"), inputs(), []
    expected = layer(x, adapter_names=names)
    layer.base_layer.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    y = layer(x, adapter_names=names)
    ((hooked, output),) = seen
    assert torch.equal(hooked, x)
    torch.testing.assert_close(output, layer.base_layer(x))  # what was seen is not written to
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@each_mixed_shape
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_batches_in_16_bits_and_under_autocast(dtype, hooked, shape):
    names = ["b", "__base__", "a", "b"]
    for layer, x in ((make("a", "b", dtype=dtype), inputs(dtype, shape)), (make("a", "b"), inputs(shape=shape))):
        if hooked:
            layer.base_layer.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x, adapter_names=names)
        assert y.dtype == dtype
        for i, name in enumerate(names):
            expected = reference(layer, x[i], *([] if name == "__base__" else [name])).to(dtype)
            torch.testing.assert_close(y[i], expected, rtol=5e-2, atol=5e-2)


@each_mixed_shape
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_of_mixed_batches_are_those_of_each_samples_own_adapter(hooked, shape):
    layer, x, names = make("a", "b"), inputs(shape=shape), ["b", "__base__", "a", "b"]
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    layer.set_adapter(["a", "b"])
    grad_output = torch.randn(*shape[:-1], ROWS)
    layer(x, adapter_names=names).backward(grad_output)
    for name in ("a", "b"):
        rows = [i for i, other in enumerate(names) if other == name]
        grad_rows, own = grad_output[rows].flatten(0, -2), x[rows].flatten(0, -2)
        expected = (grad_rows.T @ own).gather(1, layer.trpts_columns[name])
        torch.testing.assert_close(layer.trpts_values[name].grad, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.trpts_bias[name].grad, grad_rows.sum(0), rtol=1e-5, atol=1e-5)


def test_mixed_batches_are_refused_where_they_cannot_be_right():
    layer, x = make("a", "b"), inputs()
    with pytest.raises(ValueError, match="3 and 4"):
        layer(x, adapter_names=["a", "b", "a"])
    layer.merge()
    with pytest.raises(ValueError, match=r"`adapter_names` .* merged"):
        layer(x, adapter_names=["a"] * 4)


# ---- precision, hooks ----


@pytest.mark.parametrize("hooked", [False, True])
def test_autocast_computes_in_bfloat16_and_trains_in_float32(hooked):
    layer, x = make(), inputs().requires_grad_()
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(layer, x, "a"), rtol=2e-2, atol=5e-2)
    y.float().square().sum().backward()
    assert layer.trpts_values["a"].grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_is_not_scattered_into_16_bits(dtype, monkeypatch):
    layer, x, scattered = make(dtype=dtype), inputs(dtype).requires_grad_(), []
    for name in ("scatter", "scatter_", "scatter_add", "scatter_add_"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, of=original: scattered.append(of) or of(*args))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    layer.merge()
    layer.unmerge()
    assert not scattered
    assert layer.trpts_values["a"].grad.any()


def test_autocast_leaves_float64_alone():
    layer, x = make().double(), torch.randn(2, INPUTS, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_autocast_gives_the_output_of_the_merged_layer():
    layer, x = make(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        layer.merge()
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_a_hook_on_the_base_layer_fires_and_outputs_stay(kind):
    layer, x, calls = make(), inputs().requires_grad_(), []
    expected = layer(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, layer.trpts_values["a"], layer.trpts_bias["a"]])
    getattr(layer.base_layer, f"register_{kind}_hook")(lambda *_: calls.append(kind))
    y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), [x, layer.trpts_values["a"], layer.trpts_bias["a"]])
    assert calls == [kind]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)


def test_a_hook_on_the_base_layer_may_change_its_output():
    layer, x = make(), inputs()
    layer.base_layer.register_forward_hook(lambda _m, _a, output: output + 1)
    torch.testing.assert_close(layer(x), reference(layer, x, "a") + 1, rtol=1e-5, atol=1e-5)


def test_base_weights_that_train_get_their_gradient():
    layer, x = make(), inputs()
    layer.base_layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None
    assert layer.base_layer.bias.grad is not None
    assert layer.trpts_values["a"].grad is not None


# ---- merging ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_gives_the_adapters_output_and_unmerge_restores_every_bit(dtype):
    layer, x = make(dtype=dtype), inputs(dtype)
    before, expected = copy.deepcopy(layer.base_layer.state_dict()), layer(x)
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected, **RESOLUTION[dtype])
    assert not torch.equal(layer.base_layer.weight, before["weight"])
    layer.unmerge()
    assert not layer.merged
    for name, tensor in layer.base_layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_merged_adapters_unmerge_exactly(dtype):
    layer, x = make("a", "b", "c", dtype=dtype), inputs(dtype)
    layer.replace_columns("b", layer.trpts_columns["a"].clone(), 1e3 * torch.randn(ROWS, 3))
    layer.base_layer.weight[:, 0] = -0.0
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.merge(adapter_names=["b", "a"])
    with pytest.warns(UserWarning, match="additionally merging c"):
        layer.merge(adapter_names=["c"])
    assert layer.merged_adapters == ["b", "a", "c"]
    layer.unmerge()
    for name, tensor in layer.base_layer.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    layer.merge(adapter_names=["a", "c"])
    merged = layer(x)
    layer.unmerge()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(merged, reference(layer, x, "a", "c"), rtol=tolerance, atol=tolerance)


def test_a_weight_that_is_not_contiguous_is_merged_where_it_lies():
    layer, x = make("a", "b"), inputs()
    memory = torch.randn(INPUTS, ROWS + 2)
    around, layer.base_layer.weight.data = memory[:, ROWS:].clone(), memory[:, :ROWS].t()
    before, expected = memory.clone(), reference(layer, x, "a", "b")
    layer.merge(adapter_names=["a", "b"])
    assert layer.base_layer.weight.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(memory[:, ROWS:], around)
    assert torch.equal(layer.unmerged_weight(), before[:, :ROWS].t())
    layer.unmerge()
    assert torch.equal(memory, before)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def exchange(layer, how):
    columns, values = random_columns(), torch.randn(ROWS, 3)
    if how == "replaced":
        layer.replace_columns("a", columns, values)
    elif how == "loaded":
        layer.load_state_dict({"trpts_columns.a": columns, "trpts_values.a": values}, strict=False)
    else:  # as a loader does that passes by `load_state_dict`
        layer.trpts_values["a"].data.copy_(values)
        if how == "set":
            layer.trpts_columns["a"] = columns
        else:
            layer.trpts_columns["a"].copy_(columns)


@pytest.mark.parametrize("how", ["replaced", "loaded", "set", "written", "written to inference tensors"])
def test_columns_exchanged_between_merges_are_those_that_are_merged(how):
    layer, x = make(), inputs()
    before = layer.base_layer.weight.clone()
    with torch.inference_mode("inference" in how):
        if "inference" in how:
            layer.trpts_columns["a"] = layer.trpts_columns["a"].clone()
        layer.merge()
        layer.unmerge()
        exchange(layer, how)
    expected = reference(layer, x, "a")
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def transposed(layer):
    layer.base_layer.weight.data = layer.base_layer.weight.t().contiguous().t()


def expanded(layer):
    layer.base_layer.weight.data = torch.randn(1, INPUTS).expand(ROWS, INPUTS)


def broken_columns(layer):
    transposed(layer)
    layer.trpts_columns["b"][0, 0] = INPUTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_bias_is_rounded_once(dtype):
    layer, x = make(dtype=dtype), inputs(dtype)
    layer.trpts_bias["a"].data = torch.linspace(1e-3, 1, ROWS) / 3  # in 32 bits, where PEFT keeps it
    expected = (layer.base_layer.bias.float() + layer.trpts_bias["a"]).to(dtype)
    adapted = layer(x)
    layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.bias, expected)
    assert torch.equal(layer(x), adapted)


def test_a_merged_bias_that_overflows_is_refused():
    layer = make(dtype=torch.float16)
    layer.base_layer.bias.data.fill_(65000)
    layer.trpts_bias["a"].data = torch.full((ROWS,), 1000.0)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)


def bias_elsewhere(layer):
    layer.base_layer.bias = nn.Parameter(torch.empty(ROWS, device="meta"), requires_grad=False)


@pytest.mark.parametrize("breaks", [expanded, broken_columns, bias_elsewhere])
def test_a_merge_that_fails_leaves_what_can_be_unmerged(breaks):
    layer = make("a", "b")
    breaks(layer)
    before, names = layer.base_layer.weight.clone(), {name for name, _ in layer.named_buffers()}
    with pytest.raises((RuntimeError, ValueError)):
        layer.merge(adapter_names=["a", "b"])
    assert torch.equal(layer.unmerged_weight(), before)
    assert layer.merged == (not torch.equal(layer.base_layer.weight, before))
    if layer.merged:
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    assert {name for name, _ in layer.named_buffers()} == names


def test_an_unmerge_that_fails_can_be_repeated():
    layer = make("a", "b")
    transposed(layer)
    before = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["a", "b"])
    old = layer._overwritten["a"]
    layer._overwritten["a"] = old._replace(places=old.places + layer.base_layer.weight.numel())
    with pytest.raises(IndexError, match="out of"):
        layer.unmerge()
    assert layer.merged_adapters == ["a"]
    layer._overwritten["a"] = old
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("how", ["replaced", "loaded", "set", "written"])
def test_columns_exchanged_while_merged_leave_unmerge_exact(how):
    layer = make("a", "b")
    before = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["a", "b"])
    exchange(layer, how)
    assert torch.equal(layer.unmerged_weight(), before)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_adds_no_buffers_and_unmerging_keeps_nothing():
    layer = make()
    names = {name for name, _ in layer.named_buffers()}
    layer.merge()
    assert {name for name, _ in layer.named_buffers()} == names
    layer.unmerge()
    assert not layer._overwritten


def test_what_was_overwritten_goes_where_the_layer_goes():
    layer = make()
    layer.merge()
    old = layer._overwritten["a"]
    layer._apply(torch.clone)  # as a move to another device
    assert not any(new is part for new, part in zip(layer._overwritten["a"], old, strict=True))
    layer.half()
    assert [part.dtype for part in layer._overwritten["a"]] == [torch.int64, torch.float16, torch.float16]


def test_what_was_overwritten_follows_a_weight_that_is_moved_alone():
    layer = make()
    layer.merge()
    old = layer._overwritten["a"]
    assert old.beside(layer.base_layer.weight) is old
    assert all(part.is_meta for part in old.beside(torch.empty(1, device="meta")))


@pytest.mark.parametrize("restored", [lambda layer: layer.unmerged_weight(), lambda layer: layer.unmerge()])
def test_what_was_overwritten_is_fetched_before_it_is_put_back(restored, monkeypatch):
    layer, fetched = make(), []
    layer.merge()
    old = layer._overwritten["a"]
    monkeypatch.setattr(type(old), "beside", lambda self, weight: fetched.append(weight.device) or self)
    restored(layer)
    assert fetched == [layer.base_layer.weight.device]


def test_deleting_an_adapter_between_merges_leaves_unmerge_exact():
    layer = make("a", "b", "c")
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.merge(adapter_names=["b"])
    layer.set_adapter("b")
    layer.delete_adapter("a")
    with pytest.warns(UserWarning, match="additionally merging c"):
        layer.merge(adapter_names=["c"])
    layer.unmerge()
    for name, tensor in layer.base_layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_adapter_deleted_while_merged_can_be_unmerged():
    layer = make("a", "b")
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.merge()
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        layer.delete_adapter("a")
    layer.unmerge()
    for name, tensor in layer.base_layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_merging_twice_merges_once():
    layer, x = make(), inputs()
    expected = layer(x)
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_unmerging_what_is_not_merged_warns():
    layer = make()
    before = layer.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_merged_layer_unmerges_when_disabled():
    layer, x = make(), inputs()
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert not layer.merged


def test_a_conversion_of_all_tensors_leaves_indices_alone():
    layer = make()
    columns, original = layer.trpts_columns["a"].clone(), layer.base_layer.weight.detach().bfloat16()
    layer.merge()
    layer.type(torch.bfloat16)  # integers, too, says torch
    assert layer.trpts_values["a"].dtype == layer.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.trpts_columns["a"], columns)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)
    assert layer(inputs(torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("part", ["trpts_values", "trpts_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(part, value):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    getattr(layer, part)["a"].data.view(-1)[2] = value
    with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights\. The adapter a seems to be broken$"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    for name in ("base_layer.weight", "base_layer.bias"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_safe_merge_of_two_adapters_merges_none_if_the_second_is_broken():
    layer = make("a", "b")
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.trpts_values["b"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="The adapter b seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["a", "b"])
    assert not layer.merged
    for name, tensor in layer.base_layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_safe_merge_refuses_columns_out_of_range_and_merges_none():
    layer = make("a", "b")
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.trpts_columns["b"][0, 0] = INPUTS
    with pytest.raises(
        ValueError, match=f"^The adapter's columns must be from 0 to {INPUTS - 1}, got . to {INPUTS}: load"
    ):
        layer.merge(safe_merge=True, adapter_names=["a", "b"])
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, before["weight"])


def test_safe_merge_sees_an_overflow_of_the_sum():
    layer = make("a", "b", dtype=torch.float16)
    before = layer.base_layer.weight.clone()
    layer.replace_columns("a", layer.trpts_columns["a"], torch.full((ROWS, 3), 4e4))
    layer.replace_columns("b", layer.trpts_columns["a"].clone(), torch.full((ROWS, 3), 4e4))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True, adapter_names=["a", "b"])
    assert torch.equal(layer.base_layer.weight, before)


def test_safe_merge_merges_what_is_finite():
    layer, x = make(), inputs()
    expected = layer(x)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), expected)


def test_merged_originals_stay_out_of_the_state_dict_and_follow_a_cast():
    layer = make()
    names, before = set(layer.state_dict()), layer.base_layer.weight.clone()
    layer.merge()
    assert set(layer.state_dict()) == names
    layer.to(torch.bfloat16).unmerge()
    assert torch.equal(layer.base_layer.weight, before.to(torch.bfloat16))


def test_unmerged_weight_and_fingerprint_do_not_depend_on_merging():
    layer = make("a", "b")
    weight, fingerprint = layer.base_layer.weight.clone(), layer.base_fingerprint()
    layer.merge(adapter_names=["a", "b"])
    assert torch.equal(layer.unmerged_weight(), weight)
    assert torch.equal(layer.base_fingerprint(), fingerprint)
    assert fingerprint.shape == (48,)


def test_delta_weight_is_dense():
    layer = make()
    expected = torch.zeros(ROWS, INPUTS)
    for o in range(ROWS):
        for c, i in enumerate(layer.trpts_columns["a"][o].tolist()):
            expected[o, i] = layer.trpts_values["a"][o, c].detach()
    assert torch.equal(layer.get_delta_weight("a"), expected)


# ---- state ----


def test_magnitude_columns_are_the_largest_weights():
    layer = make()
    expected = layer.base_layer.weight.abs().topk(2, dim=1).indices.sort(dim=1).values
    assert torch.equal(layer.magnitude_columns(2), expected)


def test_replaced_columns_start_at_zero_and_train_as_before():
    layer, x = make("a", "b"), inputs()
    for name in ("a", "b"):
        layer.replace_columns(name, random_columns(2))
    assert torch.equal(layer(x), layer.base_layer(x))
    assert [p.requires_grad for p in layer.trpts_values.values()] == [True, False]
    assert layer.trpts_values["a"].shape == (ROWS, 2)


def test_deleting_an_adapter_leaves_nothing_of_it():
    layer, x = make("a", "b"), inputs()
    layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        layer.delete_adapter("a")
    assert "a" not in layer._known_places
    assert "a" not in layer._derived_from
    assert not [name for name, _ in [*layer.named_parameters(), *layer.named_buffers()] if name.endswith(".a")]
    torch.testing.assert_close(layer(x), reference(layer, x, "b"))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_stand_on_their_own(duplicate, merged):
    layer, x = make(), inputs()
    if merged:
        layer.merge()
    expected, twin = layer(x), duplicate(layer)
    for parameter in layer.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(x), expected)
    if merged:
        twin.unmerge()
        torch.testing.assert_close(twin(x), expected)


def test_a_copy_still_follows_loaded_columns():
    twin, other, x = copy.deepcopy(make()), make(), inputs()
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(twin(x), other(x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_with_other_columns(assign):
    layer, other, x = make(), make(), inputs()
    assert not torch.equal(layer.trpts_columns["a"], other.trpts_columns["a"])
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(layer.trpts_used["a"][layer.trpts_slots["a"]], other.trpts_columns["a"])
    torch.testing.assert_close(layer(x), other(x))
    layer.trpts_values["a"].grad = None
    layer(x).sum().backward()
    other(x).sum().backward()
    torch.testing.assert_close(layer.trpts_values["a"].grad, other.trpts_values["a"].grad)


def test_state_dict_of_a_parent_refreshes_the_layer_too():
    model, other, x = nn.Sequential(make()), nn.Sequential(make()), inputs()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x))


def leave_alone(_module, _arguments, _output):
    """A forward hook that can be pickled."""


def narrow(hooked=False):
    """A layer whose adapter takes three inputs only: backward goes by what was derived from the columns."""
    layer = make()
    layer.replace_columns("a", random_columns(1, 3), torch.randn(ROWS, 1))
    assert keeps_used(len(layer.trpts_used["a"]), INPUTS)
    layer.load_state_dict(layer.state_dict())  # columns that were written to once, as those of a fresh copy are
    if hooked:
        layer.base_layer.register_forward_hook(leave_alone)
    return layer


def assert_alike(layer, other):
    """Both give the same outputs and gradients, with the columns of the second."""
    x, results = inputs(), []
    assert torch.equal(layer.trpts_columns["a"], other.trpts_columns["a"])
    for one in (layer, other):
        parts = (one.trpts_values["a"].requires_grad_(), one.trpts_bias["a"].requires_grad_())
        results.append((one(x), *torch.autograd.grad(one(x).square().sum(), parts)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def set_columns(layer, columns):
    layer.trpts_columns["a"] = columns


def write_columns(layer, columns):
    with torch.no_grad():
        layer.trpts_columns["a"].copy_(columns)


def set_and_move(layer, columns):
    set_columns(layer, columns)
    layer._apply(torch.clone)


def write_in_inference_mode(layer, columns):
    with torch.inference_mode():
        layer.trpts_columns["a"].copy_(columns)
        layer.eval()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy, pickled])
@pytest.mark.parametrize("exchange_columns", [set_columns, write_columns, set_and_move, write_in_inference_mode])
def test_training_follows_columns_that_were_exchanged_past_every_method(exchange_columns, duplicate, hooked):
    layer = narrow(hooked)
    exchange_columns(layer, 7 - layer.trpts_columns["a"])
    layer = duplicate(layer).train()
    fresh = make()
    fresh.replace_columns("a", layer.trpts_columns["a"].clone(), layer.trpts_values["a"].detach())
    fresh.load_state_dict(layer.state_dict())
    assert_alike(layer, fresh)


def test_evaluation_beside_hooks_follows_columns_that_were_exchanged():
    layer, x = narrow(hooked=True), inputs()
    set_columns(layer, 7 - layer.trpts_columns["a"])
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), reference(layer, x, "a"))


def test_training_follows_a_checkpoint_that_accelerate_has_loaded(tmp_path):
    layer, other = narrow(), narrow()
    torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    load_checkpoint_in_model(layer, str(tmp_path / "pytorch_model.bin"), device_map={"": "cpu"})
    assert_alike(layer.train(), other)


def test_a_copy_with_columns_written_to_merges_where_they_are():
    layer, x = narrow(), inputs()
    layer.merge()
    layer.unmerge()
    write_columns(layer, 7 - layer.trpts_columns["a"])
    twin = copy.deepcopy(layer)
    expected = reference(twin, x, "a")
    twin.merge()
    torch.testing.assert_close(twin(x), expected)


def test_nothing_is_derived_again_without_need(monkeypatch):
    layer, derived = narrow(), []
    monkeypatch.setattr("trpts_peft.layer.index_columns", lambda columns: derived.append(1) or index_columns(columns))
    for mode in (True, False, True):
        layer.train(mode)(inputs())
    torch.func.functional_call(layer, layer.state_dict(), inputs())
    assert not derived
    set_columns(layer, layer.trpts_columns["a"].clone())
    layer.train().eval()
    assert len(derived) == 1


def test_nothing_is_derived_from_offloaded_columns():
    layer, x = narrow(), inputs()
    columns, expected = layer.trpts_columns["a"], layer(x)
    layer.trpts_columns["a"] = columns.to("meta")
    layer.train()
    layer.trpts_columns["a"] = columns
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.trpts_used["a"][layer.trpts_slots["a"]], columns)


def test_tensors_that_stand_for_others_are_taken_as_they_are():
    layer = narrow()
    with FakeTensorMode() as mode:
        layer.trpts_columns["a"] = mode.from_tensor(layer.trpts_columns["a"])
        assert layer.train().training


def test_an_adapter_made_in_inference_mode_predicts_outside_of_it():
    with torch.inference_mode():
        layer, x = make(), inputs()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), reference(layer, x, "a"))


def test_a_base_without_a_bias_of_its_own_is_called():
    layer, x = make(), inputs()
    expected = reference(layer, x, "a")
    inner, layer.base_layer = layer.base_layer, nn.Module()
    layer.base_layer.weight, layer.base_layer.forward = inner.weight, inner.forward
    torch.testing.assert_close(layer(x), expected)


def test_a_move_lets_go_of_the_tensors_before(monkeypatch):
    layer = make()
    layer.merge()
    layer.unmerge()
    columns, places = (weakref.ref(tensor) for tensor in (layer.trpts_columns["a"], layer._derive_places("a")))
    layer._apply(torch.clone)
    assert columns() is places() is None
    monkeypatch.setattr("trpts_peft.layer.index_columns", lambda columns: pytest.fail("derived"))
    layer.train()


def test_copies_of_a_compiled_layer_compute_by_themselves():
    layer, x = make(), inputs()
    layer.compile(backend="eager")
    for twin in (copy.deepcopy(layer), pickled(layer)):
        twin.trpts_values["a"].data.mul_(2)
        torch.testing.assert_close(twin(x), reference(twin, x, "a"))


def test_train_and_eval_compile():
    layer, x = narrow(), inputs()

    def step(x):
        layer.eval()
        y = layer(x)
        layer.train()
        return y

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x), layer(x))


def test_columns_are_state_and_what_follows_from_them_is_not():
    keys = set(make().state_dict())
    assert {"trpts_columns.a", "trpts_values.a", "trpts_bias.a", "trpts_fingerprint.a"} <= keys
    assert not {key for key in keys if any(word in key for word in ("used", "slots", "original", "places"))}
    assert make().state_dict()["trpts_columns.a"].dtype == torch.int64


def test_casting_leaves_columns_whole():
    layer = make().to(torch.float16)
    assert layer.trpts_columns["a"].dtype == layer.trpts_slots["a"].dtype == torch.int64
    assert layer.trpts_values["a"].dtype == torch.float16


def test_meta_device():
    with torch.device("meta"):
        layer = TRPTSLinear(nn.Linear(INPUTS, ROWS))
    layer.update_layer("a", layer.magnitude_columns(2), train_bias=True)
    assert layer.trpts_columns["a"].is_meta
    assert layer.trpts_columns["a"].shape == (ROWS, 2)
    layer.update_layer("b", random_columns(), train_bias=True)
    assert layer._derived_from["b"][0] is layer.trpts_columns["b"]


def test_repr_names_the_connections():
    assert "connections={'a': 3, 'b': 3}" in repr(make("a", "b"))


# ---- compile, export ----


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("active", [["a"], ["a", "b"]])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_as_one_graph(active, dynamic, autocast):
    torch.compiler.reset()
    layer, x = make("a", "b"), inputs().requires_grad_()  # three dimensions: eager looks for tokens without a gradient
    layer.set_adapter(active)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, y = layer(x), compiled(x)
    grads = torch.autograd.grad(expected.square().sum(), [x, layer.trpts_values["a"]])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, layer.trpts_values["a"]]), grads)


def test_exports():
    layer, x = make().eval(), inputs()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_the_fingerprint_samples_rows_and_columns():
    layer = TRPTSLinear(torch.nn.Linear(768, 768))
    layer.base_layer.weight.data = torch.arange(768.0 * 768).view(768, 768)
    places = layer.base_fingerprint().long()
    assert len(set((places // 768).tolist())) > 50 and len(set((places % 768).tolist())) > 50
