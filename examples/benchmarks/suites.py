"""The tasks of the paper's tables, and folders of one's own: images, labels, and which of them choose learning rates.

A suite is a folder, or the id of a data set on the Hub that holds the same files:

- `vtab1k` (table 3): `<task>/train800.txt`, `val200.txt`, `train800val200.txt`, `test.txt`: lines of path and label.
- `fgvc` (table 2): `<task>/train.json`, `val.json`, `test.json`, {path: label}, as the lists that VPT published.
- `local`: `<task>/` in the form of parquet or image folders with the splits `train` and `test`; a fifth of `train`
  chooses learning rates.

Paths count from the task's folder, or from `images` or `Images` in it. Test images are for the last number alone:
nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Image
from huggingface_hub import snapshot_download

from trpts_peft.image_data import load_image_data

__all__ = ["SUITES", "Splits", "Task", "add_arguments", "named", "tasks_of"]

VTAB = (
    "cifar",
    "caltech101",
    "dtd",
    "oxford_flowers102",
    "oxford_iiit_pet",
    "svhn",
    "sun397",
    "patch_camelyon",
    "eurosat",
    "resisc45",
    "diabetic_retinopathy",
    "clevr_count",
    "clevr_dist",
    "dmlab",
    "kitti",
    "dsprites_loc",
    "dsprites_ori",
    "smallnorb_azi",
    "smallnorb_ele",
)
FGVC = ("CUB_200_2011", "nabirds", "OxfordFlower", "Stanford-dogs", "Stanford-cars")
_CHOOSING = 0.2  # of the training images of a local task


@dataclass(frozen=True)
class Splits:
    """The images of a task, each with the columns `image` and `labels`.

    Attributes:
        train, validation: to choose learning rates: trained on, and scored on.
        full: to train on for the result: both of them.
        test: to test on, once.
        classes: number of classes.
    """

    train: Dataset
    validation: Dataset
    full: Dataset
    test: Dataset
    classes: int


@dataclass(frozen=True)
class Task:
    """One row of images in a table.

    Attributes:
        name: its folder.
        load: gives its images.
    """

    name: str
    load: Callable[[], Splits]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark on a suite asks for."""
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--source", required=True, help="folder of the suite, or its data set on the Hub")
    parser.add_argument("--model", required=True, help="image classifier: a folder, or an id on the Hub")


def tasks_of(suite: str, source: str) -> list[Task]:
    """The tasks of a suite, in the order of the paper's tables.

    Args:
        suite: a key of `SUITES`.
        source: its folder, or the id of a data set on the Hub with the same files.

    Raises:
        ValueError: the suite is unknown, or the folder lacks a task.
    """
    if suite not in SUITES:
        raise ValueError(f"`suite` must be one of {sorted(SUITES)}, got {suite!r}.")
    root = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, repo_type="dataset"))
    return SUITES[suite](root)


def named(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """Those of the tasks, in the order of `names`.

    Raises:
        ValueError: there is no such task.
    """
    by_name = {task.name: task for task in tasks}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"`tasks` must be among {', '.join(by_name)}, got {unknown[0]!r}.")
    return [by_name[name] for name in names]


# ---- VTAB-1k and FGVC: lists of files ----


def _vtab(root: Path) -> list[Task]:
    def load(folder: Path) -> Splits:
        names = ("train800", "val200", "train800val200", "test")
        return _listed(folder, *(_lines(folder / f"{name}.txt") for name in names))

    return [Task(name, _bound(load, _folder(root, name))) for name in VTAB]


def _fgvc(root: Path) -> list[Task]:
    def load(folder: Path) -> Splits:
        train, validation, test = (_mapping(folder / f"{name}.json") for name in ("train", "val", "test"))
        return _listed(folder, train, validation, {**train, **validation}, test)

    return [Task(name, _bound(load, _folder(root, name))) for name in FGVC]


def _bound(load: Callable[[Path], Splits], folder: Path) -> Callable[[], Splits]:
    return lambda: load(folder)


def _folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise ValueError(f"`source` must hold a folder for each task, got {str(root)!r} without {name!r}.")
    return root / name


def _lines(path: Path) -> dict[str, int]:
    """{path: label} from lines of a path and a label; a path may hold blanks."""
    pairs = [line.rsplit(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {name: int(label) for name, label in pairs}


def _mapping(path: Path) -> dict[str, int]:
    return {name: int(label) for name, label in json.loads(path.read_text(encoding="utf-8")).items()}


def _listed(folder: Path, *lists: dict[str, int]) -> Splits:
    """Train, validation, full and test from {path: label}; classes are numbered anew, as lists may skip some."""
    labels = sorted({label for part in lists for label in part.values()})
    number = {label: place for place, label in enumerate(labels)}
    images = _images(folder, next(iter(lists[0])))

    def rows(part: dict[str, int]) -> Dataset:
        columns = {"image": [str(images / name) for name in part], "labels": [number[v] for v in part.values()]}
        return Dataset.from_dict(columns).cast_column("image", Image())

    return Splits(*map(rows, lists), classes=len(labels))


def _images(folder: Path, name: str) -> Path:
    """Where the images of a task lie: CUB, NABirds and Dogs keep them in a folder of their own."""
    found = [folder / inner for inner in ("", "images", "Images") if (folder / inner / name).is_file()]
    if not found:
        raise ValueError(f"`source` must hold the images of the lists, got {str(folder)!r} without {name!r}.")
    return found[0]


# ---- folders of one's own ----


def _local(root: Path) -> list[Task]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"`source` must hold a folder for each task, got {str(root)!r} without any.")
    return [Task(name, _bound(_local_splits, root / name)) for name in names]


def _local_splits(folder: Path) -> Splits:
    data = load_image_data(str(folder), progress=False)
    parts = data.train.train_test_split(test_size=_CHOOSING, seed=0)
    return Splits(parts["train"], parts["test"], data.train, data.test, len(data.names))


SUITES: dict[str, Callable[[Path], list[Task]]] = {"vtab1k": _vtab, "fgvc": _fgvc, "local": _local}
