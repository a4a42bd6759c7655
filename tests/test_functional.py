"""Each equation against a loop that is written as the paper prints it."""

from __future__ import annotations

import math

import onnxruntime
import pytest
import torch
from torch import nn

from trpts_peft import functional as TF

# ---- eq. 2 ----


def per_sample_squares(x, g):
    total = torch.zeros(g.shape[-1], x.shape[-1], dtype=x.dtype)
    for b in range(len(x)):
        gradient = torch.zeros_like(total)
        for t in range(x.shape[1]):
            gradient += torch.outer(g[b, t], x[b, t])
        total += gradient**2
    return total


def test_squared_gradient_sum_is_per_sample():
    x, g = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    assert torch.allclose(TF.squared_gradient_sum(x, g), per_sample_squares(x, g), rtol=1e-4)


def test_squared_gradient_sum_equals_a_batch_of_one_autograd_loop():
    layer, x = torch.nn.Linear(4, 6), torch.randn(3, 5, 4)
    target, expected = torch.randn(3, 5, 6), torch.zeros(6, 4)
    for b in range(3):
        loss = (layer(x[b : b + 1]) - target[b : b + 1]).square().sum()
        expected += torch.autograd.grad(loss, layer.weight)[0] ** 2
    output = layer(x).detach().requires_grad_()
    grads = torch.autograd.grad((output - target).square().sum(), output)[0]
    torch.testing.assert_close(TF.squared_gradient_sum(x, grads), expected, rtol=1e-4, atol=0)


def test_squared_gradient_sum_does_not_flatten_tokens_into_the_batch():
    x, g = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    flattened = TF.squared_gradient_sum(x.reshape(15, 1, 4), g.reshape(15, 1, 6))
    assert not torch.allclose(TF.squared_gradient_sum(x, g), flattened, rtol=0.1)


@pytest.fixture(params=[False, True], ids=["one sample", "many samples"])
def at_once(request, monkeypatch):
    """Samples multiplied at once as on a CPU, and as on a GPU."""
    if request.param:
        monkeypatch.setattr(TF, "_samples_at_once", lambda device, room: room)
    return request.param


@pytest.mark.parametrize("workspace_mb", [0, 1e-9, 9 * 4 / 2**20, 4 * 24 / 2**20, 2 * 4 * 24 / 2**20, 1e6])
def test_squared_gradient_sum_is_the_same_in_any_workspace(workspace_mb, at_once):
    x, g = torch.randn(7, 5, 4, dtype=torch.float64), torch.randn(7, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(TF.squared_gradient_sum(x, g, workspace_mb=workspace_mb), per_sample_squares(x, g))


@pytest.mark.parametrize(("entries", "one", "many"), [(3 * 24, [24] * 7, [72, 72, 24]), (9, [8] * 21, [8] * 21)])
def test_squared_gradient_sum_holds_no_more_than_its_workspace(monkeypatch, at_once, entries, one, many):
    sizes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: sizes.append(out.numel()) or bmm(a, b, out=out))
    TF.squared_gradient_sum(torch.randn(7, 5, 4), torch.randn(7, 5, 6), workspace_mb=4 * entries / 2**20)
    assert sizes == (many if at_once else one)


def test_squared_gradient_sum_of_inputs_that_require_a_gradient():
    x, g = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 6)
    total = TF.squared_gradient_sum(x, g)
    assert not total.requires_grad
    torch.testing.assert_close(total, per_sample_squares(x.detach(), g), rtol=1e-4, atol=1e-6)


