"""The blocks that each placement of token selection picks on each task, and what it is predicted to save.

cd examples && python -m benchmarks.placements --suite local --source FOLDER --model MODEL --output FILE.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import machine, quiet, versions
from benchmarks.start import Start, weights_digest
from benchmarks.suites import add_arguments, named, tasks_of
from benchmarks.variants import VARIANTS
from trpts_peft import TRPTSConfig, select
from trpts_peft.run_folder import write_json

__all__ = ["PLACEMENTS", "placements"]

PLACEMENTS = ("sparse-0.8", "dense-0.8", "random-0.8", "late-0.8")


def placements(start: Start, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """What the cells of these variants and seeds select tokens in.

    Returns:
        {variant: [{"blocks": their numbers from 0, "speedup": predicted for inference}]}, one for each seed if the
        variant draws, else one.
    """
    scores, base = start.scores("fisher", {}), start.base()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in variants:
        variant = VARIANTS[name]
        options = [{**variant.options, "seed": seed} for seed in seeds] if variant.draws else [variant.options]
        selections = [select(scores, TRPTSConfig(**each), base) for each in options]
        found[name] = [{"blocks": list(each.token_layers), "speedup": each.speedup} for each in selections]
    return found


def main() -> None:
    """Look at the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--variants", nargs="+", default=PLACEMENTS, choices=PLACEMENTS, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    quiet()
    tasks = tasks_of(arguments.suite, arguments.source)
    by_task = {}
    for task in named(tasks, arguments.tasks or [task.name for task in tasks]):
        splits = task.load()
        start = Start(arguments.model, splits.full, splits.classes)
        by_task[task.name] = placements(start, arguments.variants, arguments.seeds)
        print(task.name, "done", flush=True)
    model = {"name": Path(arguments.model).name, "weights": weights_digest(arguments.model)}
    write_json(arguments.output, {"versions": versions(), "machine": machine(), "model": model, "tasks": by_task})


if __name__ == "__main__":
    main()
