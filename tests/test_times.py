"""Times beside full fine-tuning, on a small model: every method is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import times
from benchmarks.variants import METHODS
from tasks import Given, command


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_every_method_is_measured(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "_BATCH", 4)
    command(monkeypatch, times.main, given, "--task", "a", "--repeats", 1, "--output", tmp_path / "times.json")
    found = json.loads((tmp_path / "times.json").read_text())["to_full"]
    assert list(found) == list(METHODS)
    assert found["full"] == {"training": 1.0, "prediction": 1.0}
    assert all(value > 0 for ratios in found.values() for value in ratios.values())


def test_what_can_be_merged_predicts_merged(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "_BATCH", 2)
    kinds: list[str] = []
    measured = times.inference
    monkeypatch.setattr(
        times, "inference", lambda model, batch: kinds.append(type(model).__name__) or measured(model, batch)
    )
    times.times(given.start(), [METHODS[name] for name in ("full", "lora", "trpts-all-tokens", "ssf")], repeats=1)
    assert kinds == ["ViTForImageClassification"] * 4
