"""The paper's experiments: every method on every task with several seeds, cell by cell, each in a file of its own.

    cd examples && python -m benchmarks.grid --suite local --source FOLDER --model MODEL --output runs/grid

Killed and started again, it goes on with the first cell that has no file. Learning rates are picked per method on
validation images, with the first seed: on those of each task, or once for all tasks on those of a few (`--choosing`).
The test images of a cell are read once. `benchmarks.results` makes tables of the cells. Several processes may share
the folder, each with variants of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import BASELINES
from benchmarks.cells import Recipe, quiet, run_cell, validate
from benchmarks.start import Pixels, Start, weights_digest
from benchmarks.suites import Task, add_arguments, named, tasks_of
from benchmarks.variants import ABLATIONS, METHODS, VARIANTS, Variant
from trpts_peft.run_folder import write_json

_STEP = 3.0  # between the learning rates that are tried


class _Material:
    """What the cells of a task work on; made when the first of them asks."""

    def __init__(self, task: Task, model: str) -> None:
        self.name, self._task, self._model = task.name, task, model

    @cached_property
    def _splits(self) -> Any:
        return self._task.load()

    @cached_property
    def choosing(self) -> tuple[Start, Pixels]:
        """To choose a rate: where training starts, and the validation images."""
        start = Start(self._model, self._splits.train, self._splits.classes)
        return start, Pixels(self._splits.validation, start.processor)

    @cached_property
    def final(self) -> tuple[Start, Pixels]:
        """For the result: where training starts, and the test images."""
        start = Start(self._model, self._splits.full, self._splits.classes)
        return start, Pixels(self._splits.test, start.processor)


@dataclass(frozen=True)
class Grid:
    """Cells of one model and recipe in a folder.

    Attributes:
        model: an image classifier on the Hub or in a folder.
        recipe: how every method is trained.
        output: where the files lie: `<task>/<variant>/seed-<seed>.json`, and `rates.json` beside them, which holds
            what each learning rate gave there.
    """

    model: str
    recipe: Recipe
    output: Path

    def run(
        self, tasks: Sequence[Task], variants: Sequence[Variant], seeds: Sequence[int], choosing: Sequence[Task] = ()
    ) -> None:
        """Run what has no file yet.

        Args:
            tasks, variants, seeds: what is crossed. Rates are picked with the first seed.
            choosing: the tasks on whose validation images, on average, a variant's learning rate is picked; none: on
                those of the task itself.

        Raises:
            ValueError: a file there is of another model, recipe or variant, or of rates chosen otherwise.
        """
        shared = [_Material(task, self.model) for task in choosing]
        for task in tasks:
            material = next((m for m in shared if m.name == task.name), None) or _Material(task, self.model)
            asked = shared or [material]
            for seed, variant in itertools.product(seeds, variants):
                path = self.output / task.name / variant.name / f"seed-{seed}.json"
                ground = {"variant": asdict(variant), "rate_chosen_on": [other.name for other in asked]}
                if path.is_file():
                    self._read(path, ground)
                    continue
                rate = self._rate(variant, asked, seeds[0])
                cell = run_cell(*material.final, task.name, variant, seed, rate, self.recipe)
                _write(path, {**cell, **ground})
                accuracy = f"{cell['accuracy']:.2f} % in {cell['training_seconds']:.0f} s"
                print(f"{task.name}, {variant.name}, seed {seed}, learning rate {rate:g}: {accuracy}", flush=True)

    def _rate(self, variant: Variant, asked: Sequence[_Material], seed: int) -> float:
        """The learning rate that is best on validation images, times the variant's factor."""
        chosen = VARIANTS[variant.rate_of] if variant.rate_of else variant

        def score(rate: float) -> float:
            return statistics.mean(self._validated(chosen, task, seed, rate) for task in asked)

        best = climb(score, BASELINES[chosen.method].learning_rate)
        return float(f"{best * variant.rate_times:.3g}")

    def _validated(self, variant: Variant, task: _Material, seed: int, rate: float) -> float:
        """The accuracy on a task's validation images after training at a rate; from its file, if it is there."""
        path = self.output / task.name / variant.name / "rates.json"
        ground = {"variant": asdict(variant), "seed": seed}
        content = self._read(path, ground) if path.is_file() else {**ground, **self._ground(), "accuracy": {}}
        found: dict[str, float] = content["accuracy"]
        if f"{rate:g}" not in found:
            start, validation = task.choosing
            accuracy = found[f"{rate:g}"] = validate(start, variant, seed, rate, self.recipe, validation)
            _write(path, content)
            print(f"{task.name}, {variant.name}: learning rate {rate:g}: {accuracy:.1f} % of validation", flush=True)
        return found[f"{rate:g}"]

    def _ground(self) -> dict[str, Any]:
        model = {"name": Path(self.model).name, "weights": weights_digest(self.model)}
        return {"model": model, "recipe": asdict(self.recipe)}

    def _read(self, path: Path, ground: Mapping[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "variant" in content:  # what was recorded before an attribute was added has its default
            content["variant"] = json.loads(json.dumps(asdict(Variant(**content["variant"]))))
        for name, value in json.loads(json.dumps({**self._ground(), **ground})).items():
            if content.get(name) != value:
                raise ValueError(
                    f"`output` must hold cells of this {name}, {value}, got {content.get(name)} in {str(path)!r}: "
                    "delete it, or name another folder."
                )
        return content


def climb(score: Callable[[float], float], usual: float) -> float:
    """The best learning rate, by steps of three from the usual one until neither neighbor is better."""
    found: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in found:
            found[place] = score(_nth(usual, place))
        return found[place]

    place = 0 if at(0) >= at(1) else 1
    while (best := max((place, place - 1, place + 1), key=at)) != place:
        place = best
    return _nth(usual, place)


def _nth(usual: float, place: int) -> float:
    return float(f"{usual * _STEP**place:.3g}")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def main() -> None:
    """Run the grid that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the cells; may hold some already")
    parser.add_argument("--tasks", nargs="+", help="only these, in this order")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--variants", nargs="+", default=list(METHODS), choices=list(VARIANTS), metavar="VARIANT")
    which.add_argument("--ablations", action="store_true", help="the variants of TR-PTS instead of the methods")
    parser.add_argument("--choosing", nargs="+", default=[], metavar="TASK", help="choose learning rates on these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="results depend on their number")
    arguments = parser.parse_args()
    if torch.cuda.device_count() > 1:
        parser.error("a cell must train on one GPU, got several: name one in CUDA_VISIBLE_DEVICES.")
    quiet()
    torch.set_num_threads(arguments.threads)
    tasks = tasks_of(arguments.suite, arguments.source)
    chosen, choosing = named(tasks, arguments.tasks or [task.name for task in tasks]), named(tasks, arguments.choosing)
    compared = [variant for every in ABLATIONS.values() for variant in every]
    variants = [VARIANTS[name] for name in arguments.variants]
    if arguments.ablations:
        variants = list({variant.name: variant for variant in compared}.values())
    Grid(arguments.model, Recipe(epochs=arguments.epochs), arguments.output).run(
        chosen, variants, arguments.seeds, choosing
    )


if __name__ == "__main__":
    main()
