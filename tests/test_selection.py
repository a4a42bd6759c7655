"""Selection against a loop over sorted lists."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn
from transformers import ViTForMaskedImageModeling

from trpts_peft import FisherScores, TRPTSConfig, select
from trpts_peft.cost import Geometry, geometry_of, predicted_speedup
from trpts_peft.selection import unit_of

LINEARS = ("attention.q_proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def vit(tiny_vit):
    return tiny_vit()


def scores_of(vit, blocks=range(4), *, seed=0, power=6):
    """Random scores, few of them large, of three linears in each block."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"vit.layers.{b}.{linear}" for b in blocks for linear in LINEARS]
    shapes = {name: vit.get_submodule(name).weight.shape for name in names}
    return FisherScores({n: torch.rand(s, generator=generator) ** power for n, s in shapes.items()}, 10)


def block_scores(vit, rows):
    """The same score in all of a block's entries, {block: value}; equal values make a tie."""
    scores = scores_of(vit)
    return FisherScores({n: torch.full_like(s, float(rows[int(n.split(".")[2])])) for n, s in scores.items()}, 10)


def block_of(linear):
    return ".".join(linear.split(".")[:3])


def naive(scores, config, unit_of_linear):
    """Importance, connections and columns from plain Python lists."""
    order = list(scores)
    entries = [(-v, order.index(n), k) for n, s in scores.items() for k, v in enumerate(s.flatten().tolist())]
    top = sorted(entries)[: math.floor(len(entries) * config.top_percent / 100 + 0.5)]
    counts = {unit_of_linear(n): 0 for n in order}
    for _, index, _ in top:
        counts[unit_of_linear(order[index])] += 1
    least = min(max(1, count) for count in counts.values())
    connections, columns = {}, {}
    for name, score in scores.items():
        wanted = math.floor(max(1, counts[unit_of_linear(name)]) / least * config.min_connections + 0.5)
        count = min(max(1, wanted), config.max_connections or math.inf, score.shape[1])
        rows = [sorted(sorted(range(len(r)), key=lambda i: (-r[i], i))[:count]) for r in score.tolist()]
        connections[name], columns[name] = count, torch.tensor(rows)
    return {unit: count / len(top) for unit, count in counts.items()}, connections, columns


# ---- connections ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_percent": 10.0},
        {"top_percent": 0.2, "max_connections": None},
        {"min_connections": 2, "max_connections": 7},
        {"allocation_unit": "module", "max_connections": 8},
    ],
)
def test_select_equals_sorted_lists(vit, options):
    config, scores = TRPTSConfig(**options), scores_of(vit)
    unit_of_linear = str if config.allocation_unit == "module" else block_of
    importance, connections, columns = naive(scores, config, unit_of_linear)
    selection = select(scores, config, vit)
    assert selection.importance == importance
    assert selection.connections == connections
    assert all(torch.equal(selection.columns[name], columns[name]) for name in scores)
    assert sum(selection.importance.values()) == pytest.approx(1)
    assert selection.trainable == sum(c.numel() for c in columns.values())


def test_units():
    assert unit_of("vit.layers.11.mlp.fc1", "block") == "vit.layers.11"
    assert unit_of("vit.layers.11.mlp.fc1", "module") == "vit.layers.11.mlp.fc1"
    assert unit_of("vit.pooler.dense", "block") == "vit.pooler.dense"


def test_units_are_blocks_however_deep_the_model_lies(vit):
    scores = scores_of(vit)
    nested = nn.ModuleDict({"towers": nn.ModuleList([vit])})
    deep = FisherScores({f"towers.0.{name}": score for name, score in scores.items()}, 10)
    flat, selection = select(scores, TRPTSConfig(), vit), select(deep, TRPTSConfig(), nested)
    assert selection.importance == {f"towers.0.{unit}": w for unit, w in flat.importance.items()}
    assert selection.connections == {f"towers.0.{name}": count for name, count in flat.connections.items()}
    assert selection.token_layers == flat.token_layers


def test_a_linear_outside_any_block_is_its_own_unit(vit):
    scores = FisherScores({**scores_of(vit), "classifier": torch.rand(3, 32)}, 10)
    selection = select(scores, TRPTSConfig(), vit)
    assert "classifier" in selection.importance
    assert selection.columns["classifier"].shape == (3, selection.connections["classifier"])


