"""A recorded cell run again: the same number, or a word on what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import again, grid
from tasks import Given, command


@pytest.fixture
def cell(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a cell of LoRA, which draws; two steps, the first of which is at a rate of zero."""
    monkeypatch.setattr(grid, "validate", lambda *_: 1.0)
    options = ["--tasks", "b", "--variants", "lora", "--seeds", 0, "--epochs", 2, "--threads", 1]
    command(monkeypatch, grid.main, given, "--output", tmp_path / "grid", *options)
    return tmp_path / "grid" / "b" / "lora" / "seed-0.json"


def changed(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


def test_a_cell_is_the_same_again(given: Given, cell: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        command(monkeypatch, again.main, given, cell)
    assert capsys.readouterr().out.strip().endswith(": the same")


def test_what_differs_is_named(given: Given, cell: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    changed(cell, loss=0.5, model={"name": "another", "weights": "0"})
    with pytest.raises(SystemExit, match=r"^1$"):
        command(monkeypatch, again.main, given, cell)
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("model: {'name': 'another'") for line in shown)
    assert shown[-1].startswith("loss: 0.5 in the record, ")


def test_every_setting_counts(given: Given, cell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = json.loads(cell.read_text())["recipe"]
    machine = {**json.loads(cell.read_text())["machine"], "threads": 2}
    for values in ({"seed": 1}, {"learning_rate": 0.5}, {"recipe": {**recipe, "batch_size": 4}}):
        original = cell.read_text()
        with pytest.raises(SystemExit, match=r"^1$"):
            command(monkeypatch, again.main, given, changed(cell, **values))
        cell.write_text(original)
    changed(cell, machine=machine)
    with pytest.raises(SystemExit):
        command(monkeypatch, again.main, given, cell)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
