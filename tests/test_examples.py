"""The recipe to copy runs as it stands, and runs on where it was left."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import ViTForImageClassification

import finetune_image_classification as recipe
from pictures import write_base, write_folder


# On a machine without an accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    base, data = write_base(tmp_path / "base"), write_folder(tmp_path / "set", splits={"train": 4, "test": 2})

    def run(epochs: int) -> str:
        arguments = [str(base), str(data), str(tmp_path / "out"), f"--epochs={epochs}", "--keep-rate=0.5"]
        monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
        recipe.main()
        return capsys.readouterr().out

    assert re.search(r"'eval_accuracy': [01]", run(1))
    run(2)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    vit = ViTForImageClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(vit, tmp_path / "out")
    values = [p for name, p in model.named_parameters() if "trpts_values" in name]
    assert all(bool(value.any()) and torch.isfinite(value).all() for value in values)
