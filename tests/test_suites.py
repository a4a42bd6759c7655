"""The layouts that the suites are published in, as small folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from benchmarks.suites import FGVC, VTAB, Splits, tasks_of
from pictures import picture, write_folder

COUNTS = {"train": 4, "val": 2, "test": 3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_pictures(folder: Path, first_label: int) -> dict[str, dict[str, int]]:
    """Pictures of each split, one in a folder with a blank in its name; {split: {path: label}}."""
    lists: dict[str, dict[str, int]] = {}
    for split, count in COUNTS.items():
        (folder / "images" / f"the {split}").mkdir(parents=True)
        for index in range(count):
            name = f"images/the {split}/{index}.png"
            picture(index, list(COUNTS).index(split)).save(folder / name)
            lists.setdefault(split, {})[name] = first_label + index % 3
    return lists


def write_vtab(folder: Path) -> None:
    lists = write_pictures(folder, 0)
    named = {"train800": lists["train"], "val200": lists["val"], "test": lists["test"]}
    named["train800val200"] = {**lists["train"], **lists["val"]}
    for name, labels in named.items():
        (folder / f"{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in labels.items()))


def write_fgvc(folder: Path) -> None:
    for split, labels in write_pictures(folder, 1).items():  # its lists count from one
        (folder / f"{split}.json").write_text(json.dumps(labels))


SUITES: dict[str, tuple[list[str], Callable[[Path], None]]] = {
    "vtab1k": (list(VTAB), write_vtab),
    "fgvc": (list(FGVC), write_fgvc),
}


def contents(rows: Any) -> list[tuple[bytes, int]]:
    return [(np.asarray(row["image"]).tobytes(), row["labels"]) for row in rows]


def expected(split: str) -> list[tuple[bytes, int]]:
    number = list(COUNTS).index(split)
    return [(np.asarray(picture(i, number)).tobytes(), i % 3) for i in range(COUNTS[split])]


def check(splits: Splits) -> None:
    assert contents(splits.train) == expected("train")
    assert contents(splits.validation) == expected("val")
    assert contents(splits.full) == expected("train") + expected("val")
    assert contents(splits.test) == expected("test")
    assert splits.classes == 3


@pytest.mark.parametrize("suite", SUITES)
def test_a_folder_of_its_layout(tmp_path: Path, suite: str) -> None:
    names, write = SUITES[suite]
    for name in names:
        (tmp_path / "suite" / name).mkdir(parents=True)
    write(tmp_path / "suite" / names[2])
    tasks = tasks_of(suite, str(tmp_path / "suite"))
    assert [task.name for task in tasks] == names
    check(tasks[2].load())


@pytest.mark.parametrize("suite", SUITES)
def test_a_repository_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suite: str) -> None:
    names, write = SUITES[suite]
    for name in names:
        (tmp_path / "copy" / name).mkdir(parents=True)
    write(tmp_path / "copy" / names[0])
    asked = []

    def download(repo: str, repo_type: str) -> str:
        asked.append((repo, repo_type))
        return str(tmp_path / "copy")

    monkeypatch.setattr("benchmarks.suites.snapshot_download", download)
    check(tasks_of(suite, "someone/suite")[0].load())
    assert asked == [("someone/suite", "dataset")]


def test_the_tables_have_19_and_5_tasks(tmp_path: Path) -> None:
    for suite, count in (("vtab1k", 19), ("fgvc", 5)):
        for name in SUITES[suite][0]:
            (tmp_path / name).mkdir()
        assert len(tasks_of(suite, str(tmp_path))) == count


@pytest.mark.parametrize("inner", ["images", "Images"])
def test_lists_may_skip_classes_and_leave_out_the_folder_of_the_images(tmp_path: Path, inner: str) -> None:
    for name in FGVC:
        (tmp_path / name).mkdir()
    folder = tmp_path / FGVC[1]
    lists = write_pictures(folder, 0)
    skipping = {split: {path: (295, 817, 1010)[label] for path, label in part.items()} for split, part in lists.items()}
    for split, labels in skipping.items():
        (folder / f"{split}.json").write_text(json.dumps(labels))
    (folder / "images").rename(folder / "pictures")
    (folder / inner).mkdir()
    (folder / "pictures").rename(folder / inner / "images")
    check(tasks_of("fgvc", str(tmp_path))[1].load())
    (folder / inner).rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="`source` must hold the images of the lists"):
        tasks_of("fgvc", str(tmp_path))[1].load()


def test_folders_of_ones_own(tmp_path: Path) -> None:
    write_folder(tmp_path / "suite" / "b", splits={"train": 5, "test": 1})
    write_folder(tmp_path / "suite" / "a", splits={"train": 10, "test": 2})
    (tmp_path / "suite" / ".cache").mkdir()
    tasks = tasks_of("local", str(tmp_path / "suite"))
    assert [task.name for task in tasks] == ["a", "b"]
    splits = tasks[0].load()
    assert [len(part) for part in (splits.train, splits.validation, splits.full, splits.test)] == [24, 6, 30, 6]
    both = contents(splits.train) + contents(splits.validation)
    assert sorted(both) == sorted(contents(splits.full)) and len(set(both)) == 30
    assert contents(tasks[0].load().validation) == contents(splits.validation)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'imagenet'"):
        tasks_of("imagenet", str(tmp_path))
    with pytest.raises(ValueError, match="without 'cifar'"):
        tasks_of("vtab1k", str(tmp_path))
    with pytest.raises(ValueError, match="without any"):
        tasks_of("local", str(tmp_path))
