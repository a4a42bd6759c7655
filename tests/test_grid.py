"""The grid on two small tasks: cells that are there stay, those that are not are run, and the test is read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from benchmarks import cells, grid
from benchmarks.cells import Cell, Recipe, run_cell
from benchmarks.grid import run_grid, table
from benchmarks.suites import tasks_of
from pictures import write_base, write_folder

RECIPE = Recipe(epochs=1, batch_size=8)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], str]:
    """Two tasks and a model."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("a", "b"):
        write_folder(tmp_path / "suite" / name, splits={"train": 5, "test": 2})
    return tasks_of("local", str(tmp_path / "suite")), str(write_base(tmp_path / "base"))


def test_a_grid_that_is_killed_goes_on(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, model = given
    runs: list[tuple[str, str, int]] = []

    def counted(model: str, splits: Any, cell: Cell, rate: float, recipe: Recipe) -> dict[str, Any]:
        runs.append((cell.task, cell.method, cell.seed))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return run_cell(model, splits, cell, rate, recipe)

    monkeypatch.setattr(grid, "run_cell", counted)
    wanted = (tasks, ["linear", "trpts"], [0, 1], model, RECIPE, tmp_path / "grid")
    with pytest.raises(KeyboardInterrupt):
        run_grid(*wanted)
    found = run_grid(*wanted)
    assert runs[2] == runs[3] == ("a", "trpts", 0)
    assert len(runs) == len(set(runs)) + 1 == 2 * 2 * 2 + 1
    assert capsys.readouterr().out.count("rates [") == 4
    assert [(cell["task"], cell["method"], cell["seed"]) for cell in found] == list(dict.fromkeys(runs))
    assert run_grid(*wanted) == found and len(runs) == 9
    with pytest.raises(ValueError, match="`output` must hold cells of this model and recipe"):
        run_grid(*wanted[:4], Recipe(epochs=2, batch_size=8), tmp_path / "grid")


def test_the_test_images_decide_nothing(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are picked on validation images by training on the others; a cell trains on both, and is scored once."""
    tasks, model = given
    calls: list[tuple[float, int, int]] = []

    def trained(model: str, splits: Any, cell: Cell, rate: float, recipe: Recipe, train: Any, scored: Any) -> Any:
        calls.append((rate, len(train), len(scored)))
        metrics = {"accuracy": 100 - abs(rate - 0.03), "accuracy_per_class": 0.0, "loss": 0.0}
        return cells.load_classifier(model, ["x", "y", "z"]), metrics, {"training": 1.0}

    monkeypatch.setattr(cells, "_trained", trained)
    (cell,) = run_grid(tasks[:1], ["linear"], [0], model, RECIPE, tmp_path / "grid")
    assert calls == [(0.003333, 12, 3), (0.01, 12, 3), (0.03, 12, 3), (0.03, 15, 6)]
    assert cell["learning_rate"] == 0.03


@pytest.mark.parametrize("method", ["trpts", "lora"])
def test_a_cell_run_again_gives_its_number(given: Any, method: str) -> None:
    tasks, model = given
    splits = tasks[0].load()
    first, again, other = (run_cell(model, splits, Cell("a", method, seed), 0.01, RECIPE) for seed in (0, 0, 1))
    assert first.pop("seconds") and again.pop("seconds")
    assert first == json.loads(json.dumps(first)) == again
    assert other["loss"] != first["loss"]
    assert first["images"] == {"train": 15, "test": 6, "classes": 3}
    assert first["bytes"] > 0 and first["parameters"]["trainable"] > 0


def test_all_methods_start_from_one_head(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step, what is scored is the probe, the same under every method."""
    tasks, model = given
    splits, recipe = tasks[0].load(), Recipe(epochs=1, batch_size=8)
    monkeypatch.setattr(cells.Trainer, "train", lambda self: None)
    losses = {m: run_cell(model, splits, Cell("a", m), 0.01, recipe)["loss"] for m in ("linear", "lora", "trpts")}
    assert losses["linear"] == pytest.approx(losses["lora"], rel=1e-5)
    random = run_cell(model, splits, Cell("a", "linear"), 0.01, Recipe(epochs=1, batch_size=8, probed_head=False))
    assert random["loss"] > losses["linear"]


def test_the_table_has_means_and_deviations() -> None:
    def cell(task: str, method: str, accuracy: float) -> dict[str, Any]:
        parameters = {"trainable_percent": 1.5}
        return {"task": task, "method": method, "accuracy": accuracy, "parameters": parameters, "bytes": 2000,
                "seconds": {"training": 3.0}}  # fmt: skip

    found = [cell("a", "full", 50.0), cell("a", "full", 60.0), cell("b", "full", 80.0), cell("a", "lora", 70.0)]
    lines = table(found).splitlines()
    assert lines[0] == "| method | a | b | mean | Params. % | file, bytes | training, s |"
    assert lines[2] == "| full | 55.0 ± 7.1 | 80.0 | 67.5 | 1.50 | 2,000 | 3 |"
    assert lines[3] == "| lora | 70.0 |  |  | 1.50 | 2,000 | 3 |"
