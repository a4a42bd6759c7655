"""A small ViT learns the digits 0-4, then is adapted to 5-9: linear probe, LoRA, full fine-tuning, TR-PTS.

Run by `make demo`. Needs no network and under five minutes on two cores. Writes into runs/demo/: the TR-PTS adapter,
the paper's figures 5, 6 and 7 for this task, and the table that it prints, as table.md and table.json.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from digits import IMAGE_SIZE, Batch, Digits, split_digits
from measure import accuracy, file_bytes, inference, relative_times, saved_activation_bytes, training_step
from tables import markdown_table
from trpts_peft import Selection, TRPTSConfig, calibrate, plot_layer_importance, plot_overlap, plot_tokens

OUTPUT = Path(__file__).resolve().parents[1] / "runs" / "demo"
QUERIES_AND_VALUES = ["q_proj", "v_proj"]
LINEARS = [*QUERIES_AND_VALUES, "k_proj", "o_proj", "fc1", "fc2"]
PRETRAIN_EPOCHS, PRETRAIN_RATE = 15, 2e-3
EPOCHS, BATCH_SIZE = 40, 20
SEED = 0
TIMED_BATCH = 100

T = TypeVar("T")
Arms = dict[str, tuple[nn.Module, float]]  # {method: (model, learning rate)}


# ---- the base model and the ways to adapt it ----


def new_vit() -> ViTForImageClassification:
    """64 patches, 6 blocks, width 64: 0.3 million parameters."""
    torch.manual_seed(SEED)
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_labels=5,
        initializer_range=0.1,  # the default, 0.02, is meant for width 768: from there it takes twice the epochs
    )
    return ViTForImageClassification(config)


def with_new_head(pretrained: ViTForImageClassification) -> ViTForImageClassification:
    """A copy whose classifier starts anew: the digits have changed."""
    vit = copy.deepcopy(pretrained)
    torch.manual_seed(SEED)
    vit.classifier = nn.Linear(64, 5)
    return vit


def linear_probe(vit: ViTForImageClassification) -> nn.Module:
    """Only the classifier trains."""
    vit.requires_grad_(False)
    vit.classifier.requires_grad_(True)
    return vit


def lora(vit: ViTForImageClassification, target_modules: list[str]) -> nn.Module:
    """LoRA of rank 8."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=target_modules, modules_to_save=["classifier"])
    return get_peft_model(vit, config)


def trpts(vit: ViTForImageClassification, data: Digits) -> tuple[PeftModel, Selection]:
    """TR-PTS: the same three lines as in the README."""
    model = get_peft_model(vit, TRPTSConfig(keep_rate=0.8, modules_to_save=["classifier"]))
    return model, calibrate(model, data, progress=False)


# ---- training, one loop for all ----


