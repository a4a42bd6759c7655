"""The blocks that placements pick, against those of the models that train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import placements
from benchmarks.cells import network
from benchmarks.variants import VARIANTS
from tasks import Given, command
from trpts_peft import estimate_cost


@pytest.mark.parametrize(
    ("variant", "seeds"), [("sparse-0.8", 1), ("dense-0.8", 1), ("random-0.8", 3), ("dense-equal", 1)]
)
def test_blocks_are_those_of_the_model_that_trains(given: Given, variant: str, seeds: int) -> None:
    start = given.start()
    found = placements.placements(start, [variant], [0, 1, 2])[variant]
    assert len(found) == seeds
    for seed, one in enumerate(found):
        model = network(start, VARIANTS[variant], seed)
        assert one["blocks"] == model.peft_config["default"].selected_token_layers
        assert one["keep_rate"] == model.peft_config["default"].keep_rate
        assert one["speedup"] == pytest.approx(estimate_cost(model).speedup)


def test_the_command_looks_at_every_task(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--variants", "random-0.8", "--seeds", 5, 6, "--output", tmp_path / "placements.json"]
    command(monkeypatch, placements.main, given, *options)
    found = json.loads((tmp_path / "placements.json").read_text())["tasks"]
    assert list(found) == ["a", "b"]
    assert found["a"] == placements.placements(given.start(), ["random-0.8"], [5, 6])
