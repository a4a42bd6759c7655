"""Look at what token selection does to images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .compiled import force_eager
from .families import find_blocks
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

    def __init__(self) -> None:
        super().__init__()
        self._last: list[tuple[list[int], dict[int, int]]] | None = None  # per sample of the present pass

    def _start_pass(self) -> None:
        self._last = None

    def _add(self, block: int, importance: Tensor, kept: Tensor) -> None:
        record = self.setdefault(block, BlockRecord([], [], []))
        before = self._last or [(list(range(importance.shape[1])), {}) for _ in importance]
        self._last = [
            _trace(block, patches, merged, indices.tolist())
            for (patches, merged), indices in zip(before, kept.cpu(), strict=True)
        ]
        record.kept.extend(torch.tensor(patches, dtype=torch.int64, device="cpu") for patches, _ in self._last)
        record.merged.extend(merged for _, merged in self._last)
        record.importance.extend(importance.detach().cpu())


def _trace(block: int, patches: list[int], merged: dict[int, int], kept: list[int]) -> tuple[list[int], dict[int, int]]:
    """Patches that are still tokens of their own behind the block, and {patch: block whose merged token it is in}."""
    # Tokens in front of the block: patches of their own, then one token per earlier block whose merged token is left.
    tokens = [[patch] for patch in patches]
    for earlier in sorted(set(merged.values())):
        tokens.append([patch for patch, home in merged.items() if home == earlier])
    gone = set(range(len(tokens))) - set(kept)
    left = [patch for token, patch in enumerate(patches) if token not in gone]
    return left, {**merged, **{patch: block for token in gone for patch in tokens[token]}}


@contextmanager
def record_tokens(model: nn.Module) -> Iterator[TokenRecord]:
    """Record token selection in the forward passes made within.

    Args:
        model: a model that selects tokens, wrapped by PEFT or not.

    Yields:
        A record that fills up as the model runs: samples are appended in the order in which they pass. Compiled models
        run eagerly meanwhile.

    Raises:
        ValueError: no block of the model selects tokens; or, at a forward pass, it trains with gradient
            checkpointing.
    """
    selections = token_selections(model)
    if not selections:
        raise ValueError("`model` must select tokens in some block, got one that does not: use `calibrate` first.")
    record = TokenRecord()

    def watch(block: int) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
            record._add(block, args[1], output[1])

        return hook

    def start_pass(first_block: nn.Module, _args: object) -> None:
        if first_block.training and getattr(first_block, "gradient_checkpointing", False):
            raise ValueError(
                "`model` must not run blocks again while tokens are recorded, got gradient checkpointing: "
                "call `model.eval()`."
            )
        record._start_pass()

    handles = [selection.register_forward_hook(watch(block)) for block, selection in selections.items()]  # type: ignore[arg-type]
    firsts = {name.rpartition(".")[0]: block for name, block in reversed(find_blocks(model))}  # one for each ViT
    handles.extend(block.register_forward_pre_hook(start_pass) for block in firsts.values())
    try:
        with force_eager():
            yield record
    finally:
        for handle in handles:
            handle.remove()