def test_connections_are_capped_by_the_inputs():
    model = nn.ModuleDict({"narrow": nn.Linear(2, 5), "wide": nn.Linear(30, 5)})
    scores = FisherScores({"narrow": torch.full((5, 2), 9.0), "wide": torch.rand(5, 30)}, 1)
    options = {"min_connections": 6, "max_connections": 20, "top_percent": 10.0, "allocation_unit": "module"}
    selection = select(scores, TRPTSConfig(target_modules=["narrow", "wide"], **options), model)
    assert selection.connections == {"narrow": 2, "wide": 6}  # 10 and 6 entries are on top


def test_a_block_without_a_top_entry_counts_as_one(vit):
    selection = select(block_scores(vit, [5, 1, 1, 1]), TRPTSConfig(max_connections=3), vit)
    assert selection.importance["vit.layers.1"] == 0
    assert {selection.connections[f"vit.layers.{b}.mlp.fc1"] for b in (1, 2, 3)} == {1}
    assert selection.connections["vit.layers.0.mlp.fc1"] == 3


# ---- budget ----


def reachable(scores, max_connections):
    """Numbers of trainable weights for a dense grid of C_min, by the formula itself."""
    size, totals = sum(s.numel() for s in scores.values()), set()
    importance, _, _ = naive(scores, TRPTSConfig(), block_of)
    least = min(importance.values())
    assert least > 0
    for step in range(1, 4000):
        total = 0
        for name, score in scores.items():
            wanted = math.floor(importance[block_of(name)] / least * step / 400 + 0.5)
            total += score.shape[0] * min(max(1, wanted), max_connections, score.shape[1])
        totals.add(total)
    return totals, size


@pytest.mark.parametrize("budget", [0.025, 0.03, 0.05, 0.08, 0.11, 0.1875])
def test_a_budget_comes_as_close_as_the_integers_allow(vit, budget):
    scores = scores_of(vit, power=2)
    totals, size = reachable(scores, max_connections=8)
    selection = select(scores, TRPTSConfig(budget=budget, max_connections=8), vit)
    assert abs(selection.trainable - budget * size) == min(abs(total - budget * size) for total in totals)


def test_more_budget_never_trains_less(vit):
    scores = scores_of(vit, power=2)
    trained = [
        select(scores, TRPTSConfig(budget=b / 1000, max_connections=8), vit).trainable for b in range(25, 200, 25)
    ]
    assert trained == sorted(trained)
    assert len(set(trained)) > 4


def test_the_whole_of_the_weights_is_a_budget(vit):
    selection = select(scores_of(vit), TRPTSConfig(budget=1.0, max_connections=None), vit)
    assert {name: c.shape[1] for name, c in selection.columns.items()} == {
        name: vit.get_submodule(name).in_features for name in selection.columns
    }


@pytest.mark.parametrize("budget", [0.001, 0.5])
def test_a_budget_out_of_reach_names_the_least_and_the_greatest(vit, budget):
    scores = scores_of(vit)
    rows, size = 4 * (32 + 64 + 32), sum(s.numel() for s in scores.values())
    with pytest.raises(ValueError, match="`budget` must be from ") as caught:
        select(scores, TRPTSConfig(budget=budget), vit)
    least, greatest = re.search(r"from ([\d.e-]+) .* to ([\d.e-]+) ", str(caught.value)).groups()
    assert [float(least), float(greatest)] == pytest.approx([rows / size, 4 * rows / size], rel=1e-5)
    assert str(caught.value).endswith(f"got {budget!r}.")


@pytest.mark.parametrize("end", [0, 1])
def test_the_budgets_that_the_error_names_are_taken(end):
    model = nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.Linear(13, 3)})
    scores = FisherScores({"a": torch.rand(5, 7), "b": torch.rand(3, 13)}, 1)
    with pytest.raises(ValueError, match="`budget` must be from ") as caught:
        select(scores, TRPTSConfig(target_modules=["a", "b"], budget=1e-9), model)
    named = float(re.search(r"from ([\d.e-]+) .* to ([\d.e-]+) ", str(caught.value)).groups()[end])
    selection = select(scores, TRPTSConfig(target_modules=["a", "b"], budget=named), model)
    assert set(selection.connections.values()) == {(1, 4)[end]}


# ---- token layers ----


