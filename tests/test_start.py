"""What is measured once for all cells is what `calibrate` measures for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import start as start_module
from benchmarks.scores import constant_parts, without_constant_parts
from benchmarks.start import Pixels, Start, weights_digest
from pictures import write_base
from tasks import Given
from trpts_peft.head import find_head


def test_the_head_is_fitted_or_drawn(given: Given) -> None:
    start = given.start()
    fitted, again, drawn = (find_head(start.base(probed), "default").linear for probed in (True, True, False))
    assert torch.equal(fitted.weight, start.probe().weight.float())
    assert torch.equal(fitted.weight, again.weight)
    assert not torch.equal(fitted.weight, drawn.weight)


def test_a_build_for_gpus_without_a_gpu_stays_on_the_cpu(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    built_for = torch.device("cuda")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else built_for
    )
    assert given.start().base().device.type == "cpu"


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
    changed = [{"num_samples": 6}, {"per_batch": 4}, {"varying": True}, {"shared": 0.25}]
    kinds = [("fisher", {}), ("gradient", {}), *(("fisher", scoring) for scoring in changed)]
    scores = [start.scores(*kind)["vit.layers.0.mlp.fc1"] for kind in kinds]
    assert len({score.sum().item() for score in scores}) == len(kinds)
    assert start.scores("fisher", {}) is start.scores("fisher", {})


def test_scores_for_comparison_are_those_of_all_images(given: Given) -> None:
    start = given.start()
    fisher, pixels = start.scores("fisher", {}), torch.stack([image["pixel_values"] for image in start.pixels])
    constant = constant_parts(start.base(), fisher, [{"pixel_values": pixels}])
    varying = start.scores("fisher", {"varying": True})
    for name, score in without_constant_parts(fisher, constant).items():
        torch.testing.assert_close(varying[name], score)


def test_neurons_share_the_inputs_that_are_drawn(given: Given) -> None:
    start = given.start()
    shared = start.scores("fisher", {"shared": 0.25})
    assert set(shared) == set(start.scores("fisher", {}))
    for score in shared.values():
        preferred = score >= 1
        assert torch.equal(preferred, preferred[:1].expand_as(preferred))
        assert preferred[0].sum() == score.shape[1] // 4
        assert len({tuple(row) for row in score.topk(2).indices.tolist()}) > 6  # not the same two for all


def test_images_beyond_memory_are_read_as_needed(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    start, rows = given.start(), given.tasks[0].load().full
    monkeypatch.setattr(start_module, "_IN_MEMORY", 0)
    read = Pixels(rows, start.processor)
    assert read.digest() == start.pixels.digest()
    assert torch.equal(read[14]["pixel_values"], start.pixels[14]["pixel_values"])


def test_digests_tell_images_and_weights_apart(given: Given, tmp_path: Path) -> None:
    start, splits = given.start(), given.tasks[1].load()
    other = Pixels(splits.test, start.processor)
    assert start.pixels.digest() == given.start().pixels.digest() != other.digest()
    relabelled = Pixels(splits.test, start.processor)
    relabelled.labels = relabelled.labels.roll(1)
    assert relabelled.digest() != other.digest()
    same, changed = write_base(tmp_path / "same"), write_base(tmp_path / "other", seed=1)
    assert weights_digest(given.model) == weights_digest(str(same)) != weights_digest(str(changed))


def test_a_head_is_drawn_even_where_the_model_has_as_many_classes(given: Given, tmp_path: Path) -> None:
    splits = given.tasks[0].load()
    start, heads = Start(str(write_base(tmp_path / "five")), splits.full, 5), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(find_head(start.base(probed_head=False), "default").linear.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
