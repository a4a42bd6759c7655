"""Entries of a weight that merging changes, and puts back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from trpts_peft.merging import add_at, base_parameter, write_at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_entries_are_added_to_and_come_back_to_the_bit(dtype: torch.dtype, contiguous: bool) -> None:
    weight = torch.randn(6, 8).to(dtype) if contiguous else torch.randn(8, 6).to(dtype).t()
    weight[0, 3] = -0.0
    before, updates = weight.clone(), torch.randn(2, 2)
    rows, columns = torch.tensor([[0, 0], [5, 5]]), torch.tensor([[2, 3], [0, 7]])
    places = (rows * 8 + columns).flatten()
    entries = add_at(weight, places, updates)
    expected = before.clone()
    for row, column, update in zip(rows.flatten(), columns.flatten(), updates.flatten(), strict=True):
        expected[row, column] += update.to(dtype)
    assert torch.equal(weight, expected)
    assert torch.equal(entries, before[rows, columns].flatten())
    write_at(weight, places, entries)
    assert torch.equal(weight, before)
    assert torch.equal(weight.signbit(), before.signbit())


def test_parameters_are_found_where_merging_can_write() -> None:
    linear = nn.Linear(2, 2)
    assert base_parameter(linear, "weight") is linear.weight
    with pytest.raises(ValueError, match="a bias without entries"):
        base_parameter(nn.Linear(2, 2, device="meta"), "bias")
    with pytest.raises(TypeError, match="a weight that is computed from others"):
        base_parameter(parametrizations.weight_norm(linear), "weight")
