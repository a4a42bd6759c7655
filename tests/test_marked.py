"""What scores mark, against counts and means taken one by one."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from benchmarks import marked
from benchmarks.cells import network
from benchmarks.variants import VARIANTS
from tasks import Given, command, inputs_of


@pytest.mark.parametrize(
    ("score", "variant"),
    [("fisher", "fisher-2"), ("varying", "varying-2"), ("gradient", "gps"), ("magnitude", "magnitude-2")],
)
def test_a_score_marks_what_an_adapter_of_it_trains(given: Given, score: str, variant: str) -> None:
    start = given.start()
    found, model = marked.marked(start)["fc1"][score], network(start, VARIANTS[variant], 0)
    base, used, constant = start.base(), [], []
    for name, layer in model.named_modules():
        if name.endswith("fc1"):
            columns = layer.trpts_columns["default"]
            used.append(len(set(columns.flatten().tolist())) / layer.in_features)
            x = inputs_of(base, name.removeprefix("base_model.model."), start.pixels)
            constant.append(float((x.mean(0) ** 2 / (x**2).mean(0))[columns].mean()))
    assert found == {"used": pytest.approx(mean(used)), "constant": pytest.approx(mean(constant))}


def test_the_command_measures_tasks_and_their_mean(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(monkeypatch, marked.main, given, "--connections", 1, "--output", tmp_path / "marked.json")
    found = json.loads((tmp_path / "marked.json").read_text())
    assert list(found["tasks"]) == ["a", "b"] and found["connections"] == 1
    shares = [task["q_proj"]["random"]["used"] for task in found["tasks"].values()]
    assert found["mean"]["q_proj"]["random"]["used"] == pytest.approx(mean(shares))
    assert set(found["mean"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
