"""The recipe in full: an image classifier fine-tuned with TR-PTS under a plain Trainer, to copy and change.

    python examples/finetune_image_classification.py MODEL DATASET OUTPUT

MODEL is an image classifier on the Hub or in a folder; DATASET has the splits `train` and `test` with the columns
`image` and `label` (classes with names). Started again, it goes on from the last checkpoint in OUTPUT. The command
`trpts finetune` does the same with every check and option; this is what to start from where it does not fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from datasets import DatasetDict, load_dataset
from peft import get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from trpts_peft import TRPTSCallback, TRPTSConfig, calibrate


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("output")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="several times that of LoRA")
    parser.add_argument("--keep-rate", type=float, default=0.9, help="share of the image tokens that a layer keeps")
    return parser.parse_args()


def load_images(name: str, processor: Any) -> DatasetDict:
    """The data set, whose samples become `pixel_values` and `labels` when they are read."""

    def transform(batch: Mapping[str, Any]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**processor(images, return_tensors="pt"), "labels": batch["label"]}

    return load_dataset(name).with_transform(transform)


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    """Share of the images that are classified right."""
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


def main() -> None:
    """Load, calibrate, train, test, save."""
    arguments = parse_arguments()
    set_seed(0)
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    images = load_images(arguments.dataset, processor)
    labels = images["train"].features["label"].names
    base = AutoModelForImageClassification.from_pretrained(
        arguments.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        dtype="float32",  # the head trains in the dtype of the file otherwise
    )

    training = TrainingArguments(
        arguments.output,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="epoch",
        remove_unused_columns=False,  # the transform needs the columns that the model does not
    )

    # The lines that make it TR-PTS. calibrate comes before training: it gives parameters another shape.
    model = get_peft_model(base, TRPTSConfig(keep_rate=arguments.keep_rate, modules_to_save=["classifier"]))
    model.to(training.device)  # Trainer would do so, but calibration gains by it, too
    calibrate(model, images["train"])

    trainer = Trainer(
        model,
        training,
        train_dataset=images["train"],
        eval_dataset=images["test"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.add_callback(TRPTSCallback(trainer))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output))
    print(trainer.evaluate())
    trainer.save_model()  # the adapter, its card and the image processor; a megabyte or two


if __name__ == "__main__":
    main()
