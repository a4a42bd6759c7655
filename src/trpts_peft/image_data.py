"""Labelled images from a data set of the Hub or of a folder: loaded, checked whole, ready for an image processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from tqdm.auto import tqdm

from .folders import first_line

__all__ = ["ImageData", "check_shapes", "load_image_data", "with_pixel_values"]

_HELD_OUT = ("test", "validation", "valid", "val", "dev")
_SHARE_HELD_OUT = 0.2


@dataclass(frozen=True)
class ImageData:
    """A checked classification task.

    Attributes:
        train: rows to train on, with the columns `image` (PIL images) and `labels` (ints from 0).
        test: rows to test on, likewise.
        names: name of each class.
        test_split: where the test rows come from: the name of a split, or how many were held out of training.
    """

    train: Dataset
    test: Dataset
    names: tuple[str, ...]
    test_split: str

    def describe(self) -> dict[str, Any]:
        """Classes and counts, ready for JSON."""
        counts = {"train": len(self.train), "test": len(self.test), "test_split": self.test_split}
        return {"classes": list(self.names), **counts}


def load_image_data(
    dataset: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    num_train: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ImageData:
    """Load a data set and look at every image and label of it.

    Args:
        dataset: what `datasets.load_dataset` takes: an id on the Hub, a folder of images or of parquet files.
        image_column, label_column: names of the columns; None: the only one of images, of classes (or `label`).
        num_train: train on so many images, drawn with `seed`; None: all.
        seed: of all that is drawn. Without a split to test on, a fifth of the training images is held out.
        progress: show a progress bar.

    Raises:
        ValueError: there is no such data set or column, an image is broken, a label is missing or unknown to training,
            or there is only one class.
    """
    splits = _load(dataset)
    train = splits["train"]
    images = _image_column(train, image_column)
    labels = _label_column(train, label_column)
    names = _class_names(train, labels)
    train, test, origin = _split(splits, seed)
    if labels not in test.column_names or images not in test.column_names:
        raise ValueError(
            f"`dataset` must have the columns {images!r} and {labels!r} in each split, got {test.column_names} in "
            f"{origin!r}: name the same columns everywhere."
        )
    train, test = (_uniform(rows, images, labels, names, split) for rows, split in ((train, "train"), (test, origin)))
    if origin in _HELD_OUT:  # a class of few images may be held out with all of them
        unseen = set(test["labels"]) - set(train["labels"])  # a folder's classes are those of all its splits
        _check_known({names[label] for label in unseen}, origin)
    if num_train is not None:
        train = _drawn(train, num_train, seed)
    if len(set(train["labels"])) < 2:
        raise ValueError(
            f"`dataset` must have at least two classes to train on, got {len(set(train['labels']))}: check "
            "`--label-column` and `--num-train`."
        )
    for rows, split in ((train, "train"), (test, origin)):
        _check_images(rows, split, progress)
    return ImageData(train, test, names, origin)


def with_pixel_values(rows: Dataset, processor: Any) -> Dataset:
    """The rows as a model takes them: `pixel_values` float32 (3, H, W) by its image processor, and `labels`."""
    return rows.with_transform(partial(_processed, processor))  # no closure: worker processes may have to unpickle it


def _processed(processor: Any, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    images = [image.convert("RGB") for image in batch["image"]]
    pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": list(pixels), "labels": torch.tensor(batch["labels"])}


def check_shapes(data: ImageData, processor: Any) -> None:
    """Raise a ValueError, naming the row, where the processor gives an image another size than the first one has."""
    size = getattr(processor, "size", None) or {}
    resizes = getattr(processor, "do_resize", False) and "height" in size and "width" in size
    if resizes or getattr(processor, "do_center_crop", False):
        return  # which pads what is too small
    first: tuple[int, ...] | None = None
    seen: set[tuple[int, int]] = set()  # what comes out depends on the size alone
    for rows, split in ((data.train, "train"), (data.test, data.test_split)):
        for index in range(len(rows)):
            if (image := rows[index]["image"]).size in seen:
                continue
            seen.add(image.size)
            shape = tuple(processor(image.convert("RGB"), return_tensors="pt")["pixel_values"].shape[1:])
            first = first or shape
            if shape != first:
                raise ValueError(
                    f"`dataset` must hold images of one size for an image processor that does not give them one, got "
                    f"{shape[1]} x {shape[2]} in row {index} of {split!r} and {first[1]} x {first[2]} before."
                )


def _load(dataset: str) -> DatasetDict:
    try:
        # An absolute path: what looks like the name of a module or of a cache is looked for there first.
        splits = load_dataset(str(Path(dataset).resolve()) if dataset and Path(dataset).is_dir() else dataset)
    except (OSError, ValueError, RuntimeError, IndexError, DatasetsError) as error:
        raise ValueError(
            f"`dataset` must be an id on the Hub, or a folder of images or parquet files, got {dataset!r}: "
            f"{first_line(error)}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"`dataset` must have a split named 'train', got {list(splits)}.")
    return splits


# ---- which columns and rows ----


def _image_column(rows: Dataset, wanted: str | None) -> str:
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if wanted is None and len(images) == 1:
        return str(images[0])
    if wanted is None or wanted not in images:
        raise ValueError(f"`image_column` must be one of the columns of images, {images}, got {wanted!r}.")
    return wanted


def _label_column(rows: Dataset, wanted: str | None) -> str:
    if wanted is None:
        classes = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
        usual = [name for name in ("label", "labels") if name in rows.column_names]
        candidates = classes if len(classes) == 1 else usual
        if len(candidates) != 1:
            raise ValueError(
                f"`label_column` must be named where no one column is of classes, got None and {rows.column_names}: a "
                "folder of images has one where its images lie in a sub-folder for each of at least two classes."
            )
        wanted = str(candidates[0])
    if wanted not in rows.column_names:
        raise ValueError(f"`label_column` must be one of {rows.column_names}, got {wanted!r}.")
    kind = str(getattr(rows.features[wanted], "dtype", ""))
    if kind not in ("bool", "string", "large_string") and not kind.startswith(("int", "uint")):
        raise ValueError(
            f"`label_column` must hold classes, whole numbers or strings, got {rows.features[wanted]} in {wanted!r}."
        )
    return wanted


def _split(splits: DatasetDict, seed: int) -> tuple[Dataset, Dataset, str]:
    """Rows to train on, rows to test on, and where these come from."""
    for name in _HELD_OUT:
        if name in splits:
            return splits["train"], splits[name], name
    if len(splits["train"]) < 2:
        raise ValueError(f"`dataset` must hold at least two images, got {len(splits['train'])}.")
    parts = splits["train"].train_test_split(test_size=_SHARE_HELD_OUT, seed=seed)
    return parts["train"], parts["test"], f"{len(parts['test'])} held out of train"


def _drawn(rows: Dataset, count: int, seed: int) -> Dataset:
    if count > len(rows):
        raise ValueError(f"`num_train` must be at most {len(rows)}, the images to train on, got {count}.")
    return rows.shuffle(seed=seed).select(range(count))


# ---- labels and images ----


def _class_names(rows: Dataset, column: str) -> tuple[str, ...]:
    feature = rows.features[column]
    return tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(map(str, sorted(_present(rows, column))))


def _present(rows: Dataset, column: str) -> set[Any]:
    return {value for value in rows.unique(column) if value is not None}


def _uniform(rows: Dataset, images: str, labels: str, names: Sequence[str], split: str) -> Dataset:
    """The rows with the columns `image` and `labels` alone, labels as ints from 0."""
    feature, indices = rows.features[labels], {name: index for index, name in enumerate(names)}
    own = feature.names if isinstance(feature, ClassLabel) else None
    values = list(rows[labels])
    named = [_name_of(value, own) for value in values]
    unknown = {str(value) if name is None else name for value, name in zip(values, named, strict=True)} - set(indices)
    _check_known(unknown, split)
    pictures = rows.select_columns([images])
    if images != "image":
        pictures = pictures.rename_column(images, "image")
    return pictures.add_column("labels", [indices[name] for name in named if name is not None])


def _check_known(unknown: set[str], split: str) -> None:
    if unknown:
        raise ValueError(
            f"`dataset` must label each image with a class of the training split, got {sorted(unknown)[:4]} in "
            f"{split!r}: drop those rows, or train on their class."
        )


def _name_of(value: Any, own: Sequence[str] | None) -> str | None:
    """The class that a label names; None for none. `own`: names that the split itself gives to its labels."""
    if value is None or own is None:
        return None if value is None else str(value)
    return own[value] if 0 <= value < len(own) else None


def _check_images(rows: Dataset, split: str, progress: bool) -> None:
    """Decode each image once: a broken one would else end the run in the middle of an epoch."""
    for index in tqdm(range(len(rows)), desc=f"Checking images ({split})", disable=not progress, leave=False):
        try:
            image = rows[index]["image"]
        except Exception as error:  # whatever a decoder raises
            raise ValueError(
                f"`dataset` must hold readable images, got a broken one in row {index} of {split!r} "
                f"({first_line(error)}): repair or remove it."
            ) from error
        if image is None:
            raise ValueError(f"`dataset` must hold readable images, got none in row {index} of {split!r}.")
        if image.mode[0] in "IF":
            raise ValueError(
                f"`dataset` must hold images of 8 bits a channel, got mode {image.mode!r} in row {index} of {split!r}: "
                "convert them, or all that is above 255 becomes white."
            )
