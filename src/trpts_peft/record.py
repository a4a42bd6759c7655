"""Look at what token selection does to images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .vit import token_selections

__all__ = ["BlockRecord", "TokenRecord", "record_tokens"]


@dataclass(frozen=True)
class BlockRecord:
    """What one block did, over all samples that passed.

    Attributes:
        kept: per sample, int64 (K,): the image patches that are still tokens of their own behind the block.
        merged: per sample, {patch: block whose merged token it is part of now}.
        importance: per sample, float32 (N,): the importance of the block's N image tokens, merged ones included.
    """

    kept: list[Tensor]
    merged: list[dict[int, int]]
    importance: list[Tensor]


class TokenRecord(dict[int, BlockRecord]):
    """{block index: what it did}, for the blocks that selected tokens."""

    def _add(self, block: int, importance: Tensor, kept: Tensor) -> None:
        record = self.setdefault(block, BlockRecord([], [], []))
        for scores, indices in zip(importance.detach().cpu(), kept.cpu(), strict=True):
            self._add_sample(block, record, scores, indices.tolist())

    def _add_sample(self, block: int, record: BlockRecord, importance: Tensor, kept: list[int]) -> None:
        sample = len(record.kept)
        before = max((other for other in self if other < block), default=None)
        patches = list(range(len(importance))) if before is None else self[before].kept[sample].tolist()
        merged = {} if before is None else dict(self[before].merged[sample])
        # Tokens in front of the block: patches of their own, then at most one token per earlier merging block.
        tokens: list[list[int]] = [[patch] for patch in patches]
        for earlier in sorted(set(merged.values())):
            tokens.append([patch for patch, home in merged.items() if home == earlier])
        gone = set(range(len(tokens))) - set(kept)
        merged.update({patch: block for token in gone for patch in tokens[token]})
        record.kept.append(torch.tensor([p for t, p in enumerate(patches) if t in kept], dtype=torch.int64))
        record.merged.append(merged)
        record.importance.append(importance)


@contextmanager
def record_tokens(model: nn.Module) -> Iterator[TokenRecord]:
    """Record token selection in the forward passes made within.

    Args:
        model: a model that selects tokens, wrapped by PEFT or not.

    Yields:
        A record that fills up as the model runs: samples are appended in the order in which they pass.

    Raises:
        ValueError: no block of the model selects tokens.
    """
    selections = token_selections(model)
    if not selections:
        raise ValueError("`model` must select tokens in some block, got one that does not: use `calibrate` first.")
    record = TokenRecord()

    def watch(block: int) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
            record._add(block, args[1], output[1])

        return hook

    handles = [selection.register_forward_hook(watch(block)) for block, selection in selections.items()]  # type: ignore[arg-type]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
