"""The record of kept and merged patches, against a trace made by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from conftest import FAMILIES, PREFIX, build_images, build_vit, naive_attend, naive_transform
from trpts_peft import TRPTSConfig, apply_token_selection, record_tokens
from trpts_peft.families import find_blocks

RATES = {0: 0.75, 1: 0.5, 3: 0.4}


def reduced(family: str = "vit", rates: dict[int, float] | None = None) -> Any:
    model = build_vit(family)
    apply_token_selection(model, rates or RATES)
    return model


@torch.no_grad()
def naive_trace(family: str, pixel_values: Tensor) -> dict[int, list[tuple[list[int], dict[int, int], Tensor]]]:
    """{block: per sample (own patches, {patch: block that merged it}, importance)}; a token is a set of patches."""
    trace: dict[int, list[tuple[list[int], dict[int, int], Tensor]]] = {block: [] for block in RATES}
    model, prefix = build_vit(family), PREFIX[family]
    model.set_attn_implementation("eager")
    backbone = model.base_model
    for image in pixel_values:
        hidden = backbone.embeddings(image[None])
        tokens: list[tuple[set[int], int | None]] = [({patch}, None) for patch in range(64)]
        for index, (_, block) in enumerate(find_blocks(model)):
            hidden, weights = naive_attend(block, hidden)
            if index in RATES:
                importance = weights.mean(dim=1)[0, 0, prefix:]
                count = int(RATES[index] * len(tokens) + 1e-9)
                best = importance.argsort(descending=True).tolist()
                kept, gone = sorted(best[:count]), sorted(best[count:])
                states = hidden[0, prefix:]
                merged = (importance[gone, None] * states[gone]).sum(0) / importance[gone].sum()
                hidden = torch.cat([hidden[:, :prefix], states[None, kept], merged[None, None]], dim=1)
                tokens = [tokens[i] for i in kept] + [(set().union(*(tokens[i][0] for i in gone)), index)]
                own = [patch for patches, home in tokens if home is None for patch in patches]
                homes = {patch: home for patches, home in tokens if home is not None for patch in patches}
                trace[index].append((own, homes, importance))
            hidden = naive_transform(block, hidden)
    return trace


def _in_place(model: Any) -> Any:
    for _, block in find_blocks(model):
        block.compile(backend="eager")
    return model


def _block_by_block(model: Any) -> Any:
    for index, block in enumerate(model.vit.layers):
        model.vit.layers[index] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("compile_model", [_in_place, _block_by_block, partial(torch.compile, backend="eager")])
@pytest.mark.parametrize("passes", [0, 1])
@torch.no_grad()
def test_record_of_a_compiled_model(compile_model: Any, passes: int) -> None:
    torch.compiler.reset()
    model = compile_model(reduced())
    for _ in range(passes):
        model(build_images(2))
    with record_tokens(model) as record, record_tokens(plain := reduced()) as expected:
        model(build_images(2))
        plain(build_images(2))
    assert sorted(record) == sorted(RATES)
    for block in RATES:
        assert record[block].merged == expected[block].merged
        assert all(torch.equal(mine, its) for mine, its in zip(record[block].kept, expected[block].kept, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_record_is_that_of_a_naive_trace(family: str) -> None:
    expected, model = naive_trace(family, build_images(5)), reduced(family)
    with record_tokens(model) as record, torch.no_grad():
        model(build_images(5))
    assert sorted(record) == sorted(RATES)
    for block, samples in expected.items():
        for sample, (own, homes, importance) in enumerate(samples):
            assert record[block].kept[sample].tolist() == own
            assert record[block].merged[sample] == homes
            torch.testing.assert_close(record[block].importance[sample], importance, rtol=1e-3, atol=1e-5)


def test_every_patch_is_either_kept_or_merged() -> None:
    model = reduced()
    with record_tokens(model) as record:
        model(build_images(3))
    for block in record.values():
        for kept, merged in zip(block.kept, block.merged, strict=True):
            assert sorted([*kept.tolist(), *merged]) == list(range(64))


def test_a_record_is_on_the_cpu_whatever_the_default_device() -> None:
    model, images = reduced(), build_images(3)
    with record_tokens(model) as record, torch.device("meta"):
        model(images)
    tensors = [tensor for block in record.values() for tensor in (*block.kept, *block.importance)]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_a_merged_token_is_merged_again() -> None:
    """With the trace above this happens somewhere among a few images; its patches then move to the later block."""
    model = reduced()
    with record_tokens(model) as record:
        model(build_images(20))
    first, last = record[0].merged, record[3].merged
    moved = [sample for sample, homes in enumerate(first) if any(last[sample][patch] != 0 for patch in homes)]
    assert moved
    for sample in moved:
        # A merged token is one token: all of its patches move together.
        assert 0 not in last[sample].values()


def test_batches_are_appended() -> None:
    model = reduced()
    with record_tokens(model) as one:
        model(build_images(4))
    with record_tokens(model) as other:
        for image in build_images(4):
            model(image[None])
    for block in one:
        assert [k.tolist() for k in one[block].kept] == [k.tolist() for k in other[block].kept]
        assert one[block].merged == other[block].merged


def test_adapter_is_recorded_and_hooks_are_removed() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(token_layers=[1], keep_rate=0.5)).eval()
    with record_tokens(model) as record:
        model(build_images())
    assert [len(kept) for kept in record[1].kept] == [32, 32]
    model(build_images())
    assert len(record[1].kept) == 2
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_after_an_error() -> None:
    model = reduced()
    with pytest.raises(RuntimeError, match="mine"), record_tokens(model):
        raise RuntimeError("mine")
    assert not any(module._forward_hooks for module in model.modules())


def test_dense_passes_leave_no_record() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(token_layers=[1], keep_rate=0.5)).eval()
    with record_tokens(model) as record, model.disable_adapter():
        model(build_images())
    assert not record


def test_a_model_without_token_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate"), record_tokens(build_vit()):
        pass


def test_each_pass_is_traced_by_itself() -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(token_layers=[1], keep_rate=0.5)).eval()
    model.add_adapter("b", TRPTSConfig(token_layers=[3], keep_rate=0.5))
    with record_tokens(model) as both:
        model(build_images())
        model.set_adapter("b")
        model(build_images())
    with record_tokens(model) as alone:
        model(build_images())
    assert torch.equal(both[3].kept[0], alone[3].kept[0]) and both[3].merged[0] == alone[3].merged[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_checkpointing_is_refused() -> None:
    model = reduced()
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"), record_tokens(model):
        model(build_images())


def test_each_vit_of_a_model_is_traced_by_itself() -> None:
    one, other = reduced(rates={0: 0.5}), reduced(rates={1: 0.4})
    both = nn.ModuleDict({"one": one, "other": other})
    with record_tokens(both) as record:
        for tower in both.values():
            tower(build_images())
    for model, block, place in ((one, 0, 0), (other, 1, 5)):
        with record_tokens(model) as alone:
            model(build_images())
        assert torch.equal(record[place].kept[1], alone[block].kept[1])
        assert record[place].merged[1].keys() == alone[block].merged[1].keys()