def test_one_token_needs_no_gradient_of_each_sample(monkeypatch):
    x, g = torch.randn(3, 1, 4), torch.randn(3, 1, 6)
    monkeypatch.setattr(torch, "bmm", None)
    torch.testing.assert_close(TF.squared_gradient_sum(x, g), per_sample_squares(x, g), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "shapes",
    [((3, 5, 4), (3, 4, 6)), ((2, 5, 4), (3, 5, 6)), ((5, 4), (5, 6)), ((3, 5), (3, 5, 6)), ((3, 5, 4), (3, 5))],
)
def test_squared_gradient_sum_refuses_shapes_that_do_not_match(shapes):
    with pytest.raises(ValueError, match=r"`inputs` and `grad_outputs` must be .* got \("):
        TF.squared_gradient_sum(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("value", [1e-30, -1e-30, math.nan, math.inf])
def test_a_token_has_a_gradient_if_any_entry_of_any_sample_is_not_zero(value):
    gradients = torch.zeros(2, 4, 3)
    gradients[1, 2, 1] = value
    assert TF.tokens_with_gradient(gradients).tolist() == [2]


# ---- eq. 3 ----


def naive_top_counts(scores, units, size):
    order = {name: i for i, name in enumerate(scores)}
    entries = [
        (-float(v), order[name], k, units[name]) for name, s in scores.items() for k, v in enumerate(s.flatten())
    ]
    chosen = [unit for *_, unit in sorted(entries)[:size]]
    return {unit: chosen.count(unit) for unit in units.values()}


def test_a_zero_with_a_sign_is_a_zero():
    scores = {"a": torch.tensor([[-0.0, 0.0], [2.0, -0.0]]), "b": torch.tensor([[1.0, -0.0]])}
    units = {"a": "a", "b": "b"}
    for percent, counts in ((100, {"a": 4, "b": 2}), (50, {"a": 2, "b": 1})):
        assert TF.top_counts(scores, units, percent) == counts


@pytest.mark.parametrize("top_percent", [0.5, 1, 10, 33.3, 50, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_counts_equal_a_sorted_list(top_percent, dtype):
    scores = {name: torch.rand(5, 8, dtype=dtype) ** 4 for name in "abc"}
    units = {"a": "u", "b": "v", "c": "u"}
    size = max(1, math.floor(top_percent * 120 / 100 + 0.5))
    assert TF.top_counts(scores, units, top_percent) == naive_top_counts(scores, units, size)


def test_top_counts_of_equal_scores_take_the_earlier_entry():
    scores = {"b": torch.tensor([[1.0, 2.0, 1.0]]), "a": torch.ones(1, 5)}
    assert TF.top_counts(scores, {"a": "a", "b": "b"}, 50) == {"b": 3, "a": 1}


def test_top_counts_tell_neighboring_floats_apart():
    x = torch.tensor(1e-30)
    scores = {"a": x.view(1, 1), "b": torch.nextafter(x, torch.tensor(1.0)).view(1, 1)}
    assert TF.top_counts(scores, {"a": "a", "b": "b"}, 50) == {"a": 0, "b": 1}


def test_top_counts_of_a_threshold_with_a_digit_of_ones():
    bits = torch.tensor([[0x3FF0FFFF00020000, 0x3FF0FFFF00010000, 0x3FF0FFFF00000000, 0x3FF0000000000000]])
    scores = {"a": bits[:, ::2].contiguous().view(torch.float64), "b": bits[:, 1::2].contiguous().view(torch.float64)}
    assert TF.top_counts(scores, {"a": "a", "b": "b"}, 50) == {"a": 1, "b": 1}


def test_top_counts_are_exact_beyond_what_a_float_can_count():
    scores = {"many": torch.ones(1, 2**24), **{name: torch.ones(1, 1) for name in "abcdefgh"}}
    counts = TF.top_counts(scores, {name: name for name in scores}, 100 * (2**24 + 4) / (2**24 + 8))
    assert counts == {"many": 2**24, **dict.fromkeys("abcd", 1), **dict.fromkeys("efgh", 0)}


@pytest.mark.parametrize("top_percent, size", [(1e-9, 1), (1, 1), (14, 1), (15, 2), (24, 2), (25, 3), (100, 10)])
def test_top_set_is_rounded_half_up_and_never_empty(top_percent, size):
    scores = {"a": torch.rand(2, 5)}
    assert TF.top_counts(scores, {"a": "a"}, top_percent) == {"a": size}


def test_unit_importance_is_the_share_of_the_top_set():
    scores = {"a": torch.tensor([[9.0, 8.0, 1.0, 1.0]]), "b": torch.tensor([[7.0, 0.0, 0.0, 0.0]])}
    weights = TF.unit_importance(scores, {"a": "a", "b": "b"}, 37.5)
    assert weights == {"a": 2 / 3, "b": 1 / 3}
    assert sum(weights.values()) == 1


def test_unit_importance_of_a_unit_without_a_top_entry_is_zero():
    scores = {"a": torch.full((1, 4), 2.0), "b": torch.ones(1, 4)}
    assert TF.unit_importance(scores, {"a": "a", "b": "b"}, 50) == {"a": 1.0, "b": 0.0}


# ---- eq. 4 ----


def test_allocation_is_in_proportion_to_the_least_unit():
    assert TF.allocate_connections({"a": 4, "b": 8, "c": 12}) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("count, connections", [(4, 1), (5, 1), (6, 2), (9, 2), (10, 3), (14, 4)])
def test_allocation_rounds_halves_up(count, connections):
    assert TF.allocate_connections({"least": 4, "u": count})["u"] == connections


def test_allocation_floors_counts_of_zero_at_one():
    assert TF.allocate_connections({"a": 0, "b": 3, "c": 1}) == {"a": 1, "b": 3, "c": 1}


def test_allocation_is_capped():
    assert TF.allocate_connections({"a": 1, "b": 1000}, max_connections=4) == {"a": 1, "b": 4}
    assert TF.allocate_connections({"a": 1, "b": 1000}, min_connections=2) == {"a": 2, "b": 2000}


def test_allocation_takes_a_minimum_that_is_not_whole_and_gives_at_least_one():
    assert TF.allocate_connections({"a": 1, "b": 2, "c": 4}, min_connections=0.25) == {"a": 1, "b": 1, "c": 1}
    assert TF.allocate_connections({"a": 1, "b": 2, "c": 4}, min_connections=0.75) == {"a": 1, "b": 2, "c": 3}


# ---- eqs. 5 and 6 ----


def naive_top_connections(score, count):
    rows = [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]) for row in score.tolist()]
    return torch.tensor(rows)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_top_connections_equal_a_sorted_list(count):
    score = torch.rand(20, 6)
    assert torch.equal(TF.top_connections(score, count), naive_top_connections(score, count))


@pytest.mark.parametrize("count", [1, 2, 3, 50, 99])
def test_top_connections_of_equal_scores_take_the_lower_column(count):
    score = torch.randint(0, 3, (40, 100)).float()
    columns = TF.top_connections(score, count)
    assert columns.dtype == torch.int64
    assert torch.equal(columns, naive_top_connections(score, count))


def test_top_connections_of_zeros_are_the_first_columns():
    assert TF.top_connections(torch.zeros(2, 1000), 3).tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("count", [0, -1, 7])
def test_top_connections_refuse_a_count_that_the_layer_has_not(count):
    with pytest.raises(ValueError, match=rf"`count` must be from 1 to the 6 inputs .* got {count}\."):
        TF.top_connections(torch.rand(2, 6), count)


# ---- eqs. 7 and 8 ----


@pytest.mark.parametrize("prefix", [1, 2])
def test_cls_attention_is_the_mean_row_of_the_softmax(prefix):
    query, key = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    expected = torch.zeros(2, 6 - prefix)
    for b in range(2):
        for h in range(3):
            row = torch.stack([query[b, h, 0] @ key[b, h, s] * 0.5 for s in range(6)]).exp()
            expected[b] += (row / row.sum())[prefix:] / 3
    torch.testing.assert_close(TF.cls_attention(query, key, 0.5, prefix), expected)


def test_cls_attention_counts_one_prefix_token_unless_told():
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    assert torch.equal(TF.cls_attention(query, key, 0.5), TF.cls_attention(query, key, 0.5, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cls_attention_is_float32(dtype):
    query, key = torch.randn(1, 2, 5, 4).to(dtype), torch.randn(1, 2, 5, 4).to(dtype)
    importance = TF.cls_attention(query, key, 0.5)
    assert importance.dtype == torch.float32
    exact = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(importance, TF.cls_attention(query.float(), key.float(), 0.5), **exact)


def test_products_that_float16_cannot_hold_count():
    query, key = torch.full((1, 1, 5, 64), 40.0), torch.full((1, 1, 5, 64), 30.0)
    key[:, :, 3] = -30.0
    importance = TF.cls_attention(query.half(), key.half(), 1e-4)
    torch.testing.assert_close(importance, TF.cls_attention(query, key, 1e-4))
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(TF.cls_attention(query, key, 1e-4), importance)


# ---- eq. 9 ----


@pytest.mark.parametrize(
    "tokens, rate, kept",
    [
        (196, 0.8, 156),
        (196, 0.95, 186),
        (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        (10, 0.7, 7),
        (10, 0.79, 7),
        (10, 0.01, 1),
        (196, 1e-12, 1),
        (10, 1.0, 10),
        (10, 0.95, 10),  # one token would be merged
        (10, 0.9, 10),
        (10, 0.89, 8),
        (2, 0.1, 2),
        (1, 0.5, 1),
        (3, 0.1, 1),
    ],
)
def test_kept_tokens(tokens, rate, kept):
    assert TF.kept_tokens(tokens, rate) == kept


def test_kept_tokens_of_every_exact_share():
    for tokens in range(1, 200):
        for kept in range(1, tokens - 1):
            assert TF.kept_tokens(tokens, kept / tokens) == kept


# ---- eqs. 10 and 11 ----


def naive_select_and_merge(hidden, importance, count, prefix):
    samples, indices = [], []
    for tokens, weights in zip(hidden, importance.tolist(), strict=True):
        kept = sorted(sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:count])
        others = [i for i in range(len(weights)) if i not in kept]
        total = sum(weights[i] for i in others)
        shares = [weights[i] / total if total else 1 / len(others) for i in others]
        merged = sum(share * tokens[prefix + i] for share, i in zip(shares, others, strict=True))
        samples.append(torch.stack([*tokens[:prefix], *(tokens[prefix + i] for i in kept), merged]))
        indices.append(kept)
    return torch.stack(samples), torch.tensor(indices)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("rate, count", [(0.8, 8), (0.5, 5), (0.29, 2), (0.01, 1)])
def test_select_and_merge_equals_a_loop(prefix, rate, count):
    hidden, importance = torch.randn(4, 10 + prefix, 6), torch.rand(4, 10)
    refined, kept = TF.select_and_merge(hidden, importance, rate, prefix)
    expected, expected_kept = naive_select_and_merge(hidden, importance, count, prefix)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(refined, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_merged_token_in_16_bits_is_rounded_once(dtype, autocast):
    hidden, importance = torch.randn(2, 101, 6).to(dtype), torch.rand(2, 100)
    with torch.autocast("cpu", dtype, enabled=autocast):
        refined, _ = TF.select_and_merge(hidden, importance, 0.1)
    assert torch.equal(refined, TF.select_and_merge(hidden.float(), importance, 0.1)[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_merged_token_alone(dtype):
    hidden, importance = torch.randn(2, 11, 6), torch.rand(2, 10)
    hidden[:, 1], importance[:, 0] = 1e6, 2.0  # a kept token, infinite in float16
    with torch.autocast("cpu", dtype):
        refined, _ = TF.select_and_merge(hidden, importance, 0.5)
    torch.testing.assert_close(refined, TF.select_and_merge(hidden, importance, 0.5)[0], rtol=1e-6, atol=1e-6)


def test_tokens_without_entries_are_merged_in_shape():
    refined, kept = TF.select_and_merge(torch.empty(2, 11, 6, device="meta"), torch.empty(2, 10, device="meta"), 0.5)
    assert (refined.shape, kept.shape) == ((2, 7, 6), (2, 5))


def test_kept_tokens_and_prefix_are_untouched():
    hidden, importance = torch.randn(2, 11, 6), torch.rand(2, 10)
    refined, kept = TF.select_and_merge(hidden, importance, 0.6)
    assert torch.equal(refined[:, 0], hidden[:, 0])
    for b in range(2):
        assert torch.equal(refined[b, 1:7], hidden[b, 1 + kept[b]])


def test_merge_weights_add_up_to_one():
    hidden = torch.ones(2, 11, 6, dtype=torch.float64)
    refined, _ = TF.select_and_merge(hidden, 1e-3 * torch.rand(2, 10, dtype=torch.float64), 0.5)
    torch.testing.assert_close(refined, torch.ones(2, 7, 6, dtype=torch.float64))


def test_merge_weights_follow_importance():
    hidden = torch.eye(5)[None, :, 1:]  # the token of patch i has a one in place i
    refined, kept = TF.select_and_merge(hidden, torch.tensor([[0.3, 0.1, 0.5, 0.1]]), 0.25)
    assert kept.tolist() == [[2]]
    torch.testing.assert_close(refined[0, -1], torch.tensor([0.6, 0.2, 0.0, 0.2]))


def test_importance_of_zero_merges_to_a_plain_mean():
    hidden = torch.randn(1, 11, 6)
    importance = torch.zeros(1, 10).index_fill(1, torch.tensor([3, 7]), 1.0)
    refined, kept = TF.select_and_merge(hidden, importance, 0.2)
    assert kept.tolist() == [[3, 7]]
    others = [i for i in range(10) if i not in (3, 7)]
    torch.testing.assert_close(refined[0, -1], hidden[0, 1:][others].mean(0))


def test_importance_of_zero_keeps_gradients_finite():
    importance = torch.zeros(1, 10, requires_grad=True)
    refined, _ = TF.select_and_merge(torch.randn(1, 11, 6), importance, 0.5)
    refined.sum().backward()
    assert importance.grad.isfinite().all()


def test_equal_importance_keeps_the_first_tokens():
    _, kept = TF.select_and_merge(torch.randn(1, 101, 2), torch.ones(1, 100), 0.3)
    assert kept.tolist() == [list(range(30))]


def test_onnx_keeps_the_same_of_equal_tokens(tmp_path):
    class Select(nn.Module):
        def forward(self, hidden, importance):
            return TF.select_and_merge(hidden, importance, 0.5)

    hidden, importance = torch.randn(2, 41, 6), torch.randint(3, (2, 40)).float()
    path = tmp_path / "select.onnx"
    torch.onnx.export(Select().eval(), (hidden, importance), path, dynamo=True, verbose=False)
    refined, kept = onnxruntime.InferenceSession(path).run(
        None, {"hidden": hidden.numpy(), "importance": importance.numpy()}
    )
    expected, expected_kept = naive_select_and_merge(hidden, importance, 20, 1)
    assert torch.equal(torch.tensor(kept), expected_kept)
    torch.testing.assert_close(torch.tensor(refined), expected)


@pytest.mark.parametrize("rate", [1.0, 0.95, 0.9])
def test_nothing_happens_where_one_token_or_none_would_be_merged(rate):
    hidden = torch.randn(2, 11, 6)
    refined, kept = TF.select_and_merge(hidden, torch.rand(2, 10), rate)
    assert refined is hidden
    assert kept.tolist() == [list(range(10))] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_select_and_merge_keeps_the_dtype(dtype):
    hidden, importance = torch.randn(2, 11, 6).to(dtype), torch.rand(2, 10)
    refined, _ = TF.select_and_merge(hidden, importance, 0.5)
    expected, _ = TF.select_and_merge(hidden.float(), importance, 0.5)
    assert refined.dtype == dtype
    torch.testing.assert_close(refined.float(), expected, rtol=0.02, atol=0.02)


def test_select_and_merge_is_as_exact_as_its_dtype():
    hidden, importance = torch.randn(2, 11, 6, dtype=torch.float64), torch.rand(2, 10, dtype=torch.float64)
    expected, _ = naive_select_and_merge(hidden, importance, 5, 1)
    torch.testing.assert_close(TF.select_and_merge(hidden, importance, 0.5)[0], expected, rtol=1e-12, atol=1e-12)
