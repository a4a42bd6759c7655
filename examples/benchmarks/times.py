"""What each method of the grid costs on its model: seconds of a training step and of a prediction, beside full's.

    cd examples && python -m benchmarks.times --suite local --source FOLDER --model MODEL --task TASK --output FILE

All methods take turns in one process, so that a machine that slows down slows all of them. A step trains on 32 images,
a prediction reads 32. Adapters that can be merged into the model predict merged, TR-PTS with its tokens selected.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import default_collate

from benchmarks.cells import machine, network, quiet, versions
from benchmarks.start import Start
from benchmarks.suites import add_arguments, named, tasks_of
from benchmarks.variants import METHODS, Variant
from measure import inference, relative_times, training_step
from trpts_peft.run_folder import write_json

_BATCH = 32


def times(start: Start, variants: Sequence[Variant], repeats: int) -> dict[str, dict[str, float]]:
    """{variant: {"training", "prediction"}}: medians of ratios to full fine-tuning, which must be among `variants`."""
    models = {variant.name: network(start, variant, seed=0) for variant in variants}
    collated = default_collate([start.pixels[index] for index in range(_BATCH)])
    batch = {name: tensor.to(models["full"].device) for name, tensor in collated.items()}
    predicting = {name: inference(_merged(copy.deepcopy(model)), batch) for name, model in models.items()}
    steps = {name: training_step(model) for name, model in models.items()}
    training = {name: (lambda step=step: step(batch)) for name, step in steps.items()}
    of_training, of_prediction = (relative_times(actions, "full", repeats) for actions in (training, predicting))
    return {name: {"training": of_training[name], "prediction": of_prediction[name]} for name in models}


def _merged(model: nn.Module) -> nn.Module:
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def main() -> None:
    """Measure, and write a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--task", required=True, help="on whose training images GPS and TR-PTS are calibrated")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--repeats", type=int, default=21, help="rounds")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # processor time of several threads counts their waiting
    (task,) = named(tasks_of(arguments.suite, arguments.source), [arguments.task])
    splits = task.load()
    start = Start(arguments.model, splits.full, splits.classes)
    found: dict[str, Any] = times(start, list(METHODS.values()), arguments.repeats)
    settings = {"task": task.name, "model": Path(arguments.model).name, "batch": _BATCH, "repeats": arguments.repeats}
    write_json(arguments.output, {**settings, "to_full": found, "versions": versions(), "machine": machine()})


if __name__ == "__main__":
    main()
