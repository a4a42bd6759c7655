"""The handwritten digits that scikit-learn ships (1,797 images of 8 by 8), as images a small ViT takes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SIZE = 32
Batch = dict[str, Tensor]


class Digits(Dataset[Batch]):
    """A labelled set of digits.

    Args:
        pixel_values: float32 (n, 3, 32, 32) in [-1, 1].
        labels: int64 (n,), counted from zero.
    """

    def __init__(self, pixel_values: Tensor, labels: Tensor) -> None:
        self.pixel_values = pixel_values
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in random order, each image distorted at random; a last batch below `size` is left out."""
        order = torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            if len(rows) == size:
                yield {"pixel_values": _distort(self.pixel_values[rows], generator), "labels": self.labels[rows]}


def split_digits(digits: range, train_per_class: int, seed: int) -> tuple[Digits, Digits]:
    """Training set with `train_per_class` images of each digit, and a test set with all the others."""
    images, targets = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(targets == digit)) for digit in digits]
    parts = [part[:train_per_class] for part in rows], [part[train_per_class:] for part in rows]
    train, test = (_make(images, targets - digits.start, np.concatenate(part)) for part in parts)
    return train, test


def _make(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Digits:
    gray = torch.from_numpy(images[rows]).float().reshape(-1, 1, 8, 8) / 8 - 1  # the file counts from 0 to 16
    large = F.interpolate(gray, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(-1, 1)
    return Digits(large.repeat(1, 3, 1, 1), torch.from_numpy(labels[rows]).long())


def _distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 3, H, W) turned by up to 20 degrees, and scaled, slanted and moved a little."""
    angle, scale, slant, x, y = torch.rand(5, len(images), generator=generator) * 2 - 1
    angle, scale = math.radians(20) * angle, 1 + 0.15 * scale
    rows = [
        torch.stack([scale * angle.cos(), 0.2 * slant - angle.sin(), 0.15 * x], dim=1),
        torch.stack([angle.sin(), scale * angle.cos(), 0.15 * y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # what lies outside reads 0, and must become black
