"""One recorded cell once more, from its own settings: the accuracy must come out the same, to the last digit.

    cd examples && python -m benchmarks.again CELL.json --suite local --source FOLDER --model MODEL

Exit code 1 if it does not. Equal results need the images, weights, versions, threads and kind of processor of the
record: what differs is named first. On a GPU, kernels may add up in another order each time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Recipe, quiet, run_cell
from benchmarks.start import Pixels, Start
from benchmarks.suites import Splits, add_arguments, named, tasks_of
from benchmarks.variants import Variant

_NUMBERS = ("accuracy", "accuracy_per_class", "loss")
_GROUNDS = ("model", "images", "preprocessing", "parameters", "bytes", "versions", "machine")


def again(cell: Mapping[str, Any], splits: Splits, model: str) -> dict[str, Any]:
    """The cell as its settings give it here.

    Args:
        cell: what `run_cell` returned.
        splits: the images of its task.
        model: the model, in a folder or on the Hub.
    """
    torch.set_num_threads(cell["machine"]["threads"])
    start, variant = Start(model, splits.full, splits.classes), Variant(**cell["variant"])
    test = Pixels(splits.test, start.processor)
    return run_cell(start, test, cell["task"], variant, cell["seed"], cell["learning_rate"], Recipe(**cell["recipe"]))


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    """A line for each of `keys` that is not the same in both."""
    for key in keys:
        if recorded[key] != json.loads(json.dumps(found[key])):
            yield f"{key}: {recorded[key]} in the record, {found[key]} here"


def main() -> None:
    """Run the cell that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=Path, help="its file")
    add_arguments(parser)
    arguments = parser.parse_args()
    quiet()
    cell = json.loads(arguments.cell.read_text(encoding="utf-8"))
    (task,) = named(tasks_of(arguments.suite, arguments.source), [cell["task"]])
    found = again(cell, task.load(), arguments.model)
    for line in differences(cell, found, _GROUNDS):
        print(line)
    wrong = list(differences(cell, found, _NUMBERS))
    print("\n".join(wrong) or f"accuracy {cell['accuracy']}: the same")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
