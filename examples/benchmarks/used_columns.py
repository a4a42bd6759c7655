"""How few inputs of a linear its neurons share after calibration: python -m benchmarks.used_columns MODEL DATASET.

Run in examples/. MODEL is a ViTForImageClassification, DATASET anything that `datasets.load_dataset` takes, with the
columns `image` and `label`; both may be folders. Prints the mean over blocks of U / in_features, by kind of linear.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from typing import Any

from datasets import load_dataset
from peft import get_peft_model
from torch import nn
from transformers import AutoImageProcessor, ViTForImageClassification

from trpts_peft import TRPTSConfig, calibrate


def used_shares(model: nn.Module) -> dict[str, float]:
    """{kind of linear: mean over its blocks of U / in_features} of the adapter `default`."""
    shares = defaultdict(list)
    for name, module in model.named_modules():
        if hasattr(module, "trpts_used"):
            shares[name.rpartition(".")[2]].append(module.trpts_used["default"].numel() / module.in_features)
    return {kind: sum(values) / len(values) for kind, values in shares.items()}


def main() -> None:
    """Calibrate with the defaults, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--num-samples", type=int, default=400, help="images to calibrate on")
    arguments = parser.parse_args()
    logging.getLogger("trpts_peft").setLevel(logging.ERROR)

    data = load_dataset(arguments.dataset, split="train")
    processor = AutoImageProcessor.from_pretrained(arguments.model)

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": batch["label"]}

    labels = data.features["label"].num_classes
    vit = ViTForImageClassification.from_pretrained(arguments.model, num_labels=labels, ignore_mismatched_sizes=True)
    model = get_peft_model(vit, TRPTSConfig(modules_to_save=["classifier"]))
    print("weight magnitude:", *(f"{kind} {share:.3f}" for kind, share in used_shares(model).items()))
    calibrate(model, data.with_transform(prepare), num_samples=arguments.num_samples, progress=False)
    print("calibrated:", *(f"{kind} {share:.3f}" for kind, share in used_shares(model).items()))


if __name__ == "__main__":
    main()
