"""What becomes of saved adapters: loaded onto their base, merged into a checkpoint of its own, drawn."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from transformers import AutoImageProcessor

from .folders import check_empty, first_line
from .inspection import base_config, read_config, read_selection, read_tensors
from .plots import plot_layer_importance, plot_overlap, plot_tokens
from .pretrained import load_whole

__all__ = ["draw_adapters", "labels_of", "load_adapted", "merge_into_checkpoint"]

_LARGEST_SIDE = 4096  # pixels


def load_adapted(folder: Path) -> tuple[PeftModel, Any]:
    """The base model with the adapter in `folder`, in 32 bits and eval mode, and its image processor.

    Raises:
        ValueError: the base model cannot be had, or the adapter does not fit it.
    """
    config = read_config(folder)
    heads = [t for key, t in read_tensors(folder, config).items() if key.endswith("classifier.weight")]
    source = str(config.base_model_name_or_path)
    try:
        own = base_config(folder, config)
        if heads and own.num_labels != len(heads[0]):
            own.num_labels = len(heads[0])
        base = load_whole(source, config=own, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(
            folder if (folder / "preprocessor_config.json").is_file() else source, trust_remote_code=False
        )
        _check_processor(processor)
    except Exception as error:  # files of somebody else's, and packages that they may need
        raise ValueError(
            f"`adapter` must name a base model that can be loaded, got {source!r}: {first_line(error)}"
        ) from error
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval(), processor
    except (AttributeError, KeyError, TypeError, re.error) as error:
        raise ValueError(f"`adapter` must fit its base model {source!r}, got {first_line(error)}") from error


def _check_processor(processor: Any) -> None:
    """Refuse one that would make images too large to hold; and drop the name of code that others might then run."""
    for name in ("size", "crop_size"):
        size = getattr(processor, name, None) or {}
        sizes = {name: size} if isinstance(size, (int, float)) else dict(size)
        if any(isinstance(side, (int, float)) and side > _LARGEST_SIDE for side in sizes.values()):
            raise ValueError(
                f"its image processor must make images of up to {_LARGEST_SIDE} pixels a side, got {sizes}"
            )
    vars(processor).pop("auto_map", None)


def merge_into_checkpoint(folder: Path, output: Path, token_selection: Literal["keep", "drop"] | None = None) -> bool:
    """Merge the adapter in `folder` into its base in 32 bits, and save that as transformers saves a model.

    Args:
        folder: of the adapter.
        output: of the checkpoint; must be empty or not there.
        token_selection: what becomes of the selection of tokens, where the adapter has one. `"keep"`: its rates stand
            in the checkpoint's config, and `apply_token_selection(model)` puts them in force. `"drop"`: the
            checkpoint keeps all tokens, so its outputs are not those of the adapter.

    Returns:
        Whether the checkpoint carries rates that `apply_token_selection` puts in force.

    Raises:
        ValueError: the output folder is not empty, the adapter selects tokens and `token_selection` is None, or as
            `load_adapted`. Nothing is written.
    """
    check_empty(output)
    config = read_config(folder)
    selects = bool(config.fixed_token_layers) and config.keep_rate < 1
    if selects and token_selection is None:
        raise ValueError(
            f"`token_selection` must be 'keep' or 'drop' for an adapter that selects tokens (blocks "
            f"{config.fixed_token_layers}, keep rate {config.keep_rate:g}), got None: without selection the outputs "
            "change, and plain transformers does not select."
        )
    model, processor = load_adapted(folder)
    merged = cast(Any, model).merge_and_unload(keep_token_selection=token_selection != "drop")
    with _whole_or_not_at_all(output) as draft:
        merged.save_pretrained(draft)
        processor.save_pretrained(draft)
    return selects and token_selection == "keep"


@contextmanager
def _whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A folder to write to, whose files come to lie in `output` once all are there: half a checkpoint looks whole."""
    existed = output.is_dir()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=output, prefix="unfinished-") as draft:
            yield Path(draft)
            if any(path.name != Path(draft).name for path in output.iterdir()):
                raise ValueError(f"`output` must stay empty meanwhile, got files in {str(output)!r}: name another.")
            _move(Path(draft), output)
    finally:
        if not existed and not any(output.iterdir()):
            output.rmdir()


def _move(draft: Path, output: Path) -> None:
    """All files or none."""
    moved: list[Path] = []
    try:
        for path in sorted(draft.iterdir()):
            moved.append(output / path.name)
            path.rename(moved[-1])
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


# ---- figures ----


def labels_of(adapters: Sequence[str]) -> list[str]:
    """A short name for each adapter: its folder's, the parent's where that is `adapter`, all of it where these meet."""
    paths = [Path(adapter) for adapter in adapters]
    paths = [path.resolve() if path.is_dir() else path for path in paths]
    if len(set(paths)) < len(paths):
        raise ValueError(f"`adapters` must be different ones, got {list(adapters)}.")
    names = [path.parent.name if path.name == "adapter" else path.name for path in paths]
    return names if len(set(names)) == len(names) else list(adapters)


def draw_adapters(folders: Mapping[str, Path], images: Sequence[Any]) -> dict[str, Any]:
    """Figure 5 of the paper, figure 7 for several adapters, and figure 6 for each where there are images.

    Args:
        folders: {label: folder of an adapter}.
        images: PIL images.

    Returns:
        {name of a file: matplotlib Figure}.

    Raises:
        ValueError: an adapter is not calibrated or cannot be read, or there are images and one selects no tokens.
    """
    selections = {label: read_selection(folder) for label, folder in folders.items()}
    figures = {"layer_importance.png": plot_layer_importance(selections).figure}
    if len(selections) > 1:
        figures["overlap.png"] = plot_overlap(selections).figure
    for label, folder in folders.items() if images else ():
        model, processor = load_adapted(folder)
        name = "tokens.png" if len(folders) == 1 else _file_name(label, figures)
        try:
            figures[name] = plot_tokens(model, images, processor=processor, max_images=len(images))
        except (ArithmeticError, RuntimeError, TypeError) as error:  # what others wrote, any number or none may be
            raise ValueError(
                f"`adapter` must have an image processor that fits its base model, got {first_line(error)}"
            ) from error
    return figures


def _file_name(label: str, taken: Collection[str]) -> str:
    """A name that is one on every file system, where capitals may be no others, and paths have other parts."""
    stem, number = re.sub(r"[^\w.-]", "-", label), 1
    while (name := f"tokens-{stem}{'' if number == 1 else f'-{number}'}.png").casefold() in map(str.casefold, taken):
        number += 1
    return name
