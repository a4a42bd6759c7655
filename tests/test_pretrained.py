"""A base is loaded whole, but for its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    CLIPForImageClassification,
    CLIPVisionConfig,
    ConvNextBackbone,
    ConvNextConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
)

from conftest import FAMILIES, build_images, build_vit
from trpts_peft.pretrained import load_whole

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"image_size": 32, "patch_size": 8}


def renamed(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file({new: t for key, t in load_file(file).items() if (new := change(key))}, file, {"format": "pt"})


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    build_vit().save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    path = tmp_path / "config.json"
    names = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "other", "auto_map": names}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_whole(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_for_other_classes_starts_anew(tmp_path: Path, family: str) -> None:
    model = build_vit(family)
    model.save_pretrained(tmp_path)
    loaded = load_whole(str(tmp_path), num_labels=7)
    old = model.base_model.state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in loaded.base_model.state_dict().items())
    assert loaded.classifier.out_features == 7


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_vit().vit,
        lambda: build_vit("deit", model_class=DeiTForImageClassificationWithTeacher).deit,
        lambda: BeitForMaskedImageModeling(BeitConfig(**SMALL, vocab_size=9)).beit,
        lambda: ConvNextBackbone(ConvNextConfig(hidden_sizes=[4] * 4, depths=[1] * 4)),
    ],
    ids=["vit", "deit", "beit", "convnext"],
)
def test_a_backbone_pretrained_without_a_head_is_whole(tmp_path: Path, build: Any) -> None:
    backbone = build()
    backbone.save_pretrained(tmp_path)
    loaded = load_whole(str(tmp_path), num_labels=7).base_model.state_dict()
    blocks = {name: t for name, t in backbone.state_dict().items() if name.startswith(("encoder.", "layers."))}
    assert blocks and all(torch.equal(tensor, loaded[name]) for name, tensor in blocks.items())


def test_a_distilled_deit_gets_one_head_that_takes_labels(tmp_path: Path) -> None:
    both = build_vit("deit", model_class=DeiTForImageClassificationWithTeacher)
    both.save_pretrained(tmp_path)
    model = load_whole(str(tmp_path), num_labels=7)
    assert type(model) is DeiTForImageClassification
    old = both.deit.state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.deit.state_dict().items())
    assert model(build_images(2), labels=torch.tensor([0, 6])).loss.isfinite()


@pytest.mark.parametrize("change", [lambda key: f"_orig_mod.{key}", lambda key: ".1." not in key and key])
@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_part_is_refused(tmp_path: Path, kind: str, change: Any) -> None:
    clip = {"vision_config": CLIPVisionConfig(**SMALL).to_dict()}
    model = (
        build_vit() if kind == "vit" else CLIPForImageClassification(CLIPForImageClassification.config_class(**clip))
    )
    model.save_pretrained(tmp_path)
    load_whole(str(tmp_path), num_labels=7)
    renamed(tmp_path, change)
    with pytest.raises(ValueError, match="its file lacks"):
        load_whole(str(tmp_path), num_labels=7)
