"""The table of supported ViT families: all that token selection has to know about a new one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deit import modeling_deit
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers
from transformers.models.vit import modeling_vit
from transformers.models.vit_msn import modeling_vit_msn

from .compiled import COMPILER

__all__ = [
    "FAMILIES",
    "Family",
    "block_index",
    "block_of",
    "count_vits",
    "find_blocks",
    "find_family",
    "is_of_family",
    "num_prefix_tokens",
    "unit_order",
]

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
_GATED_LINEARS = (*_LINEARS, "gate_proj", "up_proj", "down_proj")  # of the MLP of the largest DINOv2


def _attend(block: Any, hidden_states: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    attended, _ = block.attention(block.layernorm_before(hidden_states), mask, **kwargs)
    dropped: Tensor = block.dropout(attended)
    return dropped + hidden_states


def _transform(block: Any, hidden_states: Tensor) -> Tensor:
    dropped: Tensor = block.dropout(block.mlp(block.layernorm_after(hidden_states)))
    return hidden_states + dropped


def _attend_scaled(block: Any, hidden_states: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    attended, _ = block.attention(block.norm1(hidden_states), mask, **kwargs)
    dropped: Tensor = block.drop_path(block.layer_scale1(attended))
    return dropped + hidden_states


def _transform_scaled(block: Any, hidden_states: Tensor) -> Tensor:
    dropped: Tensor = block.drop_path(block.layer_scale2(block.mlp(block.norm2(hidden_states))))
    return dropped + hidden_states


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: the `model_type` of the transformers config.
        layer_class: the transformer block, with `attention` and `mlp`.
        attention_class: the block's attention, with `q_proj`, `k_proj`, `v_proj`, `o_proj`, `scaling`, `head_dim` and
            `config`.
        eager_attention: the attention function that the family falls back on.
        class_tokens: leading tokens that are neither image patches nor registers.
        target_modules: the linears trained by default.
        refused: model classes whose output needs every patch in its place.
        attend: (block, hidden states, mask, **kwargs of the attention) -> what the block's MLP half starts from.
        transform: (block, hidden states) -> what the block returns.
    """

    model_type: str
    layer_class: type[nn.Module]
    attention_class: type[nn.Module]
    eager_attention: Callable[..., Any]
    class_tokens: int = 1
    target_modules: tuple[str, ...] = _LINEARS
    refused: tuple[type[nn.Module], ...] = ()
    attend: Callable[..., Tensor] = _attend
    transform: Callable[..., Tensor] = _transform


FAMILIES = (
    Family(
        model_type="vit",
        layer_class=modeling_vit.ViTLayer,
        attention_class=modeling_vit.ViTAttention,
        eager_attention=modeling_vit.eager_attention_forward,
        refused=(modeling_vit.ViTForMaskedImageModeling,),
    ),
    Family(
        model_type="deit",
        layer_class=modeling_deit.DeiTLayer,
        attention_class=modeling_deit.DeiTAttention,
        eager_attention=modeling_deit.eager_attention_forward,
        class_tokens=2,
        refused=(modeling_deit.DeiTForMaskedImageModeling,),
    ),
    Family(
        model_type="vit_msn",
        layer_class=modeling_vit_msn.ViTMSNLayer,
        attention_class=modeling_vit_msn.ViTMSNAttention,
        eager_attention=modeling_vit_msn.eager_attention_forward,
    ),
    Family(
        model_type="dinov2",
        layer_class=modeling_dinov2.Dinov2Layer,
        attention_class=modeling_dinov2.Dinov2Attention,
        eager_attention=modeling_dinov2.eager_attention_forward,
        target_modules=_GATED_LINEARS,
        refused=(modeling_dinov2.Dinov2Backbone,),
        attend=_attend_scaled,
        transform=_transform_scaled,
    ),
    Family(
        model_type="dinov2_with_registers",
        layer_class=modeling_dinov2_with_registers.Dinov2WithRegistersLayer,
        attention_class=modeling_dinov2_with_registers.Dinov2WithRegistersAttention,
        eager_attention=modeling_dinov2_with_registers.eager_attention_forward,
        target_modules=_GATED_LINEARS,
        refused=(modeling_dinov2_with_registers.Dinov2WithRegistersBackbone,),
        attend=_attend_scaled,
        transform=_transform_scaled,
    ),
)


def block_of(linear: str) -> str | None:
    """The block that a linear lies in, by its name: all up to the last number with more behind it; None outside."""
    found = re.match(r"(.*\.\d+)\.", linear)
    return found.group(1) if found else None


def block_index(name: str) -> int | None:
    """The last number in the name of a block or of a linear in it, as PEFT counts layers; None outside any block."""
    found = re.match(r".*\.(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def unit_order(unit: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sort key of units: those in a block first, numbers by value."""
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in unit.split(".")]
    return block_index(unit) is None, parts


def is_of_family(model: nn.Module) -> bool:
    """Whether `model` is itself of a supported family; one of another class may hold a ViT and feed it differently."""
    return any(type(model).__module__ == family.layer_class.__module__ for family in FAMILIES)


def find_family(model: nn.Module) -> Family | None:
    """The family whose blocks `model` holds, however deep; None for models outside the table."""
    for module in model.modules():
        for family in FAMILIES:
            if isinstance(module, family.layer_class):
                return family
    return None


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks of a supported ViT with their names in `model`, in order; empty outside the table.

    A compiler that stands around a block has no part in its name.
    """
    family = find_family(model)
    if family is None:
        return []
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, family.layer_class)]
    return [(f"{name}.".replace(COMPILER, "")[:-1], block) for name, block in named]


def count_vits(model: nn.Module) -> int:
    """How many supported ViTs `model` holds: models of transformers with such blocks of their own, or one around all.

    A teacher beside its student is a second one; blocks that a module of another kind holds make one ViT together.
    """
    kinds = tuple(family.layer_class for family in FAMILIES)
    modules = dict(model.named_modules())
    models = [f"{name}." if name else "" for name, module in modules.items() if isinstance(module, PreTrainedModel)]
    blocks = [name for name, module in modules.items() if isinstance(module, kinds)]
    return len({max((outer for outer in models if name.startswith(outer)), key=len, default="") for name in blocks})


def num_prefix_tokens(model: nn.Module) -> int:
    """Leading tokens of a supported ViT that are no image patch: its class tokens, and the registers behind them."""
    family = find_family(model)
    assert family is not None
    block: Any = find_blocks(model)[0][1]
    registers: int = getattr(block.attention.config, "num_register_tokens", 0)
    return family.class_tokens + registers
