"""What scores mark, against counts and means taken one by one."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import marked
from benchmarks.cells import network
from benchmarks.variants import VARIANTS
from tasks import Given, command


def inputs_of(base: Any, name: str, pixels: Any) -> Tensor:
    """All that enters a linear, (tokens of all images, in_features)."""
    seen: list[Tensor] = []
    handle = base.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        base.eval()(pixel_values=torch.stack([image["pixel_values"] for image in pixels]))
    handle.remove()
    return seen[0].flatten(0, -2).double()


def test_constant_parts_over_batches_are_those_of_all_tokens_at_once(given: Given) -> None:
    start = given.start()
    base, names = start.base(), list(start.scores("fisher", {}))[:6]
    images = torch.stack([image["pixel_values"] for image in start.pixels])
    parts = marked.constant_parts(base, names, [{"pixel_values": some} for some in images.split(4)])
    assert list(parts) == names
    for name, part in parts.items():
        x = inputs_of(base, name, start.pixels)
        torch.testing.assert_close(part, x.mean(0) ** 2 / (x**2).mean(0))
    assert not any(module._forward_hooks for module in base.modules())


def test_an_input_that_is_always_zero_is_constant(given: Given) -> None:
    base, images = given.start().base(), torch.zeros(2, 3, 32, 32)
    (name,) = [name for name in given.start().scores("fisher", {}) if name.endswith("0.attention.q_proj")]
    layer = base.get_submodule(name.rpartition(".attention")[0]).layernorm_before
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    assert marked.constant_parts(base, [name], [{"pixel_values": images}])[name].eq(1).all()


@pytest.mark.parametrize(
    ("score", "variant"), [("fisher", "fisher-2"), ("gradient", "gps"), ("magnitude", "magnitude-2")]
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
