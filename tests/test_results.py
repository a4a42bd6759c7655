"""Tables and figures are those of the recorded cells, and the page shows them as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from benchmarks.placements import PLACEMENTS
from benchmarks.recorded import Results
from benchmarks.results import (
    ablation_table,
    comparison_table,
    filled,
    marked_table,
    method_table,
    placement_table,
    rate_table,
)
from benchmarks.results_figures import draw_ablations, draw_methods
from benchmarks.variants import ABLATIONS, METHODS

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """`write(variant, {task: accuracies, one per seed})`, then `write.results()`."""

    def cells(variant: str, accuracies: dict[str, list[float]], percent: float = 1.5) -> None:
        for task, values in accuracies.items():
            folder = tmp_path / task / variant
            folder.mkdir(parents=True)
            shares = {"trainable_percent": percent, "trainable_percent_without_head": percent / 2}
            for seed, value in enumerate(values):
                cell = {"learning_rate": 0.01, "accuracy": value, "parameters": shares, "bytes": 2000}
                (folder / f"seed-{seed}.json").write_text(json.dumps(cell))

    cells.folder = tmp_path
    cells.results = lambda: Results.read(tmp_path)
    return cells


def test_the_table_of_methods(write: Any) -> None:
    write("lora", {"a": [70.0]})
    write("full", {"a": [50.0, 60.0], "b": [80.0]}, percent=100.0)
    (write.folder / "times.json").write_text('{"to_full": {"full": {"training": 1.0, "prediction": 1.0}}}')
    lines = method_table(write.results()).splitlines()
    assert lines[0] == "| method | a | b | mean | Params. % | file, kB | step / full | prediction / full |"
    assert lines[2] == "| full | 55.0 ± 7.1 | 80.0 | 67.5 | 100.00 | 2 | 1.00 | 1.00 |"
    assert lines[3] == "| lora | 70.0 |  |  | 1.50 | 2 |  |  |"


def test_comparisons_are_task_by_task(write: Any) -> None:
    write("trpts", {"a": [60.0, 62.0], "b": [80.0], "c": [10.0]})
    write("lora", {"a": [60.0], "b": [83.0]})
    assert comparison_table(write.results()).splitlines()[2:] == ["| lora | 2 | 1 | -1.0 ± 2.0 | -3.0 | +1.0 |"]


def test_ablations_are_compared_where_they_have_every_task(write: Any) -> None:
    write("trpts", {"a": [60.0], "b": [80.0], "c": [10.0]})
    write("no-bias", {"a": [60.0], "b": [83.0]})
    write("no-cap", {"a": [59.0], "b": [79.0], "c": [9.0]})
    assert comparison_table(write.results()).splitlines()[2:] == ["| no-cap | 3 | 3 | +1.0 ± 0.0 | +1.0 | +1.0 |"]


def test_comparisons_of_those_that_are_named(write: Any) -> None:
    write("sparse-0.8", {"a": [60.0, 62.0], "b": [80.0]})
    write("dense-0.8", {"a": [60.0], "b": [80.0]})
    write("lora", {"a": [1.0], "b": [1.0], "c": [1.0]})
    lines = comparison_table(write.results(), "sparse-0.8", ["dense-0.8"]).splitlines()[2:]
    assert lines == ["| dense-0.8 | 2 | 1 | +0.5 ± 0.5 | +0.0 | +1.0 |"]


def test_the_rates_that_were_chosen(write: Any) -> None:
    write("lora", {"a": [1.0], "b": [1.0]})
    for task, rates in {"a": {"0.003": 50.0, "0.01": 60.0}, "b": {"0.003": 51.0, "0.01": 62.0, "0.03": 1.0}}.items():
        (write.folder / task / "lora" / "rates.json").write_text(json.dumps({"accuracy": rates}))
    assert rate_table(write.results()).splitlines()[2:] == ["| lora | 0.003: 50.5, **0.01: 61.0** |"]


def test_an_ablation_shows_tasks_that_have_all_of_it(write: Any) -> None:
    write("trpts", {"a": [50.0]}, percent=9.0)
    write("trpts", {"b": [70.0]})
    write("no-bias", {"b": [60.0, 70.0]}, percent=1.0)
    lines = ablation_table(write.results(), "biases").splitlines()
    assert lines[0] == "| variant | b | mean | trained % of the backbone |"
    assert lines[2:] == ["| trpts | 70.0 | 70.0 | 0.75 |", "| no-bias | 65.0 ± 7.1 | 65.0 | 0.50 |"]


def test_what_scores_mark(write: Any) -> None:
    scores = ("fisher", "varying", "gradient", "magnitude", "random")
    shares = {score: {"used": 0.1 * n, "constant": 0.01 * n} for n, score in enumerate(scores, 1)}
    (write.folder / "marked.json").write_text(json.dumps({"mean": {"fc1": {"constant": 0.5, **shares}}}))
    lines = marked_table(write.results()).splitlines()
    assert lines[0].startswith("| linear | used: fisher | used: varying | used: gradient |")
    assert lines[2:] == ["| fc1 | 10 | 20 | 30 | 40 | 50 | 50 | 1 | 2 | 3 | 4 |"]


def test_the_blocks_of_each_placement(write: Any) -> None:
    one = {"blocks": [9, 11], "keep_rate": 0.8, "speedup": 1.1}
    two = {"blocks": [0, 3], "keep_rate": 0.95, "speedup": 1.3}
    found = {name: [one, two] if name == "random-0.8" else [one] for name in PLACEMENTS}
    content = {"tasks": {"a": found, "b": {name: [two] for name in PLACEMENTS[:-1]} | {PLACEMENTS[-1]: [one]}}}
    (write.folder / "placements.json").write_text(json.dumps(content))
    lines = placement_table(write.results()).splitlines()
    assert lines[0] == "| variant | a | b | keep rate | predicted speed-up |"
    assert lines[2] == "| sparse-0.8 | 9 11 | 0 3 | 0.8 to 0.95 | 1.200 |"
    assert lines[4] == "| random-0.8 | 9 11; 0 3 | 0 3 | 0.8 to 0.95 | 1.250 |"
    assert lines[-1].endswith("| 0.8 | 1.100 |")


def test_tables_stand_between_their_marks(write: Any) -> None:
    write("trpts", {"a": [50.0]})
    page = "x\n<!-- table: one/methods -->\nold\n<!-- end -->\ny\n<!-- table: one/biases -->\n<!-- end -->\n"
    new = filled(page, {"one": write.results()})
    assert new.startswith("x\n<!-- table: one/methods -->\n| method |") and "old" not in new and "\ny\n" in new
    assert filled(new, {"one": write.results()}) == new
    with pytest.raises(KeyError):
        filled(page.replace("biases", "biasses"), {"one": write.results()})


def test_a_method_without_all_tasks_is_not_drawn(write: Any, tmp_path: Path, monkeypatch: Any) -> None:
    write("trpts", {"a": [50.0], "b": [60.0]})
    write("lora", {"a": [90.0]})
    drawn: list[float] = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, **settings: drawn.append(y))
    draw_methods(write.results(), tmp_path / "figure.png")
    assert drawn == [55.0]


@pytest.mark.parametrize("draw", [draw_methods, draw_ablations])
@pytest.mark.parametrize("complete", [True, False])
def test_figures_are_drawn(write: Any, tmp_path: Path, monkeypatch: Any, draw: Any, complete: bool) -> None:
    names = {v.name for compared in ABLATIONS.values() for v in compared}
    for number, name in enumerate(sorted(names) if complete else ["trpts"]):
        write(name, {"a": [50.0 + number, 51.0], "b": [60.0]})
    drawn: list[float] = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *a, **k: drawn.extend(np.atleast_1d(y)) or plot(self, x, y, *a, **k)
    )
    draw(write.results(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").is_file() == bool(drawn)
    methods = sum(name in METHODS for name in names) if complete else 1
    assert (
        len(drawn) == {"draw_methods": methods, "draw_ablations": 3 * (len(names) - methods) * complete}[draw.__name__]
    )


def test_the_page_shows_the_recorded_cells() -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    suites = {path.name: Results.read(path) for path in (DOCS / "results").iterdir() if path.is_dir()}
    assert filled(page, suites) == page
    assert page.count("<!-- table:") == page.count("<!-- end -->") == 16
