"""Decide which connections train and which blocks select tokens (eqs. 3 to 6, section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor, nn

from .config import TRPTSConfig
from .cost import geometry_of, predicted_speedup
from .families import block_of, count_vits, find_blocks, find_family
from .fisher import FisherScores
from .functional import allocate_connections, top_connections, top_counts
from .token_layers import check_token_layers
from .traversal import base_of

__all__ = ["Selection", "check_feasible", "select", "unit_of"]


@dataclass(frozen=True, eq=False)
class Selection:
    """What an adapter trains and where it selects tokens.

    Attributes:
        importance: {unit: w}, eq. 3; adds up to 1.
        connections: {linear: C}, inputs that each neuron trains.
        columns: {linear: int64 (out_features, C)}, ascending in each row.
        token_layers: indices of the blocks that select tokens, ascending.
        keep_rate: the share of tokens they keep.
        shapes: {linear: (out_features, in_features)}.
        units: {linear: unit}.
        speedup: predicted speed-up of inference, dense over reduced MACs; None unless the model is one supported
            ViT.
    """

    importance: dict[str, float]
    connections: dict[str, int]
    columns: dict[str, Tensor]
    token_layers: tuple[int, ...]
    keep_rate: float = 1.0
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    speedup: float | None = None

    @property
    def trainable(self) -> int:
        """Number of trainable weights, biases and head not counted."""
        return sum(columns.numel() for columns in self.columns.values())

    def summary(self) -> str:
        """A table of the units: importance, connections per neuron, trainable weights; then the token layers."""
        width = max([len("unit"), *map(len, self.importance)])
        lines = [f"{'unit':<{width}}  {'w %':>6}  {'C':>7}  {'weights':>9}"]
        for unit, w in self.importance.items():
            linears = [name for name, other in self.units.items() if other == unit]
            counts = sorted({self.connections[name] for name in linears})
            span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
            weights = sum(self.columns[name].numel() for name in linears)
            lines.append(f"{unit:<{width}}  {100 * w:>6.2f}  {span:>7}  {weights:>9,}")
        return "\n".join([*lines, self._totals(), self._tokens()])

    def _totals(self) -> str:
        total = sum(rows * inputs for rows, inputs in self.shapes.values())
        return f"trainable weights: {self.trainable:,} of {total:,} ({100 * self.trainable / max(total, 1):.3f} %)"

    def _tokens(self) -> str:
        if not self.token_layers:
            return "token selection: none"
        layers = ", ".join(map(str, self.token_layers))
        speedup = "" if self.speedup is None else f", predicted speed-up of inference {self.speedup:.2f}"
        return f"token selection: blocks {layers}, keep rate {self.keep_rate:g}{speedup}"


def unit_of(linear: str, allocation_unit: str) -> str:
    """The unit of a linear: the block that it lies in; itself for `"module"` or outside any block."""
    return (block_of(linear) if allocation_unit == "block" else None) or linear


def select(scores: FisherScores, config: TRPTSConfig, model: nn.Module) -> Selection:
    """Eqs. 3 to 6 and the choice of token layers: pure and deterministic.

    Args:
        scores: a score (out_features, in_features) of each weight of each targeted linear.
        config: the options; results it may already hold are not read.
        model: the base model, for its blocks. Nothing in it is changed.

    Raises:
        ValueError: an option is out of its range, a score is negative or not finite, all are zero, a budget cannot be
            met, or the model has fewer candidate blocks than token layers are asked for.
    """
    config = config.checked()
    _check_scores(scores)
    model = base_of(model)
    units = {name: unit_of(name, config.allocation_unit) for name in scores}
    shapes = {name: (score.shape[0], score.shape[1]) for name, score in scores.items()}
    check_feasible(config, shapes, model)
    counts = top_counts(scores, units, config.top_percent)
    connections = _allocate(counts, units, shapes, config)
    total = sum(counts.values())
    token_layers = _choose_token_layers(scores, connections, shapes, config, model)
    return Selection(
        importance={unit: count / total for unit, count in counts.items()},
        connections=connections,
        columns={name: top_connections(score, connections[name]) for name, score in scores.items()},
        token_layers=token_layers,
        keep_rate=config.keep_rate,
        shapes=shapes,
        units=units,
        speedup=_speedup(model, token_layers, config.keep_rate),
    )


def check_feasible(config: TRPTSConfig, shapes: Mapping[str, tuple[int, int]], model: nn.Module) -> None:
    """Refuse what cannot be met whatever the scores are.

    Args:
        config: the options.
        shapes: {targeted linear: (out_features, in_features)}.
        model: the base model, for its blocks.

    Raises:
        ValueError: the budget cannot be met, the model cannot select tokens where it is to, or there are fewer
            candidate blocks than token layers are asked for.
    """
    if config.budget is not None:
        size = sum(rows * inputs for rows, inputs in shapes.values())
        cap = _cap(config, shapes)
        least = sum(rows for rows, _ in shapes.values())
        greatest = sum(rows * min(cap, inputs) for rows, inputs in shapes.values())
        slack = Fraction(1, 100_000)  # the limits that the message names, as printed, are accepted
        if not least * (1 - slack) <= Fraction(config.budget) * size <= greatest * (1 + slack):
            raise ValueError(
                f"`budget` must be from {least / size:.6g} (one input per neuron) to {greatest / size:.6g} (all "
                f"neurons at `max_connections`, which is {config.max_connections}, or their inputs), got "
                f"{config.budget!r}."
            )
    if isinstance(config.token_layers, list):
        check_token_layers(model, config.token_layers)
    elif config.token_layers and find_family(model) is not None:
        check_token_layers(model, config.token_layers)
        candidates = len(set(_blocks_of(shapes, model).values()))
        if config.token_layers > candidates:
            raise ValueError(
                f"`token_layers` must be at most {candidates}, the blocks of the model with a targeted linear, "
                f"got {config.token_layers}."
            )


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    if not scores:
        raise ValueError("`scores` must hold at least one linear, got none: check `target_modules`.")
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
            raise ValueError(f"`scores` must be finite and not negative, got other values for {name}.")
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError(
            "`scores` must not all be zero: a head of zeros has no gradient (use `probe_head=True`), and neither has "
            "a sample that is predicted perfectly."
        )


# ---- connections ----


def _spread(
    units: Mapping[str, str], per_unit: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Each unit's C for its linears, capped by their inputs."""
    return {name: min(per_unit[unit], shapes[name][1]) for name, unit in units.items()}


