"""Train a small ViT from scratch on a folder of images, so that there is a backbone where no pretrained one is at hand.

    python examples/pretrain.py --data FOLDER --output FOLDER

The data set holds images or parquet files with the splits `train` and `test`. The output folder gets the model with its
image processor, as `trpts finetune --model` takes it, and results.json: top-1 on the test split, and all settings.
Killed or interrupted, the same command with --resume goes on from the last epoch that was finished; on a CPU it ends
with the very weights of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageOps
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from trpts_peft.finetuning import check_finite, saved_under_own_names
from trpts_peft.image_data import ImageData, load_image_data, with_pixel_values
from trpts_peft.metrics import accuracy_of
from trpts_peft.run_folder import SETTINGS, check_data, check_output, last_checkpoint, read_json, write_json

SIZES = {"xs": (128, 12, 4), "tiny": (192, 12, 3), "small": (384, 12, 6)}  # width, blocks, heads
RECIPE = {
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # of all steps
    "weight_decay": 0.05,
    "label_smoothing_factor": 0.1,
    "seed": 0,
}
LEAST_AREA, MOST_STRETCH = 0.4, 4 / 3  # of a crop, in shares of the image


def parse_arguments() -> dict[str, Any]:
    """The settings: what the command line says, and what the machine suggests where it is silent."""
    size, epochs = ("tiny", 100) if torch.cuda.is_available() else ("xs", 14)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", dest="dataset", required=True, metavar="FOLDER", help="images or parquet files")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="must be empty or not there")
    parser.add_argument("--size", choices=SIZES, default=size, help="default: tiny (ViT-Ti) with CUDA, else xs")
    parser.add_argument("--epochs", type=int, default=epochs, help="default: 100 with CUDA, else 14")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step and device (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="at its peak (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--patch-size", type=int, default=8, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    arguments = parser.parse_args()
    for name in ("epochs", "batch_size", "learning_rate", "image_size", "patch_size"):
        if not getattr(arguments, name) > 0:
            parser.error(f"`{name}` must be above 0, got {getattr(arguments, name)}.")
    if arguments.image_size % arguments.patch_size:
        parser.error(f"`image_size` must be a multiple of `patch_size`, got {arguments.image_size}.")
    return {**vars(arguments), "model": f"vit-{arguments.size}"}


def with_random_crops(rows: Dataset, processor: Any) -> Dataset:
    """The rows as a model trains on them: `pixel_values` (3, H, W) of another crop at each reading, and `labels`.

    All that is drawn comes from torch's generator: Trainer restores its state when it resumes, and seeds from it the
    processes that load images. So the crops of an epoch are the same, however often the run was interrupted before;
    with another number of such processes they are others.
    """
    return rows.with_transform(partial(_cropped, processor))


def _cropped(processor: Any, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    size = (processor.size["width"], processor.size["height"])
    images = [random_crop(image.convert("RGB"), size) for image in batch["image"]]
    return {**processor(images, return_tensors="pt"), "labels": torch.tensor(batch["labels"])}


def random_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A random part of an image, of 40 to 100 % of its area and somewhat stretched, resized; half of them mirrored."""
    area, stretch, x, y, mirrored = torch.rand(5).tolist()
    area, stretch = LEAST_AREA + (1 - LEAST_AREA) * area, MOST_STRETCH ** (2 * stretch - 1)
    width, height = min(math.sqrt(area * stretch), 1) * image.width, min(math.sqrt(area / stretch), 1) * image.height
    left, top = x * (image.width - width), y * (image.height - height)
    crop = image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return ImageOps.mirror(crop) if mirrored < 0.5 else crop


def new_vit(settings: Mapping[str, Any], names: Sequence[str]) -> ViTForImageClassification:
    """A ViT with random weights and a head for the classes `names`."""
    width, blocks, heads = SIZES[settings["size"]]
    config = ViTConfig(
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    set_seed(RECIPE["seed"])
    return ViTForImageClassification(config)


def new_trainer(settings: Mapping[str, Any], data: ImageData) -> Trainer:
    """A Trainer that writes a checkpoint after each epoch."""
    side = settings["image_size"]
    processor = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    arguments = TrainingArguments(
        str(Path(settings["output"], "checkpoints")),
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        **RECIPE,
        **device_options(),
        save_strategy="epoch",
        save_total_limit=2,  # the one before is still whole if a run ends while the last is written
        logging_strategy="epoch",
        remove_unused_columns=False,  # the transforms make their columns from those of the data set
    )
    return Trainer(
        new_vit(settings, data.names),
        arguments,
        train_dataset=with_random_crops(data.train, processor),
        eval_dataset=with_pixel_values(data.test, processor),
        processing_class=processor,
        compute_metrics=accuracy_of,
    )


def device_options() -> dict[str, Any]:
    """What CUDA changes: bfloat16 (slower on a CPU), and processes that load images as fast as it takes them."""
    cuda = torch.cuda.is_available()
    return {
        "use_cpu": not cuda,
        "bf16": cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        "dataloader_num_workers": min(8, os.cpu_count() or 1) if cuda else 0,
        "dataloader_pin_memory": cuda,
    }


def pretrain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train from the last whole checkpoint, or from the start; test once; save; return the results."""
    output, data = Path(settings["output"]), load_image_data(settings["dataset"])
    check_data(output, data.describe())
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / SETTINGS, {**settings, "data": data.describe()})
    trainer = new_trainer(settings, data)
    checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    with saved_under_own_names(trainer.model):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return save(trainer, settings, data)


def save(trainer: Trainer, settings: Mapping[str, Any], data: ImageData) -> dict[str, Any]:
    """Write model, image processor and, last, results.json; the checkpoints are not needed any more."""
    output, metrics = Path(settings["output"]), trainer.evaluate()
    check_finite(trainer.model, metrics["eval_loss"], settings["learning_rate"])
    trainer.model.save_pretrained(output)
    trainer.processing_class.save_pretrained(output)
    results = {
        **{name: metrics[f"eval_{name}"] for name in ("accuracy", "accuracy_per_class", "loss")},
        "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "settings": {**settings, **RECIPE, **device_options(), "least_area": LEAST_AREA, "most_stretch": MOST_STRETCH},
        "parameters": trainer.model.num_parameters(),
        "data": data.describe(),
    }
    write_json(output / "results.json", results)
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    return results


def main() -> None:
    """Pretrain, unless the run to resume is at its end, and say how good the model is."""
    settings = parse_arguments()
    check_output(Path(settings["output"]), settings)  # before all images are looked at
    done = Path(settings["output"]) / "results.json"
    results = read_json(done) if done.is_file() else pretrain(settings)
    print(f"top-1 on the {results['data']['test']:,} test images: {results['accuracy']:.2f} %")


if __name__ == "__main__":
    main()
