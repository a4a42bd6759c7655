"""Two small tasks in folders and a base for them, as the benchmark takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from benchmarks.cells import Recipe
from benchmarks.start import Pixels, Start
from benchmarks.suites import Task, tasks_of
from pictures import write_base, write_folder

RECIPE = Recipe(epochs=1, batch_size=8)


@dataclass(frozen=True)
class Given:
    """A suite of the tasks `a` and `b`, and a model."""

    source: str
    model: str

    @property
    def tasks(self) -> list[Task]:
        return tasks_of("local", self.source)

    def start(self) -> Start:
        splits = self.tasks[0].load()
        return Start(self.model, splits.full, splits.classes)

    def test_images(self, start: Start) -> Pixels:
        return Pixels(self.tasks[0].load().test, start.processor)


def write_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """Three classes, five pictures of each to train on and two to test on."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("a", "b"):
        write_folder(tmp_path / "suite" / name, splits={"train": 5, "test": 2})
    return Given(str(tmp_path / "suite"), str(write_base(tmp_path / "base")))


def command(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], given: Given, *arguments: Any) -> None:
    """Run the `main` of a benchmark on the suite and the model."""
    common = ["--suite", "local", "--source", given.source, "--model", given.model]
    monkeypatch.setattr("sys.argv", ["benchmark", *common, *map(str, arguments)])
    main()


def inputs_of(base: Any, name: str, pixels: Any) -> Tensor:
    """All that enters a linear, (tokens of all images, in_features)."""
    seen: list[Tensor] = []
    handle = base.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        base.eval()(pixel_values=torch.stack([image["pixel_values"] for image in pixels]))
    handle.remove()
    return seen[0].flatten(0, -2).double()
