"""In which blocks of a model tokens can be selected: what cannot be is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import nn

from .change_of_class import has_own_forward
from .families import FAMILIES, Family, find_blocks, find_family

__all__ = ["check_saved_modules", "check_token_layers"]


def check_token_layers(model: nn.Module, layers: int | list[int], argument: str = "token_layers") -> None:
    """Refuse block indices, or a number of blocks yet to be chosen, that `model` cannot select tokens in.

    Raises:
        ValueError: the model is outside the table of families, needs every patch, has no such block, or blocks whose
            own `forward` no class can change.
    """
    family = find_family(model)
    if family is None:
        names = ", ".join(f.model_type for f in FAMILIES)
        raise ValueError(
            f"`{argument}` must be an integer for a model that is no supported ViT ({names}), got {layers}: leave it "
            "at its default, parameter selection works all the same."
        )
    for module in model.modules():
        if isinstance(module, family.refused):
            raise ValueError(
                f"`{argument}` must be 0 for {type(module).__name__}, which needs every patch, got {layers}."
            )
    blocks = [block for _, block in find_blocks(model)]
    possible = range(len(blocks)) if isinstance(layers, int) else layers
    if any(index >= len(blocks) for index in possible):
        raise ValueError(f"`{argument}` must be block indices below {len(blocks)}, got {layers}.")
    changed = [*blocks[min(possible, default=len(blocks)) :], *(cast(Any, blocks[i]).attention for i in possible)]
    if any(_passes_class_by(module, family) for module in changed):
        raise ValueError(
            f"`{argument}` must be of blocks that run the `forward` of their class, got {layers} for a model with "
            "others, which would select nothing: compile or replace a block's `forward` afterwards, or select none."
        )


def check_saved_modules(model: nn.Module, modules_to_save: Collection[str]) -> None:
    """Refuse to train a block, or its attention, whole: a copy of it would be one more block, and selects no tokens.

    Args:
        model: the base model.
        modules_to_save: ends of the names of modules, as PEFT takes them.
    """
    family = find_family(model)
    if family is None:
        return
    parts = (family.layer_class, family.attention_class)
    for name, module in model.named_modules():
        if name.endswith(tuple(modules_to_save)) and any(isinstance(part, parts) for part in module.modules()):
            raise ValueError(
                f"`modules_to_save` must name no block of a ViT, nor its attention or what holds it, got {name}: train "
                "its linears by `target_modules`, or its norms and MLP whole."
            )


def _passes_class_by(module: nn.Module, family: Family) -> bool:
    """Whether another class would make no difference to a stock module, whose `forward` was replaced or compiled."""
    return type(module) in (family.layer_class, family.attention_class) and has_own_forward(module)
