"""The table of supported ViT families: all that token selection has to know about a new one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

__all__ = ["FAMILIES", "Family", "block_index", "find_blocks", "find_family"]

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: the `model_type` of the transformers config.
        layer_class: the transformer block, with `attention`, `layernorm_before`, `layernorm_after`, `mlp`, `dropout`.
        attention_class: the block's attention, with `q_proj`, `k_proj`, `v_proj`, `o_proj`, `scaling`, `head_dim`.
        eager_attention: the attention function that the family falls back on.
        num_prefix_tokens: leading tokens that are no image patch.
        target_modules: the linears trained by default.
        refused: model classes whose output needs every patch in its place.
    """

    model_type: str
    layer_class: type[nn.Module]
    attention_class: type[nn.Module]
    eager_attention: Callable[..., Any]
    num_prefix_tokens: int
    target_modules: tuple[str, ...] = _LINEARS
    refused: tuple[type[nn.Module], ...] = ()


FAMILIES = (
    Family(
        model_type="vit",
        layer_class=modeling_vit.ViTLayer,
        attention_class=modeling_vit.ViTAttention,
        eager_attention=modeling_vit.eager_attention_forward,
        num_prefix_tokens=1,
        refused=(modeling_vit.ViTForMaskedImageModeling,),
    ),
    Family(
        model_type="deit",
        layer_class=modeling_deit.DeiTLayer,
        attention_class=modeling_deit.DeiTAttention,
        eager_attention=modeling_deit.eager_attention_forward,
        num_prefix_tokens=2,
        refused=(modeling_deit.DeiTForMaskedImageModeling,),
    ),
)


def block_index(name: str) -> int | None:
    """The first number in the name of a linear or a unit: the index of its block; None outside any block."""
    found = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def find_family(model: nn.Module) -> Family | None:
    """The family whose blocks `model` holds, however deep; None for models outside the table."""
    for module in model.modules():
        for family in FAMILIES:
            if isinstance(module, family.layer_class):
                return family
    return None


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks of a supported ViT with their names in `model`, in order; empty outside the table."""
    family = find_family(model)
    if family is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, family.layer_class)]
