"""Scores that the library has no use for, to find out what its own are worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from trpts_peft import FisherScores

__all__ = ["batch_fisher", "constant_parts", "without_constant_parts"]


def batch_fisher(base: nn.Module, pixels: Dataset[dict[str, Tensor]], batch_size: int) -> FisherScores:
    """The mean over batches of (∂L/∂W)², L the mean loss of a batch: an inexact eq. 2 that the peers compute."""
    scored = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}
    weights = [linear.weight for linear in scored.values()]
    sums, count = [torch.zeros_like(weight) for weight in weights], 0
    base.eval()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))  # rows may come sorted by class
    for batch in DataLoader(Subset(pixels, order.tolist()), batch_size):
        loss = base(**{name: tensor.to(base.device) for name, tensor in batch.items()}).loss
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.square()
        count += 1
    return FisherScores(dict(zip(scored, ((total / count).cpu() for total in sums), strict=True)), len(pixels))


def constant_parts(base: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """E[x]² / E[x²] of every input of some linears, (in_features,), over all tokens of all images."""
    first, second, counts = defaultdict[str, Any](int), defaultdict[str, Any](int), defaultdict[str, int](int)

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
            x = args[0].flatten(0, -2).double()
            first[name] += x.sum(0)
            second[name] += x.square().sum(0)
            counts[name] += len(x)

        return hook

    handles = [base.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    base.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                base(pixel_values=batch["pixel_values"].to(base.device))
    finally:
        for handle in handles:
            handle.remove()
    # An input that is always zero has nothing but its constant part: 0 / 0 there.
    return {name: (first[name].square() / counts[name] / second[name]).nan_to_num(1.0).cpu() for name in counts}


def without_constant_parts(scores: FisherScores, constant: Mapping[str, Tensor]) -> FisherScores:
    """Each score times the part of its input that varies, 1 - E[x]² / E[x²]."""
    # Rounding may make a part a little more than 1, but no score is negative.
    varying = {name: score * (1 - constant[name]).clamp_min(0).float() for name, score in scores.items()}
    return FisherScores(varying, scores.num_samples)
