"""Where all methods start on a task: the images, one fitted head, and the scores of the base's weights.

Measured once for a set of training images and used by every cell; `calibrate` would measure the same anew in each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from datasets import Dataset as Rows
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from benchmarks.methods import drawn_scores, everywhere
from benchmarks.scores import batch_fisher, constant_parts, without_constant_parts
from trpts_peft import FisherScores, estimate_fisher
from trpts_peft.data import Batches
from trpts_peft.finetuning import load_classifier, load_processor
from trpts_peft.head import find_head, num_labels
from trpts_peft.image_data import with_pixel_values
from trpts_peft.measurement import collect_features
from trpts_peft.probe import LinearProbe, fit_linear_probe

__all__ = ["Pixels", "Start", "weights_digest"]

_IN_MEMORY = 2**30  # bytes
_HEAD_DEVIATION = 0.02  # of a random head: that of ViTs


class Pixels(Dataset[dict[str, Tensor]]):
    """Images as a model takes them: `pixel_values` float32 (3, H, W) and `labels` int64.

    They stay in memory, where all together take no more than a gibibyte, and are read anew each time else.
    """

    def __init__(self, rows: Rows, processor: Any) -> None:
        self._rows, self.labels = with_pixel_values(rows, processor), torch.tensor(rows["labels"])
        first, self._kept = self._rows[0]["pixel_values"], None
        if len(rows) * first.nbytes <= _IN_MEMORY:
            self._kept = first.new_empty(len(rows), *first.shape)
            for index, row in enumerate(self._rows):  # one at a time: the pictures themselves may be large
                self._kept[index] = row["pixel_values"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kept = self._kept
        pixel_values = kept[index] if kept is not None else self._rows[index]["pixel_values"]
        return {"pixel_values": pixel_values, "labels": self.labels[index]}

    def digest(self) -> str:
        """Of all labels and of 64 images: equal for equal images that were decoded and resized equally."""
        places = torch.linspace(0, len(self) - 1, min(64, len(self))).long().tolist()
        return _digest([self.labels, *(self[place]["pixel_values"] for place in places)])


class Start:
    """The model and the training images that every cell of a task starts with."""

    def __init__(self, model: str, train: Rows, classes: int) -> None:
        """
        Args:
            model: an image classifier on the Hub or in a folder.
            train: rows of `image` and `labels`.
            classes: number of classes.
        """
        self.model, self.classes = model, classes
        self.processor = load_processor(model)
        self.pixels = Pixels(train, self.processor)
        self._probe: LinearProbe | None = None
        self._scores: dict[str, FisherScores] = {}

    def base(self, probed_head: bool = True) -> PreTrainedModel:
        """The model with a head for the task, fitted or drawn by the seed that is set, where it is going to train."""
        base = load_classifier(self.model, [str(label) for label in range(self.classes)])
        base.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        head = find_head(base, "default")
        if probed_head:
            head.write(self.probe().weight, self.probe().bias)
        else:  # a model with as many classes would keep its own
            head.write(torch.randn(head.linear.weight.shape) * _HEAD_DEVIATION, torch.zeros(self.classes))
        return base

    def probe(self) -> LinearProbe:
        """The head that `calibrate` fits on these images."""
        if self._probe is None:
            with _unseeded():
                base = self.base(probed_head=False)
                heads, batches = (
                    [find_head(base, "default")],
                    Batches(self.pixels, base, num_samples=None, batch_size=32),
                )
                head, features, labels = collect_features(base, batches, heads, progress=False)
                bias = head.linear.bias is not None
                self._probe = fit_linear_probe(features, labels, num_labels(head), fit_bias=bias)
        return self._probe

    def scores(self, importance: str, scoring: Mapping[str, Any]) -> FisherScores:
        """Of the base with the fitted head; `scoring` as for `Variant`."""
        key = json.dumps([importance, dict(scoring)], sort_keys=True)
        if key not in self._scores:
            with _unseeded():
                base = self.base()
                if "per_batch" in scoring:
                    self._scores[key] = batch_fisher(base, self.pixels, scoring["per_batch"])
                elif "shared" in scoring:
                    self._scores[key] = drawn_scores(base, everywhere(scoring["shared"]))
                elif "varying" in scoring:
                    scores, batches = self.scores(importance, {}), DataLoader(self.pixels, 32)
                    self._scores[key] = without_constant_parts(scores, constant_parts(base, scores, batches))
                else:
                    found = estimate_fisher(base, self.pixels, score=importance, progress=False, **scoring)
                    self._scores[key] = found
        return self._scores[key]


@cache
def weights_digest(model: str) -> str:
    """Of the weights of the model's backbone."""
    with _unseeded():
        base = load_classifier(model, ["0", "1"])
    head = find_head(base, "default").name
    return _digest([value for name, value in sorted(base.state_dict().items()) if not name.startswith(f"{head}.")])


@contextmanager
def _unseeded() -> Iterator[None]:
    """Within, what is drawn leaves no trace: whoever measures first draws nothing else than who comes later."""
    with torch.random.fork_rng(devices=[]):
        yield


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