def train(model: nn.Module, data: Digits, epochs: int, learning_rate: float) -> None:
    """Adam, a tenth of the steps to warm up, then cosine to zero."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    steps = epochs * (len(data) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, steps))
    model.train()
    for _ in range(epochs):
        for batch in data.batches(BATCH_SIZE, generator):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()


def _factor(step: int, steps: int) -> float:
    return min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---- the table ----


@dataclass(frozen=True)
class Row:
    """One way to adapt. Times are ratios to full fine-tuning; adapters predict merged."""

    method: str
    learning_rate: float
    accuracy_percent: float
    trainable_percent: float
    file_bytes: int
    training_time: float
    inference_time: float
    saved_activation_bytes: int


HEADINGS = ["method", "learning rate", "accuracy %", "trainable %", "file, bytes", "training time", "inference time"]
HEADINGS += ["saved activations, bytes"]


def make_rows(arms: Arms, test: Batch) -> list[Row]:
    """Measure every trained model."""
    deployed = {name: _merged(model) for name, (model, _) in arms.items()}
    small = {key: value[:BATCH_SIZE] for key, value in test.items()}
    large = {key: value[:TIMED_BATCH] for key, value in test.items()}
    size = sum(p.numel() for p in deployed["full"].parameters())
    training = relative_times({name: partial(training_step(model), large) for name, (model, _) in arms.items()}, "full")
    predicting = relative_times({name: inference(model, large) for name, model in deployed.items()}, "full")
    return [
        Row(
            method=name,
            learning_rate=learning_rate,
            accuracy_percent=accuracy(deployed[name], test),
            trainable_percent=100 * sum(p.numel() for p in model.parameters() if p.requires_grad) / size,
            file_bytes=file_bytes(model),
            training_time=training[name],
            inference_time=predicting[name],
            saved_activation_bytes=saved_activation_bytes(model, small),
        )
        for name, (model, learning_rate) in arms.items()
    ]


def _merged(model: nn.Module) -> nn.Module:
    merged: nn.Module = copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
    return merged


def to_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    return markdown_table(HEADINGS, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    cells = [row.method, f"{row.learning_rate:g}", f"{row.accuracy_percent:.1f}", f"{row.trainable_percent:.2f}"]
    cells += [f"{row.file_bytes:,}", f"{row.training_time:.2f}", f"{row.inference_time:.2f}"]
    return [*cells, f"{row.saved_activation_bytes:,}"]


# ---- what is written ----


def check_reload(model: PeftModel, vit: ViTForImageClassification, test: Batch) -> None:
    """Save the adapter, load it over a fresh base, merge it: the predictions must be the same at each step."""
    model.save_pretrained(str(OUTPUT / "adapter"))
    loaded = PeftModel.from_pretrained(vit, str(OUTPUT / "adapter"))
    with torch.inference_mode():
        expected = model.eval()(pixel_values=test["pixel_values"]).logits
        reloaded = loaded.eval()(pixel_values=test["pixel_values"]).logits
        merged = _merged(loaded).eval()(pixel_values=test["pixel_values"]).logits
    torch.testing.assert_close(reloaded, expected, rtol=0, atol=0)
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)


def write_figures(model: PeftModel, selections: dict[str, Selection], test: Digits) -> None:
    """Figures 5 (layer importance), 6 (tokens) and 7 (overlap) of the paper."""
    one_of_each = torch.stack([test.pixel_values[test.labels == label][0] for label in range(4)])
    figures = {
        "layer_importance.png": plot_layer_importance(next(iter(selections.values()))).figure,
        "tokens.png": plot_tokens(model, one_of_each),
        "overlap.png": plot_overlap(selections).figure,
    }
    for name, figure in figures.items():
        figure.savefig(OUTPUT / name, dpi=120, bbox_inches="tight")


def write_table(rows: list[Row], extra: dict[str, Any]) -> None:
    """table.md and table.json."""
    (OUTPUT / "table.md").write_text(to_markdown(rows) + "\n", encoding="utf-8")
    content = {**extra, "rows": [asdict(row) for row in rows]}
    (OUTPUT / "table.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- all of it ----


def pretrain(train_set: Digits, test_set: Digits) -> ViTForImageClassification:
    """The ViT that everything starts from."""
    vit = new_vit()
    timed("pretraining on the digits 0-4", lambda: train(vit, train_set, PRETRAIN_EPOCHS, PRETRAIN_RATE))
    print(
        f"    {len(train_set)} images, {accuracy(vit, vars(test_set)):.1f} % right of {len(test_set)} others",
        flush=True,
    )
    return vit


def adapt(vit: ViTForImageClassification, sparse: PeftModel, data: Digits) -> Arms:
    """Train them all; learning rates and epochs were picked on other draws of training images, between a few values."""
    arms: Arms = {
        "linear probe": (linear_probe(with_new_head(vit)), 1e-1),
        "LoRA r=8, q and v": (lora(with_new_head(vit), QUERIES_AND_VALUES), 1e-2),
        "LoRA r=8, six linears": (lora(with_new_head(vit), LINEARS), 5e-3),
        "full": (with_new_head(vit), 1e-3),
        "TR-PTS": (sparse, 2e-2),
    }
    for name, (model, learning_rate) in arms.items():
        timed(f"training, {name}", partial(train, model, data, EPOCHS, learning_rate))
    return arms


def timed(what: str, action: Callable[[], T]) -> T:
    """Run and say how long it took."""
    start = time.perf_counter()
    result = action()
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def main() -> None:
    """Train, measure, write."""
    start = time.perf_counter()
    # peft 0.21 asks for the old name of a property of transformers 5.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("trpts_peft").setLevel(logging.ERROR)  # "not calibrated" until the next line calibrates
    torch.set_num_threads(1)  # tensors this small gain little from a second core, and the sums are then the same on any
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)

    old_train, old_test = split_digits(range(5), train_per_class=140, seed=SEED)
    new_train, new_test = split_digits(range(5, 10), train_per_class=40, seed=SEED)
    vit = pretrain(old_train, old_test)
    model, selection = timed("calibrating TR-PTS", lambda: trpts(with_new_head(vit), new_train))
    arms = adapt(vit, model, new_train)
    rows = timed("measuring", lambda: make_rows(arms, vars(new_test)))

    other_train = split_digits(range(5, 10), train_per_class=40, seed=SEED + 1)[0]
    selections = {
        "5-9": selection,
        "5-9, another draw": trpts(with_new_head(vit), other_train)[1],
        "0-4": trpts(with_new_head(vit), old_train)[1],
    }
    check_reload(model, with_new_head(vit), vars(new_test))
    write_figures(model, selections, new_test)
    write_table(rows, {"train_images": len(new_train), "test_images": len(new_test), "seed": SEED})
    print(f"\n{selection.summary()}\n")
    print(f"Digits 5-9: {len(new_train)} training images, {len(new_test)} test images\n\n{to_markdown(rows)}\n")
    print(
        f"times: processor time relative to full, batch {TIMED_BATCH}; saved activations: one step, batch {BATCH_SIZE}"
    )
    print(f"{OUTPUT}: {', '.join(sorted(path.name for path in OUTPUT.iterdir()))}")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
