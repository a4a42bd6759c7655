"""What a command measures on the training images of each task, in one file with what it rests on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cells import machine, quiet, versions
from benchmarks.start import Start, weights_digest
from benchmarks.suites import add_arguments, named, tasks_of

__all__ = ["add_measured_arguments", "measured"]


def add_measured_arguments(parser: argparse.ArgumentParser) -> None:
    """What `measured` asks for, and `--output`."""
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")


def measured(arguments: argparse.Namespace, measure: Callable[[Start], Any]) -> dict[str, Any]:
    """{"versions", "machine", "model", "tasks": {task: what `measure` returns}}, ready for JSON.

    Args:
        arguments: those of `add_measured_arguments`.
        measure: called with where training starts on a task.

    Raises:
        ValueError: there is no such task.
    """
    quiet()
    tasks = tasks_of(arguments.suite, arguments.source)
    by_task = {}
    for task in named(tasks, arguments.tasks or [task.name for task in tasks]):
        splits = task.load()
        by_task[task.name] = measure(Start(arguments.model, splits.full, splits.classes))
        print(task.name, "done", flush=True)
    model = {"name": Path(arguments.model).name, "weights": weights_digest(arguments.model)}
    return {"versions": versions(), "machine": machine(), "model": model, "tasks": by_task}
