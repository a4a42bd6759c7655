"""What estimate_cost counts: against the table of published arithmetic, a naive loop, and the tensors themselves."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import DeiTForImageClassificationWithTeacher, ViTModel

from conftest import FAMILIES, PREFIX, build_images, build_vit, needs_adapter_methods
from trpts_peft import TRPTSConfig, apply_token_selection, estimate_cost, record_tokens, set_token_selection
from trpts_peft.cost import Geometry, geometry_of, macs, patch_grid, predicted_speedup, tokens_per_block

VIT_B16 = Geometry(tokens=196, prefix=1, hidden=768, intermediate=3072, blocks=12, patch_inputs=768, head=76_800)


def trpts(**options: Any) -> TRPTSConfig:
    return TRPTSConfig(**{"modules_to_save": ["classifier"], "keep_rate": 0.5, "token_layers": [1, 2], **options})


@pytest.mark.parametrize(
    ("rate", "giga_macs", "speedup", "tokens"),
    [
        (1.0, 17.563, 1.0, (197, 197, 197)),
        (0.95, 16.423, 1.069, (188, 179, 171)),
        (0.9, 15.288, 1.149, (178, 161, 146)),
        (0.8, 13.201, 1.330, (158, 127, 102)),
        (0.7, 11.485, 1.529, (139, 98, 69)),
        (0.5, 8.779, 2.001, (100, 51, 27)),
    ],
)
def test_vit_b16_at_blocks_3_6_9(rate: float, giga_macs: float, speedup: float, tokens: tuple[int, ...]) -> None:
    rates = dict.fromkeys((3, 6, 9), rate)
    assert round(macs(VIT_B16, rates) / 1e9, 3) == giga_macs
    assert round(predicted_speedup(VIT_B16, rates), 3) == speedup
    counts = tokens_per_block(VIT_B16, rates)
    assert counts == (197,) * 3 + (tokens[0],) * 3 + (tokens[1],) * 3 + (tokens[2],) * 3


@pytest.mark.parametrize(("block", "speedup"), [(0, 1.245), (3, 1.171), (6, 1.105), (9, 1.046), (11, 1.011)])
def test_one_block_at_0_8(block: int, speedup: float) -> None:
    assert round(predicted_speedup(VIT_B16, {block: 0.8}), 3) == speedup


@pytest.mark.parametrize("prefix", [1, 2])
def test_macs_of_a_naive_sum(prefix: int) -> None:
    g = Geometry(tokens=9, prefix=prefix, hidden=4, intermediate=6, blocks=2, patch_inputs=12, head=12)
    before, after = 9 + prefix, math.floor(0.6 * 9) + 1 + prefix
    expected = 9 * 12 * 4 + 4 * 3  # patches and head
    for attended, refined in ((before, after), (after, after)):
        expected += sum(attended * 4 * 4 for _ in "qkvo")
        expected += attended * attended * 4 + attended * attended * 4  # scores, and values by scores
        expected += refined * 4 * 6 + refined * 6 * 4
    expected += before * 4 + 9 * 4  # CLS row, mean of the merged tokens
    assert macs(g, {0: 0.6}) == expected


def test_nothing_happens_where_one_token_would_be_merged() -> None:
    g = Geometry(tokens=10, prefix=1, hidden=4, intermediate=8, blocks=3, patch_inputs=12, head=12)
    assert tokens_per_block(g, {0: 0.9, 1: 1.0, 2: 0.8}) == (11, 11, 10)
    assert macs(g, {0: 0.9, 1: 1.0}) == macs(g, {})


def test_a_block_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`keep_rates` must name blocks from 0 to 11, got \[-1, 12\]"):
        macs(VIT_B16, {12: 0.5, -1: 0.5, 3: 0.5})


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_of_a_model(family: str) -> None:
    features = 64 if family.startswith("dinov2") else 32  # the CLS token, and the mean of the patches behind it
    expected = Geometry(
        tokens=8 * 6,
        prefix=PREFIX[family],
        hidden=32,
        intermediate=64,
        blocks=4,
        patch_inputs=4 * 4 * 3,
        head=features * 3,
    )
    model = build_vit(family, image_size=[32, 24])
    assert geometry_of(model) == expected
    assert geometry_of(get_peft_model(model, trpts())) == expected


def test_geometry_of_a_gated_mlp() -> None:
    model = build_vit("dinov2", use_swiglu_ffn=True)
    linears = [m for m in model.dinov2.encoder.layer[0].mlp.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 3
    products = sum(linear.in_features * linear.out_features for linear in linears)
    assert 2 * 32 * geometry_of(model).intermediate == products


def test_geometry_of_another_image_size_and_heads() -> None:
    model = build_vit()
    assert patch_grid(model, (18, 40)) == (4, 10)
    assert geometry_of(model, (18, 40)).tokens == 40
    assert geometry_of(build_vit(model_class=ViTModel)).head == 0
    assert geometry_of(build_vit("deit", model_class=DeiTForImageClassificationWithTeacher)).head == 32 * 6
    assert geometry_of(get_peft_model(model, LoraConfig(target_modules=["q_proj", "classifier"]))).head == 32 * 3


def test_unknown_models_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`model` must be a ViT of a supported family, got Linear\."):
        estimate_cost(nn.Linear(2, 2))
    model = build_vit()
    with pytest.raises(ValueError, match=r"`image_size` must hold at least one patch of 4 x 4 pixels, got 32 x 3\."):
        estimate_cost(model, (32, 3))
    for wrong in (0, -4, True, 32.0, (32, 32, 32), "32"):
        with pytest.raises(ValueError, match="`image_size` must be a positive int or a pair of them"):
            estimate_cost(model, wrong)  # type: ignore[arg-type]


def naive_size(module: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in module.parameters())


def test_a_plain_model_trains_and_stores_all_of_itself() -> None:
    model = build_vit()
    cost = estimate_cost(model)
    total, backbone = naive_size(model), naive_size(model.vit)
    assert (cost.total_parameters, cost.trainable_parameters, cost.stored_parameters) == (total,) * 3
    assert cost.total_parameters_without_head == cost.trainable_parameters_without_head == backbone
    assert cost.stored_parameters_without_head == backbone
    assert cost.stored_bytes == 4 * total
    assert cost.trainable_percent == cost.trainable_percent_without_head == 100
    assert (cost.tokens, cost.speedup) == ((65,) * 4, 1.0)


def test_a_linear_probe_trains_the_head_alone() -> None:
    model = build_vit()
    model.vit.requires_grad_(False)
    cost = estimate_cost(model)
    assert cost.trainable_parameters == 3 * 32 + 3
    assert cost.trainable_parameters_without_head == 0


@pytest.mark.parametrize("through", ["peft", "base", pytest.param("transformers", marks=needs_adapter_methods)])
def test_lora(through: str) -> None:
    model = build_vit()
    total, backbone, head = naive_size(model), naive_size(model.vit), naive_size(model.classifier)
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    if through == "transformers":
        model.add_adapter(config)
    else:
        wrapped = get_peft_model(model, config)
        model = wrapped if through == "peft" else wrapped.get_base_model()
    cost = estimate_cost(model)
    rank_two = 4 * 2 * ((32 + 32) + (32 + 64))
    assert (cost.total_parameters, cost.total_parameters_without_head) == (total, backbone)
    assert (cost.trainable_parameters, cost.trainable_parameters_without_head) == (rank_two + head, rank_two)
    assert (cost.stored_parameters, cost.stored_parameters_without_head) == (rank_two + head, rank_two)
    assert cost.stored_bytes == 4 * (rank_two + head)
    assert cost.trainable_percent_without_head == pytest.approx(100 * rank_two / backbone)
    assert (cost.tokens, cost.speedup) == ((65,) * 4, 1.0)


def test_trpts() -> None:
    model = build_vit()
    total, backbone, head = naive_size(model), naive_size(model.vit), naive_size(model.classifier)
    cost = estimate_cost(get_peft_model(model, trpts(min_connections=3, max_connections=3)))
    rows = 4 * (4 * 32 + 64 + 32)  # neurons of the six linears of four blocks: three weights and a bias each
    assert (cost.total_parameters, cost.total_parameters_without_head) == (total, backbone)
    assert (cost.trainable_parameters, cost.trainable_parameters_without_head) == (4 * rows + head, 4 * rows)
    assert (cost.stored_parameters, cost.stored_parameters_without_head) == (4 * rows + head, 4 * rows)
    fingerprints, rates = 4 * 6 * 64 * 4, 2 * 8
    assert cost.stored_bytes == 6 * (3 * rows) + 4 * rows + 4 * head + fingerprints + rates


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_a_compiled_or_data_parallel_model_costs_the_same(wrap: Any) -> None:
    model = get_peft_model(build_vit(), trpts())
    assert estimate_cost(wrap(model)) == estimate_cost(model)


@pytest.mark.parametrize("how", ["inject", "load_adapter"])
def test_an_adapter_without_a_peft_model_costs_the_same(how: str, tmp_path: Path) -> None:
    wrapped, model = get_peft_model(build_vit(), trpts()), build_vit()
    if how == "inject":
        inject_adapter_in_model(trpts(), model)
    else:
        wrapped.save_pretrained(tmp_path)
        model.load_adapter(str(tmp_path), is_trainable=True)
    assert estimate_cost(model) == estimate_cost(wrapped)


def test_tokens_are_those_that_a_forward_pass_leaves() -> None:
    model = get_peft_model(build_vit(), trpts())
    lengths = []
    for block in model.get_base_model().vit.layers:
        block.register_forward_hook(lambda _module, _args, output: lengths.append(output.shape[1]))
    with record_tokens(model), torch.no_grad():
        model(pixel_values=build_images())
    cost = estimate_cost(model)
    assert cost.tokens == tuple(lengths) == (65, 34, 18, 18)
    assert cost.speedup == cost.dense_macs / cost.macs > 1.5


def test_rates_in_force_count() -> None:
    model = get_peft_model(build_vit(), trpts())
    reduced = estimate_cost(model)
    with model.disable_adapter():
        assert estimate_cost(model).tokens == (65,) * 4
    set_token_selection(model, False)
    assert estimate_cost(model).macs == reduced.dense_macs
    set_token_selection(model, True)
    merged = model.merge_and_unload()
    assert (estimate_cost(merged).macs, estimate_cost(merged).tokens) == (reduced.macs, reduced.tokens)
    apply_token_selection(merged, {0: 0.25})
    assert estimate_cost(merged).tokens == (18,) * 4


def test_only_the_active_adapter_counts() -> None:
    model = get_peft_model(build_vit(), trpts(min_connections=1, max_connections=1))
    model.add_adapter("other", trpts(min_connections=2, max_connections=2, token_layers=[3]))
    first = estimate_cost(model)
    model.set_adapter("other")
    other = estimate_cost(model)
    rows = 4 * (4 * 32 + 64 + 32)
    assert other.trainable_parameters - first.trainable_parameters == rows
    assert other.stored_parameters - first.stored_parameters == rows
    assert other.tokens == (65, 65, 65, 34)
    assert other.total_parameters == first.total_parameters == naive_size(build_vit())


def test_a_loaded_adapter_is_stored_though_nothing_trains(tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), trpts())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_vit(), tmp_path)
    cost, trained = estimate_cost(loaded), estimate_cost(model)
    assert cost.trainable_parameters == 0
    assert (cost.stored_parameters, cost.stored_bytes) == (trained.stored_parameters, trained.stored_bytes)
    header = (tmp_path / "adapter_model.safetensors").stat().st_size - cost.stored_bytes
    assert 0 < header < 20_000


def test_a_model_around_a_vit() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build_vit(model_class=ViTModel)
            self.top = nn.Sequential(nn.Linear(32, 5), nn.ReLU(), nn.Linear(5, 2))

    model = Classifier()
    cost = estimate_cost(model)
    assert geometry_of(model).head == 32 * 5 + 5 * 2
    assert cost.total_parameters - cost.total_parameters_without_head == naive_size(model.top)
    assert cost.stored_parameters - cost.stored_parameters_without_head == naive_size(model.top)


def test_of_two_vits_nothing_tells_what_they_cost_together() -> None:
    pair = nn.ModuleDict({"student": build_vit(), "teacher": build_vit()})
    with pytest.raises(ValueError, match=r"`model` must hold one ViT, got ModuleDict with 2,"):
        estimate_cost(pair)
    assert estimate_cost(pair["student"]).tokens == estimate_cost(build_vit()).tokens


@pytest.mark.parametrize("named", [False, True])
def test_blocks_that_a_module_of_another_kind_holds_are_one_vit(named: bool) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = build_vit().vit
            self.embeddings, blocks = vit.embeddings, list(vit.layers)
            if named:
                self.block0, self.block1, self.block2, self.block3 = blocks
            else:
                self.lower, self.upper = nn.ModuleList(blocks[:2]), nn.ModuleList(blocks[2:])

    assert estimate_cost(Halves()).tokens == (65,) * 4


def test_a_vit_beside_one_of_another_family_is_a_second_one() -> None:
    with pytest.raises(ValueError, match="with 2,"):
        estimate_cost(nn.ModuleList([build_vit(), build_vit("dinov2")]))


def test_the_summary_is_readable() -> None:
    cost = estimate_cost(get_peft_model(build_vit(), trpts()))
    lines = str(cost).splitlines()
    assert str(cost) == cost.summary()
    assert f"{cost.macs / 1e6:.4g} MMACs per image (dense {cost.dense_macs / 1e6:.4g} MMACs)" in lines[0]
    assert lines[2].split() == ["tokens", "per", "block", "65", "34", "18", "18"]
    assert f"{cost.trainable_parameters:,} ({cost.trainable_percent:.3f} %)" in lines[4]
    assert f"{cost.stored_parameters:,} ({cost.stored_bytes / 1e3:.4g} kB)" in lines[6]
