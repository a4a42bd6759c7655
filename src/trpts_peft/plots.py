"""Figures 5, 6 and 7 of the paper: where the task sits, which tokens stay, what adapters have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from .cost import image_size_of, patch_grid, patch_size_of
from .families import block_index, unit_order
from .fisher import eval_mode
from .layer import TRPTSLinear
from .record import TokenRecord, record_tokens
from .selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["overlap", "plot_layer_importance", "plot_overlap", "plot_tokens"]

# Okabe and Ito: told apart by readers of all color visions.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_TRIANGLE: Any = {
    "marker": "v",
    "markersize": 6,
    "markeredgecolor": "black",
    "markeredgewidth": 0.7,
    "linestyle": "none",
}
_GRAY = 0.55  # what merged patches fade to: seen beside black as well as beside white


# ---- figure 5 ----


def plot_layer_importance(source: Selection | Mapping[str, Selection], *, ax: Axes | None = None) -> Axes:
    """Figure 5: the importance of each unit (eq. 3) as bars, with a triangle over the blocks that select tokens.

    Args:
        source: a Selection, or {label: Selection} for bars side by side.
        ax: where to draw, by default on a new figure (`returned_axes.figure`).

    Raises:
        TypeError: `source` is neither.
        ValueError: `source` is empty.
        ImportError: matplotlib is not installed.
    """
    selections = {"": source} if isinstance(source, Selection) else _labelled(source, "source", "a Selection", 1)
    units = sorted({unit for selection in selections.values() for unit in selection.importance}, key=unit_order)
    ax = _unit_axes(ax, units, len(selections))
    width, marked = 0.8 / len(selections), False
    for index, ((label, selection), color) in enumerate(zip(selections.items(), cycle(_COLORS), strict=False)):
        bars = {unit: (place - 0.4 + (index + 0.5) * width) for place, unit in enumerate(units)}
        heights = {unit: 100 * w for unit, w in selection.importance.items()}
        ax.bar([bars[unit] for unit in heights], list(heights.values()), width, color=color, label=label or None)
        chosen = [unit for unit in heights if block_index(unit) in selection.token_layers]
        _mark(ax, [(bars[unit], heights[unit]) for unit in chosen], color)
        marked = marked or bool(chosen)
    _legend(ax, marked)
    return ax


def _unit_axes(ax: Axes | None, units: Sequence[str], groups: int) -> Axes:
    """Axes with a place for each unit and all that is written around them."""
    labels = _unit_labels(units)
    longest = max(map(len, labels), default=0)
    upright = longest <= 3
    width = min(16.0, max(5.0, 1.5 + 0.16 * len(units) * (1 + groups)))
    ax = _axes(ax, (width, 3.4 if upright else 3.4 + 0.09 * longest))
    size = 10 if width > 0.25 * len(units) else 7
    # Names come from files: a dollar sign in one is no formula.
    ax.set_xticks(range(len(units)), labels, rotation=0 if upright else 90, fontsize=size, parse_math=False)
    ax.set_xlabel("transformer block" if all(map(str.isdecimal, labels)) else "unit")
    ax.set_ylabel("share of top-scoring weights (%)")
    ax.set_title("Layer importance")
    ax.margins(x=0.02, y=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _mark(ax: Axes, points: Sequence[tuple[float, float]], color: str) -> None:
    """Triangles a little above the bars: the bars of token layers are often too low for a pattern on them."""
    from matplotlib.transforms import ScaledTranslation

    above = ax.transData + ScaledTranslation(0, 6 / 72, _figure_of(ax).dpi_scale_trans)
    for x, y in points:
        ax.plot(x, y, color=color, transform=above, **_TRIANGLE)


def _legend(ax: Axes, marked: bool) -> None:
    from matplotlib.lines import Line2D

    handles, labels = ax.get_legend_handles_labels()
    if marked:
        handles, labels = [*handles, Line2D([], [], color="white", **_TRIANGLE)], [*labels, "selects tokens"]
    if handles:
        legend = ax.legend(handles, labels, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _unit_labels(units: Sequence[str]) -> list[str]:
    """What tells units apart: the rest of the name behind what those in a block have in common."""
    for stem in (r".*\.(?=\d+(?:\.|$))", r".*?\.(?=\d)"):  # up to the number of the block, or of what holds blocks
        found = {match.group() for unit in units if (match := re.match(stem, unit))}
        if len(found) == 1:
            return [unit.removeprefix(*found) for unit in units]
    return list(units)


# ---- figure 6 ----


def plot_tokens(
    model: nn.Module,
    images: Tensor | Sequence[Any],
    *,
    processor: Any = None,
    max_images: int = 4,
) -> Figure:
    """Figure 6: the patches that are still tokens of their own behind each selecting block; merged ones fade to gray.

    The model runs once, in eval mode and without gradients, and is left as it was.

    Args:
        model: a model that selects tokens, wrapped by PEFT or not.
        images: pixel values (B, 3, H, W) as the model takes them; or, with a processor, PIL images.
        processor: the image processor of the model; also gives the mean and deviation for showing the images in their
            own colors. Without it each image is stretched over the range from black to white.
        max_images: draw the first few of many images, one a row.

    Raises:
        TypeError: `images` are neither a tensor nor come with a processor.
        ValueError: `images` is empty or no batch, `max_images` is under one, or the model selects no tokens.
        ImportError: matplotlib is not installed.
    """
    pixels = _pixel_values(images, processor, max_images)
    record = _watch(model, pixels)
    if not record:
        raise ValueError(
            "`model` must select tokens in some block as it stands, got none: enable the adapter and its token "
            "selection (`set_token_selection(model, True)`), with a `keep_rate` below 1."
        )
    grid = patch_grid(model, (pixels.shape[2], pixels.shape[3]))
    patch, shown = patch_size_of(model), _displayable(pixels, processor)
    blocks = sorted(record)
    figure = _new_figure((1.75 * (len(blocks) + 1), 1.95 * len(shown) + 0.5))
    axes = figure.subplots(len(shown), len(blocks) + 1, squeeze=False)
    for row, image in enumerate(shown):
        _show(axes[row, 0], image, f"{grid[0] * grid[1]} patches")
        for column, block in enumerate(blocks, start=1):
            kept = record[block].kept[row]
            _show(axes[row, column], _faded(image, kept, grid, patch), f"{len(kept)} kept")
    for column, title in enumerate(["image", *(f"block {block}" for block in blocks)]):
        axes[0, column].set_title(title, fontsize=11)
    figure.suptitle("Patches kept as tokens (merged ones are gray)", fontsize=12)
    return figure


def _pixel_values(images: Tensor | Sequence[Any], processor: Any, max_images: int) -> Tensor:
    """The first images as the model takes them, (B, C, H, W)."""
    if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
        raise ValueError(f"`max_images` must be an integer of at least 1, got {max_images!r}. Pass a number of rows.")
    pixels = images if isinstance(images, Tensor) else _processed(images, processor, max_images)
    if pixels.ndim != 4 or not len(pixels):
        raise ValueError(
            f"`images` must be a batch of shape (B, C, H, W) with B of at least 1, got {tuple(pixels.shape)}. "
            "Use `images.unsqueeze(0)` for a single image."
        )
    return pixels[:max_images].detach()


def _processed(images: Sequence[Any], processor: Any, max_images: int) -> Tensor:
    if processor is None:
        raise TypeError(
            f"`images` must be a tensor of pixel values if there is no `processor`, got {type(images).__name__}. "
            "Pass the model's image processor as `processor`."
        )
    several = list(images)[:max_images] if isinstance(images, Sequence) else [images]
    if not several:
        raise ValueError("`images` must hold at least one image, got none. Pass PIL images or pixel values.")
    if len(getattr(processor, "image_mean", None) or ()) == 3:  # colors, which not every picture has, or alone
        several = [image.convert("RGB") if isinstance(image, Image.Image) else image for image in several]
    pixels: Tensor = processor(several, return_tensors="pt")["pixel_values"]
    return pixels


def _watch(model: nn.Module, pixels: Tensor) -> TokenRecord:
    """Run the model on (B, C, H, W) and record its token selection; empty if it is switched off."""
    parameter = next(model.parameters())
    interpolate = image_size_of(model) != (pixels.shape[2], pixels.shape[3])
    extra = {"interpolate_pos_encoding": True} if interpolate else {}
    with record_tokens(model) as record, eval_mode(model), torch.no_grad():
        model(pixel_values=pixels.to(parameter.device, parameter.dtype), **extra)
    return record


def _displayable(pixels: Tensor, processor: Any) -> Tensor:
    """Pixel values (B, C, H, W) as float32 colors (B, H, W, 3) in [0, 1]."""
    pixels = pixels.float().cpu()
    mean, deviation = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if mean is not None and deviation is not None and getattr(processor, "do_normalize", True):
        pixels = pixels * pixels.new_tensor(deviation).view(-1, 1, 1) + pixels.new_tensor(mean).view(-1, 1, 1)
    elif processor is None:
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp_min(1e-12)
    if pixels.shape[1] != 3:  # no colors: show the mean over channels
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return pixels.clamp(0, 1).permute(0, 2, 3, 1)


def _faded(image: Tensor, kept: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The image (H, W, 3) with all patches but the kept ones mostly gray."""
    alive = torch.zeros(grid[0] * grid[1], dtype=torch.bool, device=kept.device)
    alive[kept] = True
    mask = alive.view(grid).repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1)
    result = image.clone()
    covered = result[: mask.shape[0], : mask.shape[1]]  # a patch convolution drops what does not fill a patch
    gray = 0.15 * covered.mean(2, keepdim=True) + 0.85 * _GRAY
    covered.copy_(torch.where(mask.unsqueeze(2), covered, gray))
    return result