def test_sparse_insertion_takes_the_fewest_trainable_connections(vit):
    boosted = {n: s * [9, 1, 5, 2][int(n.split(".")[2])] for n, s in scores_of(vit, power=1).items()}
    config = TRPTSConfig(token_layers=2, max_connections=32, top_percent=70.0)
    selection = select(FisherScores(boosted, 10), config, vit)
    trainable = [sum(c.numel() for n, c in selection.columns.items() if f"layers.{b}." in n) for b in range(4)]
    assert selection.token_layers == (1, 3)
    assert max(trainable[1], trainable[3]) < min(trainable[0], trainable[2])


def test_equal_connections_are_told_apart_by_importance_before_fisher(vit):
    scores = block_scores(vit, [1, 1, 1, 1])
    for block, tops, value in (
        (2, 5, 1e6),
        (0, 6, 1e5),
        (3, 9, 1e3),
        (1, 100, 2.0),
    ):  # by w 2, 0, 3, 1; by sum reversed
        scores[f"vit.layers.{block}.mlp.fc1"].view(-1)[:tops] = value
    config = TRPTSConfig(max_connections=1, token_layers=2, top_percent=100 * 120 / 20480)
    assert select(scores, config, vit).token_layers == (0, 2)


def test_equal_importance_is_told_apart_by_the_sum_of_fisher(vit):
    scores = block_scores(vit, [1, 0.2, 0.1, 0.3])
    config = TRPTSConfig(max_connections=1, token_layers=2, top_percent=1.0)
    assert select(scores, config, vit).token_layers == (1, 2)


@pytest.mark.parametrize("count, layers", [(1, (3,)), (2, (2, 3)), (4, (0, 1, 2, 3))])
def test_equal_blocks_give_the_later_one(vit, count, layers):
    scores = block_scores(vit, [1, 1, 1, 1])
    config = TRPTSConfig(max_connections=1, top_percent=100.0, token_layers=count)
    assert select(scores, config, vit).token_layers == layers


@pytest.mark.parametrize("count", [1, 2, 3])
def test_dense_placement_is_the_mirror_image(vit, count):
    for scores in (scores_of(vit), block_scores(vit, [1, 1, 1, 1])):
        dense = select(scores, TRPTSConfig(token_layers=count, token_placement="dense"), vit).token_layers
        sparse = select(scores, TRPTSConfig(token_layers=4 - count), vit).token_layers
        assert sorted({*dense, *sparse}) == [0, 1, 2, 3]


def test_random_placement_follows_the_seed_alone(vit):
    def draw(seed, scores_seed=0):
        config = TRPTSConfig(token_layers=2, token_placement="random", seed=seed)
        return select(scores_of(vit, seed=scores_seed), config, vit).token_layers

    assert [draw(seed) for seed in range(8)] == [draw(seed, scores_seed=1) for seed in range(8)]
    assert len({draw(seed) for seed in range(8)}) > 2


@pytest.mark.parametrize("layers", [[2], [3, 0], []])
def test_a_list_is_taken_as_it_is(vit, layers):
    for placement in ("sparse", "dense", "random"):
        config = TRPTSConfig(token_layers=layers, token_placement=placement)
        assert select(scores_of(vit), config, vit).token_layers == tuple(sorted(layers))


def test_blocks_without_a_targeted_linear_are_no_candidates(vit):
    scores = scores_of(vit, blocks=(0, 2))
    assert select(scores, TRPTSConfig(token_layers=2), vit).token_layers == (0, 2)
    with pytest.raises(ValueError, match=r"`token_layers` must be at most 2, .* got 3\."):
        select(scores, TRPTSConfig(token_layers=3), vit)


@pytest.mark.parametrize("placement", ["sparse", "dense", "random"])
def test_more_token_layers_than_blocks_are_refused(vit, placement):
    with pytest.raises(ValueError, match=r"`token_layers` must be at most 4, .* got 5\."):
        select(scores_of(vit), TRPTSConfig(token_layers=5, token_placement=placement), vit)


def test_a_block_that_the_model_has_not_is_refused(vit):
    with pytest.raises(ValueError, match=r"`token_layers` must be block indices below 4, got \[4\]\."):
        select(scores_of(vit), TRPTSConfig(token_layers=[4]), vit)


