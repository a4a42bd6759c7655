"""What is measured once for all cells is what `calibrate` measures for each."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

from benchmarks.start import Pixels, batch_fisher
from tasks import Given
from trpts_peft.head import find_head


def test_the_head_is_fitted_or_drawn(given: Given) -> None:
    start = given.start()
    fitted, again, drawn = (find_head(start.base(probed), "default").linear for probed in (True, True, False))
    assert torch.equal(fitted.weight, start.probe().weight.float())
    assert torch.equal(fitted.weight, again.weight)
    assert not torch.equal(fitted.weight, drawn.weight)


def test_what_is_measured_first_leaves_no_trace(given: Given) -> None:
    """The next head drawn is that of the seed, whether the probe and the scores are there yet or not."""
    start, drawn = given.start(), []
    for _ in range(2):
        torch.manual_seed(7)
        start.scores("fisher", {"labels": "model"})
        drawn.append(find_head(start.base(probed_head=False), "default").linear.weight)
    assert torch.equal(*drawn)


def test_scores_are_kept_apart(given: Given) -> None:
    start = given.start()
    kinds = [("fisher", {}), ("gradient", {}), ("fisher", {"num_samples": 6}), ("fisher", {"per_batch": 4})]
    scores = [start.scores(*kind)["vit.layers.0.mlp.fc1"] for kind in kinds]
    assert len({score.sum().item() for score in scores}) == len(kinds)
    assert start.scores("fisher", {}) is start.scores("fisher", {})


def test_batch_fisher_squares_the_gradient_of_each_batch(given: Given) -> None:
    start = given.start()
    base, pixels = start.base().eval(), start.pixels
    scores, linear = batch_fisher(base, pixels, 8), base.vit.layers[1].attention.q_proj
    expected = torch.zeros_like(linear.weight)
    for first in (0, 8):  # 15 images: eight and seven
        batch = default_collate([pixels[index] for index in range(first, min(first + 8, 15))])
        loss = F.cross_entropy(base(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        expected += torch.autograd.grad(loss, linear.weight)[0].square() / 2
    assert torch.allclose(scores["vit.layers.1.attention.q_proj"], expected, rtol=1e-4, atol=1e-10)
    assert set(scores) == set(start.scores("fisher", {}))


def test_digests_tell_images_and_weights_apart(given: Given) -> None:
    start, splits = given.start(), given.tasks[1].load()
    other = Pixels(splits.test, start.processor)
    assert start.pixels.digest() == given.start().pixels.digest() != other.digest()
    assert start.weights_digest() == given.start().weights_digest()
    relabelled = Pixels(splits.test, start.processor)
    relabelled.labels = relabelled.labels.roll(1)
    assert relabelled.digest() != other.digest()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
