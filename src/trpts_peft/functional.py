"""The equations of TR-PTS: tensors and plain numbers in, tensors and plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

__all__ = [
    "allocate_connections",
    "cls_attention",
    "kept_tokens",
    "select_and_merge",
    "squared_gradient_sum",
    "tokens_with_gradient",
    "top_connections",
    "top_counts",
    "unit_importance",
]

# Non-negative floats are ordered like the integers that share their bits.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.no_grad()
def squared_gradient_sum(inputs: Tensor, grad_outputs: Tensor, *, workspace_mb: float = 256) -> Tensor:
    """Eq. 2 for one linear layer: the sum over samples of the squared per-sample weight gradient, Σ_b (G_bᵀ X_b)².

    Args:
        inputs: the layer's inputs X, (B, T, in_features).
        grad_outputs: gradients of the summed per-sample losses by the layer's outputs G, (B, T, out_features).
        workspace_mb: bound in MiB on the per-sample gradients held at a time; one neuron's of one sample is always
            held.

    Returns:
        (out_features, in_features), in the dtype of `inputs`.
    """
    if inputs.dim() != 3 or grad_outputs.dim() != 3 or inputs.shape[:2] != grad_outputs.shape[:2]:
        raise ValueError(
            "`inputs` and `grad_outputs` must be (B, T, in) and (B, T, out) with equal B and T, "
            f"got {tuple(inputs.shape)} and {tuple(grad_outputs.shape)}."
        )
    x, g = inputs, grad_outputs.to(inputs.dtype)
    if x.shape[1] == 1:  # a product of squares is the square of the product
        return g.squeeze(1).square().t() @ x.squeeze(1).square()
    total = x.new_zeros(g.shape[2], x.shape[2])
    entries = int(workspace_mb * 2**20 / x.element_size())
    neurons = min(max(1, entries // x.shape[2]), g.shape[2])
    samples = min(_samples_at_once(x.device, max(1, entries // (neurons * x.shape[2]))), len(x))
    workspace = x.new_empty(samples * neurons * x.shape[2])
    for rows, part in zip(total.split(neurons), g.split(neurons, dim=2), strict=True):
        for some_x, some_g in zip(x.split(samples), part.split(samples), strict=True):
            shape = len(some_x), *rows.shape
            gradients = torch.bmm(some_g.transpose(1, 2), some_x, out=workspace[: math.prod(shape)].view(shape))
            if len(some_x) == 1:
                rows.addcmul_(gradients[0], gradients[0])
            else:
                rows += torch.linalg.vector_norm(gradients, dim=0).square_()  # reads them once
    return total


def _samples_at_once(device: torch.device, room: int) -> int:
    """A CPU is fastest with one product, which stays in its cache; a GPU with as many as there is room for."""
    return 1 if device.type == "cpu" else room


def tokens_with_gradient(grad_outputs: Tensor) -> Tensor | None:
    """Indices of the tokens of (B, T, out) whose gradient is not zero throughout the batch.

    In the last block of a classifier that reads the CLS token, the other tokens of most linears have none. None, for
    all of them, where the last token has one: then it is not that block, and no further look is taken.
    """
    if grad_outputs.numel() == 0 or bool(grad_outputs.select(1, -1).any()):
        return None
    # Zero throughout is to have zero as minimum and as maximum, at less than half the time of a look at each entry.
    return (grad_outputs.amin((0, 2)).ne(0) | grad_outputs.amax((0, 2)).ne(0)).nonzero().squeeze(1)


_DIGIT = 16  # bits that are looked at in one pass


def _top_threshold(values: list[Tensor], count: int) -> int:
    """The bits of the `count`-th largest of all values, 16 at a time: nothing is sorted or concatenated."""
    known, left = 0, count  # the leading bits of the answer; which of the values with these bits it is
    for shift in range(8 * values[0].element_size() - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(2**_DIGIT, dtype=torch.int64, device=values[0].device)
        for v in values:
            leading = (v >> shift).flatten()
            candidates = leading[leading >> _DIGIT == known] & (2**_DIGIT - 1)
            histogram += torch.bincount(candidates, minlength=2**_DIGIT)
        at_least = histogram.flip(0).cumsum(0)
        position = int(torch.searchsorted(at_least, left))
        left -= int(at_least[position - 1]) if position else 0
        known = known << _DIGIT | (2**_DIGIT - 1 - position)
    return known


def top_counts(scores: Mapping[str, Tensor], units: Mapping[str, str], top_percent: float) -> dict[str, int]:
    """The set I_top-M of eq. 3, counted per unit.

    Args:
        scores: {linear: (out, in)}, non-negative, all of one dtype (float32 or float64).
        units: {linear: unit}.
        top_percent: M, in (0, 100]; the set holds M % of all entries, rounded to nearest and at least one.

    Returns:
        {unit: entries in the set}, in the order of `scores`; of equal scores the earlier entry is in the set.
    """
    signless = {name: s.abs() if bool(s.signbit().any()) else s for name, s in scores.items()}  # -0.0 has odd bits
    values = {name: s.contiguous().view(_BITS[s.dtype]) for name, s in signless.items()}
    size = sum(v.numel() for v in values.values())
    size_of_top = max(1, math.floor(Fraction(top_percent) * size / 100 + Fraction(1, 2)))
    threshold = _top_threshold(list(values.values()), size_of_top)
    above = {name: int((v > threshold).sum()) for name, v in values.items()}
    ties_left = size_of_top - sum(above.values())
    counts = dict.fromkeys((units[name] for name in scores), 0)
    for name, v in values.items():
        ties = min(ties_left, int((v == threshold).sum()))
        counts[units[name]] += above[name] + ties
        ties_left -= ties
    return counts


def unit_importance(scores: Mapping[str, Tensor], units: Mapping[str, str], top_percent: float) -> dict[str, float]:
    """Eq. 3: w_u = |I_top-M ∩ u| / |I_top-M|, which adds up to 1. Arguments as for `top_counts`."""
    counts = top_counts(scores, units, top_percent)
    total = sum(counts.values())
    return {unit: count / total for unit, count in counts.items()}


def allocate_connections(
    counts: Mapping[str, int], *, min_connections: float | Fraction = 1, max_connections: int | None = None
) -> dict[str, int]:
    """Eq. 4: C_u = max(1, w_u / min(w) · C_min), rounded half up, at most `max_connections`.

    Args:
        counts: {unit: its entries in the top-M set}; a count of zero is taken as one, else eq. 4 divides by zero.
        min_connections: C_min > 0, connections per neuron of the least important unit; need not be whole.
        max_connections: cap on C_u; None for none.

    Returns:
        {unit: C_u}; exact, in rational arithmetic.
    """
    floored = {unit: max(1, count) for unit, count in counts.items()}
    least = min(floored.values())
    connections = {}
    for unit, count in floored.items():
        wanted = math.floor(Fraction(count, least) * Fraction(min_connections) + Fraction(1, 2))
        capped = wanted if max_connections is None else min(wanted, max_connections)
        connections[unit] = max(1, capped)
    return connections


def top_connections(score: Tensor, count: int) -> Tensor:
    """Eqs. 5 and 6: the `count` inputs of highest score of each output neuron; ties go to the lower column.

    Args:
        score: (out_features, in_features).
        count: C, from 1 to in_features.

    Returns:
        int64 (out_features, C), ascending in each row.
    """
    if not 1 <= count <= score.shape[1]:
        raise ValueError(f"`count` must be from 1 to the {score.shape[1]} inputs of the layer, got {count}.")
    threshold = score.topk(count, dim=1).values[:, -1:]
    above, tied = score > threshold, score == threshold
    # topk does not say which of equal scores it takes; the first ones of the row are taken here.
    ties_left = count - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1) <= ties_left))
    # A copy: a view of half a storage is twice as large, and safetensors refuses to write it.
    return chosen.nonzero()[:, 1].clone().view(-1, count)


def _multiplies_in_16_bits(tensor: Tensor) -> bool:
    """Whether a product of matrices would: by its dtype, or by autocast, which there is none of for meta."""
    return tensor.element_size() < 4 or (not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type))


def cls_attention(query: Tensor, key: Tensor, scaling: float, num_prefix_tokens: int = 1) -> Tensor:
    """Eqs. 7 and 8: the CLS token's row of the attention softmax, averaged over heads, prefix tokens dropped.

    Args:
        query, key: (B, H, S, d), as the layer's attention uses them.
        scaling: the factor on the dot products, 1/√d in a ViT.
        num_prefix_tokens: leading tokens that are no image patch (CLS, distillation).

    Returns:
        float32 (B, S - num_prefix_tokens).
    """
    first = query[:, :, :1]
    # A product of matrices would be exported to ONNX for one image, if it is given one; in 16 bits it would be rounded
    # to them, and be infinite where a fused attention is not.
    if torch.onnx.is_in_onnx_export() or _multiplies_in_16_bits(key):
        products = (first.float() * key.float()).sum(dim=-1)
    else:
        products = torch.matmul(first, key.transpose(2, 3)).squeeze(2)
    scores = products * scaling
    return scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)[:, num_prefix_tokens:]


def kept_tokens(num_tokens: int, keep_rate: float) -> int:
    """Eq. 9: ⌊ρN⌋ of N image tokens, at least one; N where nothing happens (ρ = 1, or one token would be merged).

    The 1e-9 lets a product such as 0.7 · 10 count as the 7 it is meant to be.
    """
    kept = max(1, math.floor(keep_rate * num_tokens + 1e-9))
    return num_tokens if num_tokens - kept <= 1 else kept


def select_and_merge(
    hidden: Tensor, importance: Tensor, keep_rate: float, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Eqs. 9 to 11: keep the most important tokens in their order; the others become one token, placed last.

    Args:
        hidden: (B, S, D), prefix tokens first.
        importance: (B, N), N = S - num_prefix_tokens, non-negative.
        keep_rate: ρ in (0, 1].
        num_prefix_tokens: leading tokens that always stay and count for nothing.

    Returns:
        The refined tokens (B, num_prefix_tokens + K + 1, D) in the dtype of `hidden`, and the kept indices among the
        N tokens, int64 (B, K) ascending. Where nothing happens: `hidden` itself and all N indices.
    """
    batch, num_tokens = importance.shape
    count = kept_tokens(num_tokens, keep_rate)
    if count == num_tokens:
        return hidden, torch.arange(num_tokens, device=hidden.device).expand(batch, -1)
    kept = _by_importance(importance)[:, :count].sort(dim=1).values
    prefix, tokens = hidden[:, :num_prefix_tokens], hidden[:, num_prefix_tokens:]
    selected = _selected(hidden, kept + num_prefix_tokens)
    weights = _merge_weights(importance, kept)
    if _multiplies_in_16_bits(hidden):
        merged = (weights.to(torch.promote_types(hidden.dtype, torch.float32)).unsqueeze(2) * tokens).sum(dim=1)
        merged = merged.unsqueeze(1).to(hidden.dtype)
    else:
        merged = torch.bmm(weights.to(hidden.dtype).unsqueeze(1), tokens)
    return torch.cat([prefix, selected, merged], dim=1), kept


def _selected(hidden: Tensor, places: Tensor) -> Tensor:
    """The tokens (B, K, D) of hidden (B, S, D) at places (B, K); as whole rows, for `gather` looks at each entry."""
    batch, length, width = hidden.shape
    first = torch.arange(batch, device=hidden.device).unsqueeze(1) * length
    return hidden.flatten(0, 1).index_select(0, (first + places).flatten()).view(batch, places.shape[1], width)


def _by_importance(importance: Tensor) -> Tensor:
    """Indices (B, N) of the tokens, the most important first, of equals the earlier one."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK takes the earlier of equals
        return importance.topk(importance.shape[1], dim=1).indices
    return torch.sort(importance, dim=1, descending=True, stable=True).indices


def _merge_weights(importance: Tensor, kept: Tensor) -> Tensor:
    """Eq. 10's weights a_i / Σ a_i of the tokens that are not kept, zero elsewhere; equal ones if all a_i are zero."""
    weights = importance.scatter(1, kept, 0.0)
    total = weights.sum(dim=1, keepdim=True)
    equal = torch.ones_like(importance).scatter(1, kept, 0.0) / (importance.shape[1] - kept.shape[1])
    # Dividing by one instead of by zero keeps the gradient of the branch not taken finite.
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), equal)
