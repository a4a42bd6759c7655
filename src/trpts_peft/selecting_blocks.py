"""Blocks of a Hugging Face ViT that may select tokens (eqs. 7 to 11).

A block that selects, and every block behind it, is given a subclass of its own class under the same class name, so
that output capturing, checkpointing, sharding policies and `isinstance` see what they saw before; a block that selects
also has a child module `token_selection`, which knows the rate. Without one the classes are restored.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .change_of_class import become
from .families import FAMILIES, Family, find_blocks, find_family
from .functional import cls_attention
from .masks import fit_mask, refuse_padding

__all__ = ["CHILD", "blocks_of", "refresh_classes"]

CHILD = "token_selection"


class _Sink:
    """Takes what the attention hands out. No list: hooks of accelerate pass on copies of those."""

    importance: Tensor


class _SelectingLayer(nn.Module):
    """A block that may select tokens, or that stands behind one that does. Mixed into the family's own class."""

    family: Family

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        mask = fit_mask(attention_mask, hidden_states.shape[1])
        selection = getattr(self, CHILD, None)
        if selection is None or selection.keep_rate is None:
            stock: Tensor = super().forward(hidden_states, mask, **kwargs)
            return stock
        refuse_padding(mask)
        sink = _Sink()
        attended = self.family.attend(self, hidden_states, mask, importance_sink=sink, **kwargs)
        refined, _ = selection(attended, sink.importance[:, selection.num_prefix_tokens :])
        return self.family.transform(self, refined)


class _SelectingAttention(nn.Module):
    """Attention that hands out the CLS row of its softmax beside its output. Mixed into the family's own class."""

    family: Family

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        importance_sink: _Sink | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if importance_sink is None:
            stock: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **kwargs)
            return stock
        module = cast(Any, self)
        by_head = (*hidden_states.shape[:-1], -1, module.head_dim)  # `unflatten` breaks graphs under a default device
        query, key, value = (
            project(hidden_states).view(by_head).transpose(1, 2)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        # The fused attention does not give its weights away; one row of them is cheap to compute again.
        importance_sink.importance = cls_attention(query, key, module.scaling, num_prefix_tokens=0)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, self.family.eager_attention)
        dropout = module.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs
        )
        return module.o_proj(attended.flatten(2)), weights


def _subclass(mixin: type[nn.Module], stock: type[nn.Module], family: Family) -> type[nn.Module]:
    """A subclass with the stock class's name, to be found by pickle as an attribute of this module."""
    selecting = type(stock.__name__, (mixin, stock), {"__module__": __name__, "family": family})
    globals()[stock.__name__] = selecting
    return selecting


_SELECTING = {
    family.model_type: (
        _subclass(_SelectingLayer, family.layer_class, family),
        _subclass(_SelectingAttention, family.attention_class, family),
    )
    for family in FAMILIES
}


def blocks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The transformer blocks of a supported ViT, in order; none of another model."""
    return tuple(block for _, block in find_blocks(model))


def refresh_classes(blocks: tuple[nn.Module, ...]) -> None:
    """Give each block and its attention the class that the present token selections call for."""
    behind = False
    for block in blocks:
        family = find_family(block)
        assert family is not None
        layer_class, attention_class = _SELECTING[family.model_type]
        selection = getattr(block, CHILD, None)
        selects = selection is not None and selection.selects
        behind = behind or selects
        become(block, layer_class if behind else family.layer_class)
        attention = getattr(block.attention, "_orig_mod", block.attention)  # a compiler around it has no such class
        become(attention, attention_class if selects else family.attention_class)
