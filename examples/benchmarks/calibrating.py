"""Time and memory of the exact Fisher information beside plain forward and backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.methods import full
from measure import Batch, interleaved_seconds, median_ratio, peak_bytes, saved_activation_bytes
from trpts_peft import FisherScores, estimate_fisher

BATCH_SIZE, WORKSPACE_MB = 8, 256


def fisher_rows(images: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row: time over that of plain training without an optimizer, and the peak of memory with its parts."""
    model = full().to(device).eval()
    pixels = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": index % 100} for index, image in enumerate(pixels)]

    def fisher(samples: list[dict[str, Any]]) -> FisherScores:
        return estimate_fisher(model, samples, batch_size=BATCH_SIZE, workspace_mb=WORKSPACE_MB, progress=False)

    actions = {"plain": lambda: forward_and_backward(model, data, device), "fisher": lambda: fisher(data)}
    seconds = interleaved_seconds(actions, rounds)
    model.zero_grad()
    scored: list[int] = []
    peak = peak_bytes(lambda: scored.extend(score.numel() for score in fisher(data[: 2 * BATCH_SIZE]).values()))
    batch = {key: value.to(device) for key, value in next(iter(DataLoader(data, BATCH_SIZE))).items()}
    return [
        {
            "images": images,
            "fisher_to_plain": median_ratio(seconds["fisher"], seconds["plain"]),
            "peak_bytes": peak,
            "sum_bytes": 8 * sum(scored),
            "score_bytes": 4 * sum(scored),
            "workspace_bytes": WORKSPACE_MB * 2**20,
            "activation_bytes": saved_activation_bytes(model, batch),
            "seconds": seconds,
        }
    ]


def forward_and_backward(model: nn.Module, data: Any, device: str) -> None:
    """All gradients of the mean loss, batch by batch."""
    for batch in DataLoader(data, BATCH_SIZE):
        moved: Batch = {key: value.to(device) for key, value in batch.items()}
        model.zero_grad()
        model(**moved).loss.backward()
