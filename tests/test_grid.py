"""The grid on two small tasks: cells that are there stay, those that are not are run, and the test is read once."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import grid
from benchmarks.cells import Recipe, run_cell
from benchmarks.grid import Grid, climb
from benchmarks.start import Pixels, Start, weights_digest
from benchmarks.variants import ABLATIONS, METHODS, VARIANTS, Variant
from pictures import write_base, write_folder
from tasks import RECIPE, Given, command

LINEAR, TRPTS = METHODS["linear"], METHODS["trpts"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Nothing is trained: `validated` and `ran` list what would be, and `rates` says how good a rate is."""
    seen = SimpleNamespace(validated=[], ran=[], rates=lambda images, rate: -abs(rate - 0.03))

    def validated(start: Start, variant: Variant, seed: int, rate: float, recipe: Recipe, images: Pixels) -> float:
        seen.validated.append((variant.name, len(start.pixels), len(images), rate))
        return seen.rates(len(start.pixels), rate)

    def ran(start: Start, test: Pixels, task: str, variant: Variant, seed: int, rate: float, recipe: Recipe) -> Any:
        seen.ran.append((task, variant.name, seed, rate, len(start.pixels), len(test)))
        model = {"name": "base", "weights": weights_digest(start.model)}
        return {"accuracy": 1.0, "training_seconds": 1.0, "model": model, "recipe": asdict(recipe)}

    monkeypatch.setattr(grid, "validate", validated)
    monkeypatch.setattr(grid, "run_cell", ran)
    return seen


def test_a_grid_that_is_killed_goes_on(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, str, int]] = []
    searched: list[str] = []

    def killed(start: Start, test: Pixels, task: str, variant: Variant, seed: int, *rest: Any) -> dict[str, Any]:
        runs.append((task, variant.name, seed))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return run_cell(start, test, task, variant, seed, *rest)

    monkeypatch.setattr(grid, "run_cell", killed)
    monkeypatch.setattr(grid, "validate", lambda start, variant, *_: searched.append(variant.name) or 50.0)
    ours, wanted = Grid(given.model, RECIPE, tmp_path / "grid"), (given.tasks, [LINEAR, TRPTS], [0, 1])
    with pytest.raises(KeyboardInterrupt):
        ours.run(*wanted)
    ours.run(*wanted)
    assert runs[2] == runs[3] == ("a", "linear", 1)
    assert len(set(runs)) + 1 == len(runs) == 2 * 2 * 2 + 1
    assert searched == ["linear"] * 3 + ["trpts"] * 3 + ["linear"] * 3 + ["trpts"] * 3
    files = sorted(str(path.relative_to(tmp_path / "grid")) for path in (tmp_path / "grid").rglob("seed-*.json"))
    assert files == sorted(f"{task}/{variant}/seed-{seed}.json" for task, variant, seed in set(runs))
    ours.run(*wanted)
    assert len(runs) == 9


def test_cells_on_other_grounds_are_refused(given: Given, tmp_path: Path, counted: Any) -> None:
    ours, a = Grid(given.model, RECIPE, tmp_path / "grid"), given.tasks[:1]
    ours.run(a, [LINEAR], [0])
    (tmp_path / "elsewhere").mkdir()
    another = str(write_base(tmp_path / "elsewhere" / "base", seed=1))
    with pytest.raises(ValueError, match="`output` must hold cells of this recipe"):
        replace(ours, recipe=Recipe(epochs=2, batch_size=8)).run(a, [LINEAR], [0])
    with pytest.raises(ValueError, match="`output` must hold cells of this model"):
        replace(ours, model=another).run(a, [LINEAR], [0])
    with pytest.raises(ValueError, match="`output` must hold cells of this variant"):
        ours.run(a, [replace(LINEAR, probed_head=False)], [0])
    with pytest.raises(ValueError, match="`output` must hold cells of this rate_chosen_on"):
        ours.run(a, [LINEAR], [0], choosing=given.tasks)
    with pytest.raises(ValueError, match="`output` must hold cells of this seed"):
        ours.run(a, [LINEAR], [1])
    assert len(counted.ran) == 1 and len(counted.validated) == 3


def test_what_a_record_does_not_name_has_its_default(given: Given, tmp_path: Path, counted: Any) -> None:
    """Of cells from before a variant had that attribute."""
    ours, a = Grid(given.model, RECIPE, tmp_path / "grid"), given.tasks[:1]
    ours.run(a, [LINEAR], [0])
    for path in (tmp_path / "grid").rglob("*.json"):
        content = json.loads(path.read_text())
        del content["variant"]["macs_of"]
        path.write_text(json.dumps(content))
    ours.run(a, [LINEAR], [0, 1])
    assert len(counted.ran) == 2 and len(counted.validated) == 3
    with pytest.raises(ValueError, match="`output` must hold cells of this variant"):
        ours.run(a, [replace(LINEAR, macs_of="trpts")], [0])