def test_models_outside_the_table_select_no_tokens():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    scores = FisherScores({"0": torch.rand(5, 6), "2": torch.rand(4, 5)}, 1)
    selection = select(scores, TRPTSConfig(target_modules=["0", "2"], token_layers=3), model)
    assert selection.token_layers == ()
    assert selection.speedup is None
    with pytest.raises(ValueError, match=r"`token_layers` must be an integer .* got \[0\]"):
        select(scores, TRPTSConfig(target_modules=["0", "2"], token_layers=[0]), model)


def test_a_model_that_needs_every_patch_is_refused(tiny_vit):
    model = tiny_vit(model_class=ViTForMaskedImageModeling)
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling"):
        select(scores_of(model), TRPTSConfig(), model)
    assert select(scores_of(model), TRPTSConfig(token_layers=0), model).token_layers == ()


def test_deit_blocks_are_found(tiny_vit):
    model = tiny_vit("deit")
    scores = {n.replace("vit.", "deit."): s for n, s in scores_of(tiny_vit()).items()}
    assert len(select(FisherScores(scores, 1), TRPTSConfig(token_layers=2), model).token_layers) == 2


# ---- purity, refusals, text ----


def test_select_changes_nothing(vit):
    scores, config = scores_of(vit), TRPTSConfig(token_placement="random")
    before = copy.deepcopy((dict(scores), config, vit.state_dict())), torch.get_rng_state()
    first, second = select(scores, config, vit), select(scores, config, vit)
    assert first.token_layers == second.token_layers
    assert config == before[0][1]
    assert all(torch.equal(scores[n], before[0][0][n]) for n in scores)
    assert all(torch.equal(t, before[0][2][n]) for n, t in vit.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_no_scores_are_refused(vit, value):
    scores = scores_of(vit)
    scores["vit.layers.1.mlp.fc1"][0, 0] = value
    with pytest.raises(ValueError, match=r"`scores` must be finite and not negative.*vit\.layers\.1\.mlp\.fc1"):
        select(scores, TRPTSConfig(), vit)


def test_scores_of_zero_or_of_nothing_are_refused(vit):
    with pytest.raises(ValueError, match="`scores` must not all be zero"):
        select(block_scores(vit, [0, 0, 0, 0]), TRPTSConfig(), vit)
    with pytest.raises(ValueError, match="`scores` must hold at least one linear"):
        select(FisherScores({}, 0), TRPTSConfig(), vit)


def test_a_selection_is_frozen(vit):
    with pytest.raises(AttributeError):
        select(scores_of(vit), TRPTSConfig(), vit).token_layers = ()


def test_the_summary_tells_units_totals_and_token_layers(vit):
    selection = select(scores_of(vit), TRPTSConfig(token_layers=[1, 2], keep_rate=0.8, min_connections=2), vit)
    lines = selection.summary().splitlines()
    assert lines[0].split() == ["unit", "w", "%", "C", "weights"]
    for line, (unit, w) in zip(lines[1:5], selection.importance.items(), strict=True):
        weights = sum(c.numel() for n, c in selection.columns.items() if n.startswith(f"{unit}."))
        count = selection.connections[f"{unit}.mlp.fc1"]
        assert line.split() == [unit, f"{100 * w:.2f}", str(count), f"{weights:,}"]
    share = 100 * selection.trainable / 20480
    assert lines[5] == f"trainable weights: {selection.trainable:,} of 20,480 ({share:.3f} %)"
    assert lines[6] == (
        f"token selection: blocks 1, 2, keep rate 0.8, predicted speed-up of inference {selection.speedup:.2f}"
    )


def test_the_summary_without_token_layers(vit):
    assert select(scores_of(vit), TRPTSConfig(token_layers=0), vit).summary().endswith("token selection: none")


def test_the_predicted_speedup_is_that_of_the_chosen_blocks(vit):
    selection = select(scores_of(vit), TRPTSConfig(token_layers=[0, 2], keep_rate=0.5), vit)
    assert selection.speedup == predicted_speedup(geometry_of(vit), {0: 0.5, 2: 0.5}) > 1


@pytest.mark.parametrize("blocks, speedup", [((9, 10, 11), 1.08), ((3, 6, 9), 1.33), ((0, 1, 2), 1.78)])
def test_the_speedups_of_the_design(blocks, speedup):
    base = Geometry(tokens=196, prefix=1, hidden=768, intermediate=3072, blocks=12, patch_inputs=768, head=768_000)
    assert predicted_speedup(base, dict.fromkeys(blocks, 0.8)) == pytest.approx(speedup, abs=0.01)
