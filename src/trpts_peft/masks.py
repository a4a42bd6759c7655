"""Attention masks in a model that selects tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_mask", "refuse_padding"]


def fit_mask(mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """Cut a mask that was made for all tokens to those that are left: it is all true, else it was refused."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"Token selection needs a tensor as attention mask, got {type(mask).__name__}: load the model with "
            '`attn_implementation="sdpa"`, or call `set_token_selection(model, False)`.'
        )
    return mask[..., :num_tokens, :num_tokens] if mask.dim() == 4 else mask[..., :num_tokens]


def refuse_padding(mask: Tensor | None) -> None:
    """Refuse a mask that hides tokens: those that are kept would no longer be where it says."""
    if mask is None:
        return
    everything = mask.all() if mask.dtype == torch.bool else (mask == (0 if mask.dim() == 4 else 1)).all()
    message = (
        "`attention_mask` must not mask tokens where token selection is on, got a mask with padding: drop it, or "
        "call `set_token_selection(model, False)`."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(everything, message)  # a question asked by the kernels: no break of the graph
    elif not everything:
        raise ValueError(message)
