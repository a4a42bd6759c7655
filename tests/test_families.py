"""The table of families, and what names tell of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import FAMILIES, build_vit
from trpts_peft.families import block_index, block_of, find_blocks, is_of_family, unit_order


@pytest.mark.parametrize(
    "linear, block, index",
    [
        ("vit.layers.11.mlp.fc1", "vit.layers.11", 11),
        ("towers.0.vit.layers.3.attention.q_proj", "towers.0.vit.layers.3", 3),
        ("swin.encoder.layers.1.blocks.0.mlp.fc1", "swin.encoder.layers.1.blocks.0", 0),
        ("vit.layers.7.mlp.0", "vit.layers.7", 0),
        ("classifier", None, None),
        ("vit.pooler.dense", None, None),
    ],
)
def test_the_block_of_a_linear_by_its_name(linear: str, block: str | None, index: int | None) -> None:
    assert block_of(linear) == block
    assert block_index(linear) == index


def test_units_are_sorted_by_number_and_those_outside_come_last() -> None:
    units = ["classifier", "vit.layers.10", "vit.layers.9", "vit.layers.9.mlp.fc1"]
    assert sorted(units, key=unit_order) == ["vit.layers.9", "vit.layers.9.mlp.fc1", "vit.layers.10", "classifier"]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_familys_own_classes_are_of_it(family: str) -> None:
    model = build_vit(family)
    assert is_of_family(model) and is_of_family(model.base_model)
    assert not is_of_family(nn.Sequential(model))
    assert not is_of_family(type("Own", (type(model),), {"__module__": "own"})(model.config))


def test_compilers_have_no_part_in_the_names_of_blocks() -> None:
    model = build_vit()
    names = [name for name, _ in find_blocks(model)]
    model.vit.layers[1] = torch.compile(model.vit.layers[1], backend="eager")
    model.vit = torch.compile(model.vit, backend="eager")
    assert [name for name, _ in find_blocks(model)] == names == [f"vit.layers.{index}" for index in range(len(names))]
