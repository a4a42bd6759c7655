"""The paper's experiments: every method on every task with several seeds, cell by cell, each in a file of its own.

    cd examples && python -m benchmarks.grid --suite local --source FOLDER --model MODEL --output runs/grid

Killed and started again, it goes on with the first cell that has no file. Learning rates are picked per task and
method on validation images, with the first seed; the test images of a cell are read once. Prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines import BASELINES
from benchmarks.cells import Cell, Recipe, pick_rate, run_cell
from benchmarks.suites import SUITES, Splits, Task, tasks_of
from tables import markdown_table
from trpts_peft.run_folder import write_json

# Around each method's usual rate: a third of it, itself, three times it.
_SPREAD = (1 / 3, 1.0, 3.0)


def run_grid(
    tasks: Sequence[Task], methods: Sequence[str], seeds: Sequence[int], model: str, recipe: Recipe, output: Path
) -> list[dict[str, Any]]:
    """Run what has no file yet; returns the results of all cells.

    Args:
        tasks, methods, seeds: what is crossed. Rates are picked with the first seed.
        model: an image classifier on the Hub or in a folder.
        recipe: how every method is trained.
        output: where the files lie: `<task>/<method>/rates.json` and `<task>/<method>/seed-<seed>.json`.

    Raises:
        ValueError: a file there is of another model or recipe.
    """
    found = []
    for task in tasks:
        splits: Splits | None = None
        for method in methods:
            folder = output / task.name / method
            for seed in seeds:
                path = folder / f"seed-{seed}.json"
                if not path.is_file():
                    splits = splits or task.load()
                    rate = _rate(folder, splits, Cell(task.name, method, seeds[0]), model, recipe)
                    print(f"{task.name}, {method}, seed {seed}, learning rate {rate:g}", flush=True)
                    write_json(path, run_cell(model, splits, Cell(task.name, method, seed), rate, recipe))
                found.append({"group": task.group, **_read(path, model, recipe)})
    return found


def _rate(folder: Path, splits: Splits, cell: Cell, model: str, recipe: Recipe) -> float:
    """The learning rate that is best on validation images; the lowest of equals."""
    path = folder / "rates.json"
    if not path.is_file():
        rates = [round(BASELINES[cell.method].learning_rate * factor, 6) for factor in _SPREAD]
        print(f"{cell.task}, {cell.method}: rates {rates}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        accuracies = pick_rate(model, splits, cell, rates, recipe)
        write_json(path, {"model": model, "recipe": vars(recipe), "validation accuracy": accuracies})
    accuracy = _read(path, model, recipe)["validation accuracy"]
    return float(max(accuracy, key=lambda rate: (accuracy[rate], -float(rate))))


def _read(path: Path, model: str, recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if (content["model"], content["recipe"]) != (model, vars(recipe)):
        raise ValueError(f"`output` must hold cells of this model and recipe, got others in {str(path)!r}.")
    return content


def table(cells: Iterable[Mapping[str, Any]]) -> str:
    """In the form of the paper's tables 2 and 3: a row per method; mean and deviation over seeds, in percent."""
    by_cell: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        by_cell[cell["method"], cell["task"]].append(cell)
    methods, tasks = (list(dict.fromkeys(key[place] for key in by_cell)) for place in (0, 1))
    header = ["method", *tasks, "mean", "Params. %", "file, bytes", "training, s"]
    return markdown_table(header, [_row(method, tasks, by_cell) for method in methods])


def _row(method: str, tasks: Sequence[str], by_cell: Mapping[tuple[str, str], list[Mapping[str, Any]]]) -> list[str]:
    every = [cell for task in tasks for cell in by_cell.get((method, task), [])]
    shown, means = [], []
    for task in tasks:
        accuracies = [cell["accuracy"] for cell in by_cell.get((method, task), [])]
        shown.append(_spread(accuracies))
        means += [statistics.mean(accuracies)] if accuracies else []
    complete = len(means) == len(tasks)
    return [
        method,
        *shown,
        f"{statistics.mean(means):.1f}" if complete else "",
        f"{statistics.mean(cell['parameters']['trainable_percent'] for cell in every):.2f}",
        f"{statistics.mean(cell['bytes'] for cell in every):,.0f}",
        f"{statistics.mean(cell['seconds']['training'] for cell in every):.0f}",
    ]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{values[0]:.1f}" if len(values) == 1 else f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Run the grid that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--source", required=True, help="folder of the suite, or its data set on the Hub")
    parser.add_argument("--model", required=True, help="image classifier: a folder, or an id on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for the cells; may hold some already")
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", default=list(BASELINES), choices=list(BASELINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    arguments = parser.parse_args()
    tasks = [
        t for t in tasks_of(arguments.suite, arguments.source) if arguments.tasks is None or t.name in arguments.tasks
    ]
    recipe = Recipe(epochs=arguments.epochs)
    print(table(run_grid(tasks, arguments.methods, arguments.seeds, arguments.model, recipe, arguments.output)))


if __name__ == "__main__":
    main()
