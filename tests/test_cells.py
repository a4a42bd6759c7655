"""A cell: the same number again, the head that all start from, and TR-PTS calibrated as `calibrate` does it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

from benchmarks import cells
from benchmarks.cells import Recipe, network, run_cell
from benchmarks.variants import METHODS, SETTINGS, VARIANTS, Variant
from tasks import RECIPE, Given
from trpts_peft import TRPTSConfig, apply_token_selection, calibrate, estimate_cost

SMALL = {**SETTINGS, "token_layers": 1, "keep_rate": 0.5}  # of a ViT with four blocks


@pytest.mark.parametrize("name", ["trpts", "lora"])
def test_a_cell_run_again_gives_its_number(given: Given, name: str) -> None:
    start = given.start()
    test = given.test_images(start)
    first, again, other = (
        run_cell(s, test, "a", METHODS[name], seed, 0.01, RECIPE)
        for s, seed in ((start, 0), (given.start(), 0), (start, 1))
    )
    assert first.pop("training_seconds") > 0 and again.pop("training_seconds") > 0
    assert json.loads(json.dumps(first)) == json.loads(json.dumps(again))
    assert other["loss"] != first["loss"]
    assert first["images"]["train"] == 15 and first["images"]["test"] == 6 and first["images"]["classes"] == 3
    assert first["bytes"] > 0 and first["parameters"]["trainable"] > 0
    assert given.source not in json.dumps(first) and first["model"]["name"] == "base"


def test_a_cell_is_the_same_whatever_ran_before(given: Given) -> None:
    """LoRA draws its start; the probe and the scores, measured or not yet, must not move the draw."""
    fresh, used = given.start(), given.start()
    used.scores("fisher", {"labels": "model"})
    states = [network(start, METHODS["lora"], seed=5).state_dict() for start in (fresh, used, used)]
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:] for name in state)


def test_what_is_drawn_differs_between_seeds(given: Given) -> None:
    start = given.start()
    placed = Variant("x", "trpts", {**SMALL, "importance": "random"}, draws=True)
    columns = [network(start, placed, seed).state_dict()["base_model.model.vit.layers.0.mlp.fc1.trpts_columns.default"]
               for seed in (1, 1, 2)]  # fmt: skip
    assert torch.equal(columns[0], columns[1]) and not torch.equal(columns[0], columns[2])


def test_a_run_that_diverged_is_recorded(given: Given) -> None:
    start = given.start()
    cell = run_cell(start, given.test_images(start), "a", METHODS["full"], 0, 1e30, RECIPE)
    assert cell["loss"] is None and json.dumps(cell, allow_nan=False)


def test_all_methods_start_from_one_head(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step, what is scored is the probe, the same under every method."""
    start = given.start()
    test = given.test_images(start)
    monkeypatch.setattr(cells.Trainer, "train", lambda self: None)

    def loss(variant: Variant) -> float:
        return run_cell(start, test, "a", variant, 0, 0.01, RECIPE)["loss"]

    losses = [loss(METHODS[name]) for name in ("linear", "lora", "trpts-all-tokens")]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    assert loss(Variant("random", "linear", probed_head=False)) > losses[0]


@pytest.mark.parametrize("importance", ["fisher", "gradient", "magnitude"])
def test_trpts_is_calibrated_as_by_calibrate(given: Given, importance: str) -> None:
    start, options = given.start(), {**SMALL, "importance": importance}
    ours = network(start, Variant("x", "trpts", options), seed=0)
    plain = get_peft_model(start.base(), TRPTSConfig(modules_to_save=["classifier"], **options))
    calibrate(plain, start.pixels, progress=False)
    assert ours.peft_config["default"].selected_token_layers == plain.peft_config["default"].selected_token_layers
    states = [model.state_dict() for model in (ours, plain)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_random_head_is_scored_with_itself(given: Given) -> None:
    start = given.start()
    ours = network(start, Variant("x", "trpts", SMALL, probed_head=False), seed=3)
    torch.manual_seed(3)
    plain = get_peft_model(start.base(probed_head=False), TRPTSConfig(modules_to_save=["classifier"], **SMALL))
    calibrate(plain, start.pixels, probe_head=False, progress=False)
    states = [model.state_dict() for model in (ours, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_how_it_is_measured_reaches_the_columns(given: Given) -> None:
    start = given.start()
    models = [network(start, Variant("x", "trpts", SMALL, s), 0) for s in ({}, {"per_batch": 8}, {"num_samples": 3})]
    columns = [torch.cat([b.flatten() for n, b in m.named_buffers() if "columns" in n]) for m in models]
    assert not torch.equal(columns[0], columns[1]) and not torch.equal(columns[0], columns[2])


def test_another_method_drops_tokens_where_trpts_would(given: Given) -> None:
    start = given.start()
    ours = network(start, Variant("x", "trpts", SMALL), 0).peft_config["default"].selected_token_layers
    linear = network(start, Variant("y", "linear", token_options=SMALL), 0)
    assert linear.config.trpts_keep_rates == {str(layer): 0.5 for layer in ours}
    assert VARIANTS["linear-tokens"].token_options == SETTINGS


@pytest.mark.parametrize("variant", ["dense-equal", "random-equal"])
def test_a_placement_saves_as_much_as_another(given: Given, variant: str) -> None:
    """No keep rate comes closer, and none that is greater does as well."""
    start, seed = given.start(), 1
    wanted = estimate_cost(network(start, VARIANTS["sparse-0.8"], seed)).macs
    model = network(start, VARIANTS[variant], seed)
    config = model.peft_config["default"]
    plain, found = start.base(), {}
    for rate in (thousandths / 1000 for thousandths in range(1, 1001)):
        apply_token_selection(plain, dict.fromkeys(config.selected_token_layers, rate))
        found[rate] = abs(estimate_cost(plain).macs - wanted)
    assert found[config.keep_rate] == abs(estimate_cost(model).macs - wanted) == min(found.values())
    assert config.keep_rate == max(rate for rate in found if found[rate] == min(found.values()))
    assert config.token_placement == variant.partition("-")[0]


def test_the_recipe_is_followed(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates rise for `warmup` of the steps and fall as a cosine; batches and epochs are those asked for."""
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *arguments: object) -> object:
        group = self.param_groups[0]
        seen.append(group["lr"])
        assert group["weight_decay"] == 0
        return step(self, *arguments)

    clip, norms = torch.nn.utils.clip_grad_norm_, set()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda ps, norm, **k: norms.add(norm) or clip(ps, norm, **k))
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    start = given.start()
    recipe = Recipe(epochs=5, batch_size=8, warmup=0.2)
    run_cell(start, given.test_images(start), "a", METHODS["linear"], 0, 0.1, recipe)
    assert norms == {1.0}
    assert len(seen) == 10  # 15 images: two steps an epoch
    assert seen[:3] == [0.0, 0.05, 0.1]
    assert seen[6] == pytest.approx(0.05) and all(a > b for a, b in pairwise(seen[2:]))
