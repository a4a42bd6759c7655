"""One cell of the grid: a method fine-tuned on a task with a seed, and everything that its number rests on.

The learning rate is the one of a few that is best on validation images, with the first seed; the test images are read
once, by the model that was trained on training and validation images together with the chosen rate.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as Rows
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from benchmarks.baselines import build
from benchmarks.suites import Splits
from trpts_peft import estimate_cost
from trpts_peft.data import Batches
from trpts_peft.finetuning import load_classifier, load_processor
from trpts_peft.head import find_head, num_labels
from trpts_peft.image_data import with_pixel_values
from trpts_peft.measurement import collect_features
from trpts_peft.metrics import ClassificationAccuracy
from trpts_peft.probe import fit_linear_probe

__all__ = ["Cell", "Pixels", "Recipe", "pick_rate", "run_cell"]

_PACKAGES = ("trpts-peft", "torch", "transformers", "peft", "datasets")


@dataclass(frozen=True)
class Recipe:
    """How every method of a grid is trained.

    Attributes:
        epochs, batch_size: passes over the training images, and images per step.
        warmup: share of the steps in which the learning rate rises; then it falls as a cosine.
        probed_head: whether all methods start from the head that `calibrate` fits, or from a random one.
    """

    epochs: int = 20
    batch_size: int = 32
    warmup: float = 0.1
    probed_head: bool = True


@dataclass(frozen=True)
class Cell:
    """What is run, but for its learning rate.

    Attributes:
        task: name of the task.
        method: a key of `BASELINES`.
        seed: of the new head, of the order of the images, and of what the method draws.
        options: of the method.
    """

    task: str
    method: str
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


class Pixels(Dataset[dict[str, Tensor]]):
    """Images as a model takes them, all in memory: `pixel_values` float32 (n, 3, H, W) and `labels` int64 (n,)."""

    def __init__(self, rows: Rows, processor: Any) -> None:
        batch = with_pixel_values(rows, processor)[:]
        self.pixel_values, self.labels = torch.stack(batch["pixel_values"]), batch["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def pick_rate(model: str, splits: Splits, cell: Cell, rates: Sequence[float], recipe: Recipe) -> dict[float, float]:
    """Accuracy in percent on validation images after training with each learning rate."""
    found = {}
    for rate in rates:
        _, metrics, _ = _trained(model, splits, cell, rate, recipe, splits.train, splits.validation)
        found[rate] = metrics["accuracy"]
    return found


def run_cell(model: str, splits: Splits, cell: Cell, rate: float, recipe: Recipe) -> dict[str, Any]:
    """Train on all training images, test once; returns the accuracy and all that it rests on, ready for JSON."""
    trained, metrics, seconds = _trained(model, splits, cell, rate, recipe, splits.full, splits.test)
    return {
        **asdict(cell),
        "model": model,
        "recipe": asdict(recipe),
        "learning_rate": rate,
        "images": {"train": len(splits.full), "test": len(splits.test), "classes": splits.classes},
        "preprocessing": json.loads(load_processor(model).to_json_string()),
        **metrics,
        "parameters": _parameters(trained),
        "bytes": _bytes(trained),
        "seconds": seconds,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _trained(
    model: str, splits: Splits, cell: Cell, rate: float, recipe: Recipe, train: Rows, scored: Rows
) -> tuple[nn.Module, dict[str, float], dict[str, float]]:
    """The trained model, its accuracy on `scored`, and the seconds that calibration and training took."""
    set_seed(cell.seed)
    processor, names = load_processor(model), [str(label) for label in range(splits.classes)]
    pixels, start = Pixels(train, processor), time.perf_counter()
    base = load_classifier(model, names)
    if recipe.probed_head:
        _probe(base, pixels)
    network = build(cell.method, base, pixels, cell.options, progress=False, probe_head=recipe.probed_head)
    calibrated = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.warmup,
            weight_decay=0.0,
            seed=cell.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            label_names=["labels"],
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=True,
        )
        trainer = Trainer(network, arguments, train_dataset=pixels, compute_metrics=_accuracy)
        trainer.train()
        ended = time.perf_counter()
        metrics = trainer.evaluate(Pixels(scored, processor))
    wanted = {name: metrics[f"eval_{name}"] for name in ("accuracy", "accuracy_per_class", "loss")}
    return network, wanted, {"building": calibrated - start, "training": ended - calibrated}


def _probe(base: nn.Module, pixels: Pixels) -> None:
    """Fit the head as `calibrate` does, so that every method starts where TR-PTS does."""
    head = find_head(base, "default")
    batches = Batches(pixels, base, num_samples=None, batch_size=32)
    features, labels = collect_features(base, batches, head, progress=False)
    probe = fit_linear_probe(features, labels, num_labels(head), fit_bias=head.linear.bias is not None)
    head.write(probe.weight, probe.bias)


def _accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    metric = ClassificationAccuracy(keep_in_memory=True)
    return metric.compute(predictions=evaluated.predictions.argmax(-1), references=evaluated.label_ids)


def _parameters(model: nn.Module) -> dict[str, float]:
    cost = estimate_cost(model)
    return {
        "trainable": cost.trainable_parameters,
        "trainable_percent": cost.trainable_percent,
        "trainable_percent_without_head": cost.trainable_percent_without_head,
    }


def _bytes(model: nn.Module) -> int:
    """Bytes of what has to be kept of a task: the adapter's file, or a file of what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder)
        else:
            trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, Path(folder) / "trained.safetensors")
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
