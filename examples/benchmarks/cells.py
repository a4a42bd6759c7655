"""One cell of the grid: a variant fine-tuned on a task with a seed, and everything that its number rests on.

The learning rate is the best of a few on validation images, with the first seed; the test images are read once, by the
model that was trained on training and validation images together with the chosen rate.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from benchmarks.baselines import build
from benchmarks.start import Pixels, Start, weights_digest
from benchmarks.variants import VARIANTS, Variant
from measure import file_bytes
from trpts_peft import Selection, TRPTSConfig, apply_token_selection, calibrate, estimate_cost, select
from trpts_peft.cost import geometry_of, macs
from trpts_peft.metrics import accuracy_of

__all__ = ["Recipe", "machine", "network", "quiet", "run_cell", "settled", "validate", "versions"]

_PACKAGES = ("trpts-peft", "torch", "transformers", "accelerate", "peft", "datasets", "pillow")


@dataclass(frozen=True)
class Recipe:
    """How every method of a grid is trained: Adam without weight decay, gradients clipped at a norm of one.

    Attributes:
        epochs, batch_size: passes over the training images, and images per step.
        warmup: share of the steps in which the learning rate rises; then it falls as a cosine.
    """

    epochs: int = 20
    batch_size: int = 32
    warmup: float = 0.1


def validate(start: Start, variant: Variant, seed: int, rate: float, recipe: Recipe, validation: Pixels) -> float:
    """Accuracy in percent on validation images after training on those of `start`."""
    trainer, _ = _trained(start, variant, seed, rate, recipe)
    return trainer.evaluate(validation)["eval_accuracy"]


def run_cell(
    start: Start, test: Pixels, task: str, variant: Variant, seed: int, rate: float, recipe: Recipe
) -> dict[str, Any]:
    """Train on all training images, test once; returns the accuracy and all that it rests on, ready for JSON."""
    trainer, seconds = _trained(start, variant, seed, rate, recipe)
    metrics = trainer.evaluate(test)
    return {
        "task": task,
        "variant": asdict(variant),
        "seed": seed,
        "learning_rate": rate,
        "recipe": asdict(recipe),
        "accuracy": metrics["eval_accuracy"],
        "accuracy_per_class": metrics["eval_accuracy_per_class"],
        "loss": metrics["eval_loss"] if math.isfinite(metrics["eval_loss"]) else None,  # of a run that diverged
        "parameters": _parameters(trainer.model),
        "bytes": file_bytes(trainer.model),
        "training_seconds": seconds,
        "model": {"name": Path(start.model).name, "weights": weights_digest(start.model)},
        "images": _images(start, test),
        "preprocessing": start.processor.to_dict(),
        "versions": versions(),
        "machine": machine(),
    }


def network(start: Start, variant: Variant, seed: int) -> nn.Module:
    """The model that trains: the method applied to the base, GPS and TR-PTS calibrated."""
    set_seed(seed)
    base = start.base(variant.probed_head)
    model = build(variant.method, base, settled(start, variant, seed))
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if isinstance(config, TRPTSConfig):
        _calibrate(model, config, start, variant)
    if variant.token_options is not None:
        config = TRPTSConfig(**variant.token_options)
        layers = select(start.scores("fisher", variant.scoring), config, base).token_layers
        apply_token_selection(base, dict.fromkeys(layers, config.keep_rate))
    return model


def settled(start: Start, variant: Variant, seed: int) -> dict[str, Any]:
    """The options of a cell: its seed for what is drawn, and the keep rate that `macs_of` asks for.

    That is the one in thousandths whose multiply-accumulates come closest, the greatest of equals.
    """
    options = variant.seeded(seed)
    if not variant.macs_of:
        return options
    wanted, layers = _placed(start, VARIANTS[variant.macs_of], seed), _placed(start, variant, seed).token_layers
    geometry = geometry_of(start.base())
    cost = macs(geometry, dict.fromkeys(wanted.token_layers, wanted.keep_rate))
    rates = [thousandths / 1000 for thousandths in range(1000, 0, -1)]
    nearest = min(rates, key=lambda rate: abs(macs(geometry, dict.fromkeys(layers, rate)) - cost))
    return {**options, "keep_rate": nearest}


def _placed(start: Start, variant: Variant, seed: int) -> Selection:
    """Where the variant selects tokens; its keep rate as its options have it."""
    return select(start.scores("fisher", variant.scoring), TRPTSConfig(**variant.seeded(seed)), start.base())


def _calibrate(model: nn.Module, config: TRPTSConfig, start: Start, variant: Variant) -> None:
    measured = config.importance in ("fisher", "gradient")
    if measured and not variant.probed_head:
        calibrate(model, start.pixels, probe_head=False, progress=False, **variant.scoring)
        return
    scores = start.scores(config.importance, variant.scoring) if measured else None
    calibrate(model, None, scores=scores, probe_head=False, progress=False)


def _trained(start: Start, variant: Variant, seed: int, rate: float, recipe: Recipe) -> tuple[Trainer, float]:
    """A Trainer that has trained, and the seconds it took."""
    model = network(start, variant, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, _arguments(folder, seed, rate, recipe), train_dataset=start.pixels, compute_metrics=accuracy_of
        )
        trainer.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - begun


def _arguments(folder: str, seed: int, rate: float, recipe: Recipe) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        label_names=["labels"],
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
    )


def _parameters(model: nn.Module) -> dict[str, float]:
    cost = estimate_cost(model)
    return {
        "trainable": cost.trainable_parameters,
        "trainable_percent": cost.trainable_percent,
        "trainable_percent_without_head": cost.trainable_percent_without_head,
    }


def _images(start: Start, test: Pixels) -> dict[str, Any]:
    sizes = {"train": len(start.pixels), "test": len(test), "classes": start.classes}
    return {**sizes, "train_pixels": start.pixels.digest(), "test_pixels": test.digest()}


def quiet() -> None:
    """Errors only: every cell loads a model, gives it a new head, and may calibrate it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("trpts_peft").setLevel("ERROR")


def versions() -> dict[str, str]:
    """Of the packages that a result rests on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def machine() -> dict[str, Any]:
    """What of the machine a result rests on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version()}
