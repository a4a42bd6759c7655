"""Data sets as users have them: found, checked whole, refused in one line."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pictures import picture, rows_of, write_base, write_folder, write_parquet
from trpts_peft.image_data import check_shapes, load_image_data, with_pixel_values

STRING = datasets.Value("string")
CLASSES = datasets.ClassLabel(names=["red", "green", "blue"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(folder: Path, **options: Any) -> Any:
    return load_image_data(str(folder), progress=False, **options)


def test_a_folder_of_images(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "set", splits={"train": 4, "test": 2}))
    assert data.names == ("blue", "green", "red")
    assert (len(data.train), len(data.test), data.test_split) == (12, 6, "test")
    assert data.train.column_names == ["image", "labels"]
    assert Counter(data.train["labels"]) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_to_test_on_is_found(tmp_path: Path, split: str) -> None:
    labels = [0, 1, 2, 0]
    folder = write_parquet(tmp_path / "set", {"train": rows_of(labels, CLASSES), split: rows_of([2, 1], CLASSES)})
    data = load(folder)
    assert data.names == ("red", "green", "blue")
    assert (data.test_split, list(data.test["labels"]), list(data.train["labels"])) == (split, [2, 1], labels)


def test_without_one_a_fifth_is_held_out(tmp_path: Path) -> None:
    labels = [index % 3 for index in range(20)]
    folder = write_parquet(tmp_path / "set", {"train": rows_of(labels, CLASSES)})
    data, other = load(folder), load(folder, seed=1)
    assert (len(data.train), len(data.test), data.test_split) == (16, 4, "4 held out of train")
    seen = {np.asarray(image).tobytes() for part in (data.train, data.test) for image in part["image"]}
    assert len(seen) == 20
    assert list(load(folder).test["labels"]) == list(data.test["labels"])
    assert list(other.train["labels"]) != list(data.train["labels"])


@pytest.mark.parametrize(
    "labels, feature, names",
    [
        (["b", "a", "b", "c"], datasets.Value("string"), ("a", "b", "c")),
        ([7, 3, 7, 11], datasets.Value("int64"), ("3", "7", "11")),
    ],
)
def test_labels_without_names_are_numbered_in_order(tmp_path: Path, labels: Any, feature: Any, names: Any) -> None:
    folder = write_parquet(tmp_path / "set", {"train": rows_of(labels, feature), "test": rows_of(labels[:2], feature)})
    data = load(folder)
    assert data.names == names
    assert [data.names[label] for label in data.train["labels"]] == [str(label) for label in labels]
    assert [data.names[label] for label in data.test["labels"]] == [str(label) for label in labels[:2]]


def test_splits_that_number_their_classes_differently_agree_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    test = rows_of([0, 1], datasets.ClassLabel(names=["blue", "red"]))
    splits = datasets.DatasetDict(train=rows_of([0, 1, 2], CLASSES), test=test)
    monkeypatch.setattr("trpts_peft.image_data.load_dataset", lambda name: splits)
    data = load_image_data("given", progress=False)
    assert data.names == ("red", "green", "blue")
    assert list(data.test["labels"]) == [2, 0]


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = rows_of([0, 1, 2], CLASSES, kind=[5, 6, 5]).rename_columns({"image": "photo"})
    folder = write_parquet(tmp_path / "set", {"train": rows, "test": rows})
    assert load(folder).names == ("red", "green", "blue")
    data = load(folder, image_column="photo", label_column="kind")
    assert (data.names, list(data.train["labels"])) == (("5", "6"), [0, 1, 0])


def test_some_training_images_are_drawn_with_the_seed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", splits={"train": 6, "test": 1})
    draws = [list(load(folder, num_train=9, seed=seed).train["labels"]) for seed in (0, 0, 1)]
    assert [len(draw) for draw in draws] == [9, 9, 9]
    assert draws[0] == draws[1] != draws[2]


def test_pixel_values_are_those_of_the_processor(tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(write_base(tmp_path / "base"))
    images = [picture(0, 0, size=(40, 50), mode="L"), picture(1, 1, mode="RGBA"), picture(2, 2, mode="P")]
    rows = datasets.Dataset.from_dict({"image": images, "labels": [2, 0, 1]}).cast_column("image", datasets.Image())
    batch = with_pixel_values(rows, processor)[:]
    expected = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack(batch["pixel_values"]), expected)
    assert batch["labels"].tolist() == [2, 0, 1]


def test_pixel_values_reach_worker_processes_that_unpickle_them(tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(write_base(tmp_path / "base"))
    rows = with_pixel_values(load(write_folder(tmp_path / "set", splits={"train": 2, "test": 1})).train, processor)
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again[0]["pixel_values"], rows[0]["pixel_values"])


@pytest.mark.parametrize("kind", ["bool", "uint16", "large_string"])
@pytest.mark.parametrize("named", [None, "label"])
def test_labels_of_other_kinds(tmp_path: Path, kind: str, named: str | None) -> None:
    labels = {"bool": [True, False], "uint16": [1, 7], "large_string": ["x", "y"]}[kind]
    folder = write_parquet(tmp_path / "set", {s: rows_of(labels, datasets.Value(kind)) for s in ("train", "test")})
    assert set(load(folder, label_column=named).names) == {str(label) for label in labels}


def test_the_split_test_goes_before_validation(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", splits={"train": 2, "validation": 1, "test": 1})
    assert load(folder).test_split == "test"


def test_a_class_may_be_held_out_whole(tmp_path: Path) -> None:
    labels = ["a", "b"] * 9 + ["c", "a"]
    folder = write_parquet(tmp_path / "set", {"train": rows_of(labels, STRING)})
    assert {load(folder, seed=seed).names for seed in range(4)} == {("a", "b", "c")}


def test_a_folder_may_be_named_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path / "set", splits={"train": 2, "test": 1}))
    assert len(load(Path()).train) == 6


# ---- what is refused ----


def test_images_of_one_size_are_processed_once(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "set", splits={"train": 2, "test": 1}))
    options = {"do_resize": False, "do_center_crop": False, "size": {}}
    processor = Mock(wraps=ViTImageProcessorPil(do_resize=False), **options)
    check_shapes(data, processor)
    assert processor.call_count == 1


@pytest.mark.parametrize("split, row", [("train", 1), ("test", 2)])
def test_images_of_several_sizes_need_a_processor_that_resizes(tmp_path: Path, split: str, row: int) -> None:
    folder = write_folder(tmp_path / "set", splits={"train": 1, "test": 1})
    name = ("blue", "green", "red")[row]
    picture(0, 0, size=(40, 36)).save(folder / split / name / "0.png")
    data = load(folder)
    check_shapes(data, ViTImageProcessorPil(size={"height": 32, "width": 32}))
    check_shapes(data, ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size={"height": 8, "width": 8}))
    message = f"`dataset` must hold images of one size .* got 36 x 40 in row {row} of '{split}' and 32 x 32 before"
    with pytest.raises(ValueError, match=message):
        check_shapes(data, ViTImageProcessorPil(do_resize=False))


def broken(folder: Path) -> Path:
    write_folder(folder, splits={"train": 3, "test": 1})
    file = folder / "train" / "green" / "1.png"
    file.write_bytes(file.read_bytes()[:200])
    return folder


def broken_test(folder: Path) -> Path:
    write_folder(folder, splits={"train": 3, "test": 1})
    file = folder / "test" / "green" / "0.png"
    file.write_bytes(file.read_bytes()[:200])
    return folder


def deep(folder: Path) -> Path:
    write_folder(folder, splits={"train": 3, "test": 1})
    pixels = np.full((32, 32), 51150, dtype=np.uint16)
    PIL.Image.fromarray(pixels).save(folder / "train" / "green" / "1.png")
    return folder


def script(folder: Path) -> Path:
    folder.mkdir()
    (folder / "set.py").write_text("raise SystemExit")
    return folder


def only_tested(folder: Path) -> Path:
    write_folder(folder, splits={"train": 3, "test": 1})
    (folder / "test" / "violet").mkdir()
    picture(0, 0).save(folder / "test" / "violet" / "0.png")
    return folder


def parquet(folder: Path, train: Any, test: Any) -> Path:
    return write_parquet(folder, {"train": train, "test": test})


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nowhere": (lambda f: f, {}, "`dataset` must be an id on the Hub, or a folder"),
    "no train": (lambda f: write_folder(f, splits={"test": 2}), {}, "a split named 'train', got"),
    "no images": (
        lambda f: parquet(f, *[datasets.Dataset.from_dict({"a": [1, 2], "label": [0, 1]})] * 2),
        {},
        r"`image_column` must be one of the columns of images, \[\], got None",
    ),
    "other image column": (
        lambda f: parquet(f, *[rows_of([0, 1], CLASSES)] * 2),
        {"image_column": "photo"},
        r"`image_column` must be one of the columns of images, \['image'\], got 'photo'",
    ),
    "other label column": (
        lambda f: parquet(f, *[rows_of([0, 1], CLASSES)] * 2),
        {"label_column": "kind"},
        r"`label_column` must be one of \['image', 'label'\], got 'kind'",
    ),
    "labels of no kind": (
        lambda f: parquet(f, *[rows_of([0.5, 1.5], datasets.Value("float32"))] * 2),
        {"label_column": "label"},
        "`label_column` must hold classes, whole numbers or strings",
    ),
    "two columns of classes": (
        lambda f: parquet(f, *[rows_of([0, 1], CLASSES).add_column("fine", [0, 1]).cast_column("fine", CLASSES)
                               .rename_column("label", "coarse")] * 2),
        {},
        "`label_column` must be named where no one column is of classes",
    ),
    "one folder": (lambda f: write_folder(f, splits={"train": 2}, names=["red"]), {}, "at least two classes"),
    "one class": (
        lambda f: parquet(f, *[rows_of([1, 1, 1], CLASSES)] * 2),
        {},
        "at least two classes to train on, got 1",
    ),
    "a missing label": (
        lambda f: parquet(f, *[rows_of([0, None, 1], CLASSES)] * 2),
        {},
        r"got \['None'\] in 'train'",
    ),
    "a label unknown to training": (
        lambda f: parquet(f, rows_of(["a", "b"], STRING), rows_of(["b", "c"], STRING)),
        {},
        r"a class of the training split, got \['c'\] in 'test'",
    ),
    "a class of the test images alone": (only_tested, {}, r"a class of the training split, got \['violet'\] in 'test'"),
    "too few": (lambda f: write_folder(f, splits={"train": 2, "test": 1}), {"num_train": 7}, "at most 6, .*, got 7"),
    "a broken image": (broken, {}, "readable images, got a broken one in row 4 of 'train'"),
    "a broken test image": (broken_test, {}, "readable images, got a broken one in row 1 of 'test'"),
    "an image of 16 bits": (deep, {}, "images of 8 bits a channel, got mode 'I;16' in row 4 of 'train'"),
    "a script": (script, {}, "`dataset` must be an id on the Hub, or a folder"),
    "labels that are numbers of another kind": (
        lambda f: parquet(f, *[rows_of([0.5, 1.5], datasets.Value("float32"))] * 2),
        {},
        "`label_column` must hold classes, whole numbers or strings, got .*float32.* in 'label'",
    ),
    "a missing image": (
        lambda f: parquet(f, *[datasets.Dataset.from_dict(
            {"image": [picture(0, 0), None, picture(1, 1)], "label": [0, 1, 1]},
            features=datasets.Features({"image": datasets.Image(), "label": CLASSES}),
        )] * 2),
        {},
        "readable images, got none in row 1 of 'train'",
    ),
}  # fmt: skip


# datasets leaves a file open that it could not decode.
@pytest.mark.filterwarnings("ignore:Exception ignored .*<_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    make, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path / "set"), **options)
