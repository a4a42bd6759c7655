"""The cells of a suite as files hold them, and their means."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["Results"]

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The cells of one suite.

    Attributes:
        cells: {variant: {task: cells, one per seed}}.
        rates: {variant: {task: what was chosen from}}.
        times: what `benchmarks.times` measured, or empty.
        marked: what `benchmarks.marked` measured, as means over tasks, or empty.
        placements: what `benchmarks.placements` found, {task: {variant: one of each seed}}, or empty.
    """

    cells: Mapping[str, Mapping[str, Sequence[Cell]]]
    rates: Mapping[str, Mapping[str, Any]]
    times: Mapping[str, Any]
    marked: Mapping[str, Any]
    placements: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """From `<task>/<variant>/seed-<n>.json`, `rates.json` beside them, and the files of the other commands."""
        cells: dict[str, dict[str, list[Cell]]] = {}
        rates: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*/*/*.json")):
            content, task, variant = json.loads(path.read_text(encoding="utf-8")), *path.parts[-3:-1]
            if path.name == "rates.json":
                rates.setdefault(variant, {})[task] = content["accuracy"]
            else:
                cells.setdefault(variant, {}).setdefault(task, []).append(content)
        times, marked = _content(folder / "times.json"), _content(folder / "marked.json")
        placements = _content(folder / "placements.json")
        return cls(cells, rates, times.get("to_full", {}), marked.get("mean", {}), placements.get("tasks", {}))

    @cached_property
    def tasks(self) -> list[str]:
        """All that have a cell."""
        return sorted({task for by_task in self.cells.values() for task in by_task})

    def of(self, variant: str, task: str) -> list[float]:
        """The accuracies of a variant on a task, one per seed."""
        return [cell["accuracy"] for cell in self.cells.get(variant, {}).get(task, [])]

    def mean(self, variant: str, task: str) -> float:
        """The mean of `of`."""
        return statistics.mean(self.of(variant, task))

    def average(self, variant: str, value: Callable[[Cell], float], tasks: Sequence[str] | None = None) -> float:
        """The mean of a figure over a variant's cells of some tasks; None: of all."""
        by_task = self.cells[variant]
        return statistics.mean(value(cell) for task in tasks or by_task for cell in by_task[task])

    def validation(self, variant: str) -> dict[float, float]:
        """{learning rate: mean accuracy on validation images}, for the rates that were tried on all of the tasks."""
        tasks = list(self.rates.get(variant, {}).values())
        common = set.intersection(*(set(found) for found in tasks)) if tasks else set()
        return {float(rate): statistics.mean(found[rate] for found in tasks) for rate in sorted(common, key=float)}


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