def _show(ax: Axes, image: Tensor, caption: str) -> None:
    ax.imshow(image.numpy(), interpolation="nearest")
    ax.set_xlabel(caption, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])


# ---- figure 7 ----


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The trainable positions that two adapters share, over those that either has.

    Args:
        a, b: {linear: int64 (out_features, C)}, the columns that each neuron trains; a linear that is absent from one
            side has no position there.

    Raises:
        ValueError: both are empty, or a linear differs in its number of neurons.
    """
    shared = union = 0
    for linear in a.keys() | b.keys():
        sides = [_positions(side[linear]) for side in (a, b) if linear in side]
        if linear in a and linear in b and len(a[linear]) != len(b[linear]):
            raise ValueError(
                f"`a` and `b` must come from the same base model, got {len(a[linear])} and {len(b[linear])} neurons "
                f"in {linear}."
            )
        together = len(torch.unique(torch.cat(sides)))
        union += together
        shared += sum(map(len, sides)) - together
    if not union:
        raise ValueError("`a` and `b` must hold trainable positions, got none in either. Pass calibrated adapters.")
    return shared / union


def _positions(columns: Tensor) -> Tensor:
    """One int64 per trainable weight: the row in the high 32 bits, the column in the low ones."""
    columns = columns.detach().cpu().long()
    unique: Tensor = torch.unique((torch.arange(len(columns), device=columns.device).unsqueeze(1) << 32) | columns)
    return unique


def plot_overlap(sources: Mapping[str, Selection] | nn.Module, *, ax: Axes | None = None) -> Axes:
    """Figure 7: a heat map of the overlap of several adapters: trainable positions shared over all of either.

    Args:
        sources: {label: Selection}, or a model with several TR-PTS adapters.
        ax: where to draw, by default on a new figure (`returned_axes.figure`).

    Raises:
        TypeError: `sources` is neither.
        ValueError: there are fewer than two to compare.
        ImportError: matplotlib is not installed.
    """
    columns = _adapter_columns(sources) if isinstance(sources, nn.Module) else _selection_columns(sources)
    labels, size = list(columns), len(columns)
    shares = [[overlap(columns[one], columns[other]) for other in labels] for one in labels]
    ax = _axes(ax, (2.4 + 0.6 * size, 1.8 + 0.6 * size))
    heat = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(size), labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    ax.set_yticks(range(size), labels, parse_math=False)
    for row in range(size):
        for column in range(size):
            color = "white" if shares[row][column] > 0.55 else "black"
            ax.text(column, row, f"{shares[row][column]:.2f}", ha="center", va="center", color=color, fontsize=9)
    ax.set_title("Overlap of trainable weights")
    _figure_of(ax).colorbar(heat, ax=ax, label="positions shared / all of either", shrink=0.8)
    return ax


def _selection_columns(sources: Mapping[str, Selection]) -> dict[str, dict[str, Tensor]]:
    return {label: selection.columns for label, selection in _labelled(sources, "sources", "a model", 2).items()}


def _adapter_columns(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{adapter: {linear: columns}} of all TR-PTS adapters of a model."""
    columns: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TRPTSLinear):
            for adapter in module.trpts_columns:
                columns.setdefault(adapter, {})[name] = module.trpts_columns[adapter]
    if len(columns) < 2:
        raise ValueError(
            f"`sources` must be a model with at least two TR-PTS adapters, got {len(columns)}. Add another with "
            "`add_adapter`, or pass Selections as {label: Selection}."
        )
    return columns


# ---- shared ----


def _labelled(sources: object, argument: str, alternative: str, at_least: int) -> dict[str, Selection]:
    """`sources` as the mapping it should be."""
    if not isinstance(sources, Mapping) or not all(isinstance(value, Selection) for value in sources.values()):
        raise TypeError(
            f"`{argument}` must be {alternative} or {{label: Selection}}, got {type(sources).__name__}. Pass what "
            "`calibrate` or `select` returns."
        )
    if len(sources) < at_least:
        raise ValueError(
            f"`{argument}` must hold at least {at_least} labelled Selection(s), got {len(sources)}. Pass what "
            "`calibrate` or `select` returns."
        )
    return {str(label): selection for label, selection in sources.items()}


def _new_figure(size: tuple[float, float]) -> Figure:
    """A figure of its own, unknown to pyplot: nothing to close, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib, got none. Run `pip install trpts-peft[plots]`.") from error
    return Figure(figsize=size, layout="constrained")


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return _new_figure(size).subplots() if ax is None else ax


def _figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that were just drawn on belong to a figure"
    return figure