def _trainable(connections: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(count * shapes[name][0] for name, count in connections.items())


def _cap(config: TRPTSConfig, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The most connections that a unit can have."""
    widest = max(inputs for _, inputs in shapes.values())
    return widest if config.max_connections is None else min(config.max_connections, widest)


def _allocate(
    counts: Mapping[str, int], units: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], config: TRPTSConfig
) -> dict[str, int]:
    cap = _cap(config, shapes)

    def at(least: Fraction) -> dict[str, int]:
        return _spread(units, allocate_connections(counts, min_connections=least, max_connections=cap), shapes)

    if config.budget is None:
        return at(Fraction(config.min_connections))
    steps = _steps(counts, cap)
    wanted = Fraction(config.budget) * sum(rows * inputs for rows, inputs in shapes.values())
    # The number of connections grows with C_min: find the first step that reaches the budget, then look one back.
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if _trainable(at(steps[middle]), shapes) >= wanted:
            high = middle
        else:
            low = middle + 1
    around = [at(step) for step in steps[max(0, low - 1) : low + 1]]
    return min(around, key=lambda connections: abs(_trainable(connections, shapes) - wanted))


def _steps(counts: Mapping[str, int], cap: int) -> list[Fraction]:
    """Every C_min at which some unit's rounded C grows, ascending; the first leaves all units at one."""
    floored = [max(1, count) for count in counts.values()]
    least = min(floored)
    steps = {Fraction(2 * c - 1, 2) * Fraction(least, count) for count in set(floored) for c in range(2, cap + 1)}
    smallest = min(steps, default=Fraction(1)) / 2
    return [smallest, *sorted(steps)]


# ---- token layers ----


def _choose_token_layers(
    scores: Mapping[str, Tensor],
    connections: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    config: TRPTSConfig,
    model: nn.Module,
) -> tuple[int, ...]:
    if isinstance(config.token_layers, list):
        return tuple(config.token_layers)
    if config.token_layers == 0 or find_family(model) is None:
        return ()
    candidates = _rank_blocks(scores, connections, shapes, config, model)
    if config.token_placement == "random":
        return tuple(sorted(random.Random(config.seed).sample(sorted(candidates), config.token_layers)))
    if config.token_placement == "dense":
        candidates = candidates[::-1]
    return tuple(sorted(candidates[: config.token_layers]))


def _blocks_of(linears: Iterable[str], model: nn.Module) -> dict[str, str]:
    """{linear: block of the model} of those that lie in one."""
    blocks = {name for name, _ in find_blocks(model)}
    return {linear: block for linear in linears if (block := block_of(linear)) in blocks}


def _rank_blocks(
    scores: Mapping[str, Tensor],
    connections: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    config: TRPTSConfig,
    model: nn.Module,
) -> list[int]:
    """Blocks with a targeted linear: fewest trainable connections first, then least w, least Fisher, latest block."""
    index_of = {name: index for index, (name, _) in enumerate(find_blocks(model))}
    home = _blocks_of(scores, model)
    counts = top_counts(scores, {linear: home.get(linear, "") for linear in scores}, config.top_percent)
    keys: dict[int, tuple[int, int, float, int]] = {}
    for name, index in index_of.items():
        linears = [linear for linear, block in home.items() if block == name]
        if linears:
            trainable = _trainable({linear: connections[linear] for linear in linears}, shapes)
            fisher = sum(float(scores[linear].sum(dtype=torch.float64)) for linear in linears)
            keys[index] = (trainable, counts[name], fisher, -index)
    return sorted(keys, key=lambda index: keys[index])


def _speedup(model: nn.Module, token_layers: tuple[int, ...], keep_rate: float) -> float | None:
    if not token_layers or count_vits(model) != 1:
        return None
    return predicted_speedup(geometry_of(model), dict.fromkeys(token_layers, keep_rate))
