"""The grid on two small tasks: cells that are there stay, those that are not are run, and the test is read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import grid
from benchmarks.cells import Recipe, run_cell
from benchmarks.grid import Grid, climb
from benchmarks.start import Pixels, Start
from benchmarks.variants import METHODS, VARIANTS, Variant
from pictures import write_folder
from tasks import RECIPE, Given, command

LINEAR, TRPTS = METHODS["linear"], METHODS["trpts"]


def test_a_grid_that_is_killed_goes_on(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, str, int]] = []
    validated: list[str] = []

    def counted(start: Start, task: str, variant: Variant, seed: int, *rest: Any) -> dict[str, Any]:
        runs.append((task, variant.name, seed))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return run_cell(start, task, variant, seed, *rest)

    monkeypatch.setattr(grid, "run_cell", counted)
    monkeypatch.setattr(grid, "validate", lambda start, variant, *_: validated.append(variant.name) or 50.0)
    ours, wanted = Grid(given.model, RECIPE, tmp_path / "grid"), (given.tasks, [LINEAR, TRPTS], [0, 1])
    with pytest.raises(KeyboardInterrupt):
        ours.run(*wanted)
    ours.run(*wanted)
    assert runs[2] == runs[3] == ("a", "linear", 1)
    assert len(set(runs)) + 1 == len(runs) == 2 * 2 * 2 + 1
    assert validated == ["linear"] * 3 + ["trpts"] * 3 + ["linear"] * 3 + ["trpts"] * 3
    files = sorted(str(path.relative_to(tmp_path / "grid")) for path in (tmp_path / "grid").rglob("seed-*.json"))
    assert files == sorted(f"{task}/{variant}/seed-{seed}.json" for task, variant, seed in set(runs))
    ours.run(*wanted)
    assert len(runs) == 9
    with pytest.raises(ValueError, match="`output` must hold cells of this model and recipe"):
        Grid(given.model, Recipe(epochs=2, batch_size=8), tmp_path / "grid").run(*wanted)


def test_the_test_images_decide_nothing(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are picked on validation images by training on the others; a cell trains on both, and is scored once."""
    calls: list[tuple[float, int, int]] = []

    def validated(start: Start, _: Variant, seed: int, rate: float, recipe: Recipe, validation: Pixels) -> float:
        calls.append((rate, len(start.pixels), len(validation)))
        return 100 - abs(rate - 0.03)

    def run(start: Start, task: str, _: Variant, seed: int, rate: float, recipe: Recipe, test: Pixels) -> Any:
        calls.append((rate, len(start.pixels), len(test)))
        return {"accuracy": 1.0, "training_seconds": 1.0}

    monkeypatch.setattr(grid, "validate", validated)
    monkeypatch.setattr(grid, "run_cell", run)
    Grid(given.model, RECIPE, tmp_path / "grid").run(given.tasks[:1], [LINEAR], [0])
    assert calls == [(0.01, 12, 3), (0.03, 12, 3), (0.09, 12, 3), (0.03, 15, 6)]


def test_a_variant_trains_at_the_rate_of_another(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Mapping[str, Any]] = []
    monkeypatch.setattr(grid, "validate", lambda start, variant, *_: searched.append(variant.name) or 1.0)
    monkeypatch.setattr(
        grid, "run_cell", lambda s, t, variant, seed, rate, *_: {"accuracy": rate, "training_seconds": 1.0}
    )
    output = tmp_path / "grid"
    Grid(given.model, Recipe(), output).run(given.tasks[:1], [VARIANTS["per-batch"], TRPTS], [0, 1])
    assert searched == ["trpts"] * 3
    chosen = json.loads((output / "a" / "per-batch" / "seed-1.json").read_text())["accuracy"]
    rates = json.loads((output / "a" / "trpts" / "rates.json").read_text())
    assert f"{chosen:g}" == "0.00333" == min(rates["validation_accuracy"], key=float)  # the lowest of equals
    assert rates["recipe"] == asdict(Recipe())


def test_rates_of_all_tasks_are_chosen_on_a_few(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mean over them; what was tried once is not tried again, not even for another choice."""
    tried: list[tuple[int, float]] = []
    used: dict[str, float] = {}
    write_folder(tmp_path / "suite" / "c", splits={"train": 6, "test": 1})
    a, b, c = given.tasks

    def validated(start: Start, _: Variant, seed: int, rate: float, *rest: Any) -> float:
        tried.append((len(start.pixels), rate))
        return {0.01: 50.0, 0.03: 60.0, 0.09: 58.0, 0.27: 1.0}[rate] + 10 * (len(start.pixels) == 14 and rate == 0.09)

    def run(start: Start, task: str, variant: Variant, seed: int, rate: float, *rest: Any) -> Any:
        used[task] = rate
        return {"accuracy": 1.0, "training_seconds": 1.0, "model": {"name": "base"}, "recipe": asdict(RECIPE)}

    monkeypatch.setattr(grid, "validate", validated)
    monkeypatch.setattr(grid, "run_cell", run)
    ours = Grid(given.model, RECIPE, tmp_path / "grid")
    ours.run([a], [LINEAR], [0])
    ours.run([b], [LINEAR], [0], choosing=[a, c])
    assert used == {"a": 0.03, "b": 0.09}
    assert tried == [(12, r) for r in (0.01, 0.03, 0.09)] + [(14, r) for r in (0.01, 0.03, 0.09)] + [
        (12, 0.27), (14, 0.27)]  # fmt: skip


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0, [-1, 0, 1]), (1, [0, 1, 2]), (3, [0, 1, 2, 3, 4]), (-2, [-3, -2, -1, 0, 1])],
)
def test_rates_are_tried_until_the_best_lies_between(best: int, tried: list[int]) -> None:
    rates = {place: float(f"{0.01 * 3.0**place:.3g}") for place in range(-5, 6)}
    found = climb(lambda rate: -abs(list(rates.values()).index(rate) - 5 - best), 0.01)
    assert sorted(found) == [rates[place] for place in tried]


def test_rates_that_are_all_the_same_are_not_tried_for_ever() -> None:
    assert sorted(climb(lambda rate: 1.0, 0.01)) == [0.00333, 0.01, 0.03]


def test_the_command(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(grid, "validate", lambda *_: 1.0)
    options = ["--tasks", "b", "--variants", "linear", "--seeds", 3, "--epochs", 1, "--threads", 1]
    command(monkeypatch, grid.main, given, "--output", tmp_path / "grid", *options)
    (cell,) = (tmp_path / "grid").rglob("seed-*.json")
    assert cell.parts[-3:] == ("b", "linear", "seed-3.json")
    assert json.loads(cell.read_text())["recipe"]["epochs"] == 1
    assert "b, linear, seed 3, learning rate 0.00333: " in capsys.readouterr().out