def test_the_test_images_decide_nothing(given: Given, tmp_path: Path, counted: Any) -> None:
    """Rates are picked on validation images by training on the others; a cell trains on both, and is scored once."""
    Grid(given.model, RECIPE, tmp_path / "grid").run(given.tasks[:1], [LINEAR], [0])
    assert counted.validated == [("linear", 12, 3, rate) for rate in (0.01, 0.03, 0.09)]
    assert counted.ran == [("a", "linear", 0, 0.03, 15, 6)]


def test_a_variant_trains_at_the_rate_of_another(given: Given, tmp_path: Path, counted: Any) -> None:
    Grid(given.model, RECIPE, tmp_path / "grid").run(given.tasks[:1], [VARIANTS["per-batch"], TRPTS], [0, 1])
    assert [name for name, *_ in counted.validated] == ["trpts"] * 3
    assert [(name, seed, rate) for _, name, seed, rate, *_ in counted.ran] == [
        (name, seed, 0.03) for seed in (0, 1) for name in ("per-batch", "trpts")
    ]


def test_a_variant_trains_faster_than_another(given: Given, tmp_path: Path, counted: Any) -> None:
    Grid(given.model, RECIPE, tmp_path / "grid").run(given.tasks[:1], [VARIANTS["trpts-fast"]], [0])
    assert [(name, rate) for name, _, _, rate in counted.validated] == [("trpts", r) for r in (0.01, 0.03, 0.09)]
    assert [(name, rate) for _, name, _, rate, *_ in counted.ran] == [("trpts-fast", 0.09)]


def test_rates_of_all_tasks_are_chosen_on_a_few(given: Given, tmp_path: Path, counted: Any) -> None:
    """By the mean over them; what was tried once is not tried again, not even for another choice."""
    write_folder(Path(given.source) / "c", splits={"train": 6, "test": 1})  # 14 images to train on, not 12
    accuracy = {0.01: 50.0, 0.03: 60.0, 0.09: 58.0, 0.27: 1.0}
    counted.rates = lambda images, rate: accuracy[rate] + 10 * (images == 14 and rate == 0.09)
    a, b, c = given.tasks
    ours = Grid(given.model, RECIPE, tmp_path / "grid")
    ours.run([a], [LINEAR], [0])
    ours.run([b, c], [LINEAR], [0], choosing=[a, c])
    assert [(task, rate) for task, _, _, rate, *_ in counted.ran] == [("a", 0.03), ("b", 0.09), ("c", 0.09)]
    tried = [(images, rate) for _, images, _, rate in counted.validated]
    assert tried[:3] == [(12, rate) for rate in (0.01, 0.03, 0.09)]
    assert tried[3:] == [(14, rate) for rate in (0.01, 0.03, 0.09)] + [(12, 0.27), (14, 0.27)]
    cell = json.loads((tmp_path / "grid" / "b" / "linear" / "seed-0.json").read_text())
    assert cell["rate_chosen_on"] == ["a", "c"]


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0, [-1, 0, 1]), (1, [0, 1, 2]), (3, [0, 1, 2, 3, 4]), (-2, [-3, -2, -1, 0, 1])],
)
def test_rates_are_tried_until_the_best_lies_between(best: int, tried: list[int]) -> None:
    rates = {place: float(f"{0.01 * 3.0**place:.3g}") for place in range(-5, 6)}
    seen: list[float] = []
    assert (
        climb(lambda rate: seen.append(rate) or -abs(list(rates.values()).index(rate) - 5 - best), 0.01) == rates[best]
    )
    assert sorted(seen) == [rates[place] for place in tried]


def test_a_rate_no_better_than_its_neighbors_is_one_that_has_two() -> None:
    seen: list[float] = []
    assert climb(lambda rate: seen.append(rate) or 1.0, 0.01) == 0.01
    assert sorted(seen) == [0.00333, 0.01, 0.03]


def test_the_command(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(grid, "validate", lambda *_: 1.0)
    options = ["--output", tmp_path / "grid", "--variants", "linear", "--seeds", 3, "--epochs", 1, "--threads", 1]
    command(monkeypatch, grid.main, given, *options, "--tasks", "b")
    (cell,) = (tmp_path / "grid").rglob("seed-*.json")
    assert cell.parts[-3:] == ("b", "linear", "seed-3.json")
    assert json.loads(cell.read_text())["recipe"]["epochs"] == 1
    assert "b, linear, seed 3, learning rate 0.01: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="`tasks` must be among a, b, got 'd'"):
        command(monkeypatch, grid.main, given, *options, "--choosing", "d")


def test_the_command_runs_the_ablations(given: Given, tmp_path: Path, monkeypatch: Any, counted: Any) -> None:
    options = ["--output", tmp_path / "grid", "--ablations", "--seeds", 0, "--tasks", "a"]
    command(monkeypatch, grid.main, given, *options)
    ran = [name for _, name, *_ in counted.ran]
    assert len(ran) == len(set(ran)) and set(ran) == {v.name for every in ABLATIONS.values() for v in every}
    with pytest.raises(SystemExit):
        command(monkeypatch, grid.main, given, *options, "--variants", "linear")
