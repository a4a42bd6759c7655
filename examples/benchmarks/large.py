"""Calibrate models as large as ViT-H/14 and say what memory it took: python -m benchmarks.large [MODEL ...].

Run in examples/. Noise instead of images, and random weights: neither changes what is allocated.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from measure import peak_bytes, resident_bytes
from tables import markdown_table
from trpts_peft import TRPTSConfig, calibrate

SIZES = {
    "ViT-B/16": {},
    "ViT-L/16": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "ViT-H/14": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
IMAGES = 8


def memory(size: str, batch_size: int) -> list[str]:
    """Megabytes of the model, of the sums, and of the peak of `calibrate` beyond the model."""
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(num_labels=2, **SIZES[size]))
    model = get_peft_model(vit, TRPTSConfig(modules_to_save=["classifier"]))
    assert isinstance(model, PeftModel)
    weights = resident_bytes(*model.parameters())
    targets = {name for name, module in model.named_modules() if hasattr(module, "trpts_columns")}
    sums = 8 * sum(model.get_submodule(name).base_layer.weight.numel() for name in targets)
    pixels = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(pixels)]
    peak = peak_bytes(lambda: calibrate(model, data, batch_size=batch_size, progress=False))
    return [size, str(batch_size), *(f"{part / 1e6:,.0f}" for part in (weights, sums, peak))]


def main() -> None:
    """One row a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"from {', '.join(SIZES)}; all of them by default")
    parser.add_argument("--batch-size", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.models) - set(SIZES)):
        parser.error(f"`MODEL` must be one of {', '.join(SIZES)}, got {', '.join(unknown)}.")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("trpts_peft").setLevel(logging.ERROR)
    rows = [memory(size, arguments.batch_size) for size in arguments.models or SIZES]
    print(markdown_table(["model", "batch", "weights, MB", "sums, MB", "peak beyond the weights, MB"], rows))


if __name__ == "__main__":
    main()
