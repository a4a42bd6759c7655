"""Labelled pictures and a small pretrained classifier in folders, as the command line takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from conftest import build_vit

SIZE = 32  # pixels of the small ViT


def picture(label: int, seed: int, *, size: tuple[int, int] = (SIZE, SIZE), mode: str = "RGB") -> Image.Image:
    """Noise with a tint by which the label can be told."""
    rng = np.random.default_rng((label, seed))
    tint = np.array([(40, 0, 0), (0, 40, 0), (0, 0, 40)][label % 3])
    pixels = rng.integers(0, 200, (size[1], size[0], 3)) + tint
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def write_folder(folder: Path, *, splits: Mapping[str, int], names: Sequence[str] = ("red", "green", "blue")) -> Path:
    """A folder of images: `folder/split/name/number.png`, so many for each name."""
    for split, count in splits.items():
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                picture(label, hash_of(split) + index).save(folder / split / name / f"{index}.png")
    return folder


def hash_of(split: str) -> int:
    """Another seed for each split, the same in each process."""
    return 1000 * sum(map(ord, split))


def write_parquet(folder: Path, splits: Mapping[str, datasets.Dataset]) -> Path:
    """A folder of parquet files, one a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def rows_of(labels: Sequence[Any], feature: Any, **columns: Sequence[Any]) -> datasets.Dataset:
    """A split with the columns `image` and `label`, and others as given."""
    images = [picture(index % 3, index) for index in range(len(labels))]
    features = {"image": datasets.Image(), "label": feature}
    features |= {name: datasets.Value("int64") for name in columns}
    return datasets.Dataset.from_dict(
        {"image": images, "label": list(labels), **columns}, features=datasets.Features(features)
    )


def write_base(folder: Path, **options: Any) -> Path:
    """A small ViT with five classes of its own, and its image processor."""
    build_vit(num_labels=5, **options).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder
