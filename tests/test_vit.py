"""Token selection inside the supported families, against a block written out by hand."""

from __future__ import annotations

import copy
import io
import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from accelerate.hooks import attach_execution_device_hook, remove_hook_from_submodules
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    DeiTForMaskedImageModeling,
    Dinov2Backbone,
    Dinov2WithRegistersBackbone,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.models.deit import modeling_deit
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers
from transformers.models.vit import modeling_vit
from transformers.models.vit_msn import modeling_vit_msn

from conftest import FAMILIES, PREFIX, LabelledImages, build_images, build_vit, naive_attend, naive_transform
from trpts_peft import TRPTSConfig, apply_token_selection, calibrate, set_token_selection
from trpts_peft.vit import install_keep_rates, keep_rates_in_force, token_selections

STOCK = {
    "vit": (modeling_vit.ViTLayer, modeling_vit.ViTAttention),
    "deit": (modeling_deit.DeiTLayer, modeling_deit.DeiTAttention),
    "vit_msn": (modeling_vit_msn.ViTMSNLayer, modeling_vit_msn.ViTMSNAttention),
    "dinov2": (modeling_dinov2.Dinov2Layer, modeling_dinov2.Dinov2Attention),
    "dinov2_with_registers": (
        modeling_dinov2_with_registers.Dinov2WithRegistersLayer,
        modeling_dinov2_with_registers.Dinov2WithRegistersAttention,
    ),
}
RATES = {0: 0.7, 2: 0.45}


def reduced(family: str = "vit", rates: dict[int, float] | None = None, **options: Any) -> Any:
    model = build_vit(family, **options)
    apply_token_selection(model, RATES if rates is None else rates)
    return model


def adapter(base: nn.Module | None = None, **options: Any) -> Any:
    model = get_peft_model(base or build_vit(), TRPTSConfig(**{"keep_rate": 0.5, "token_layers": [1], **options}))
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_(std=0.1)
    return model.eval()


def blocks(model: nn.Module) -> nn.ModuleList:
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return next(module for name, module in lists if name.endswith((".layers", ".layer")))


@torch.no_grad()
def predict(model: nn.Module, **options: Any) -> Tensor:
    return model(build_images(**options)).logits


def naive_select(hidden: Tensor, importance: Tensor, rate: float, prefix: int) -> Tensor:
    """Eqs. 9 to 11, token by token: hidden (B, S, D), importance (B, N)."""
    rows = []
    for tokens, weights in zip(hidden, importance, strict=True):
        count = int(rate * len(weights) + 1e-9)
        kept = sorted(sorted(range(len(weights)), key=lambda i: -float(weights[i]))[:count])
        gone = [i for i in range(len(weights)) if i not in kept]
        merged = sum(weights[i] * tokens[prefix + i] for i in gone) / sum(weights[i] for i in gone)
        rows.append(torch.stack([*tokens[:prefix], *(tokens[prefix + i] for i in kept), merged]))
    return torch.stack(rows)


@torch.no_grad()
def naive_features(model: Any, family: str, pixel_values: Tensor, rates: dict[int, float]) -> list[Tensor]:
    """Hidden states of a stock model, behind the embeddings and behind each block, with tokens selected by hand."""
    model.set_attn_implementation("eager")
    backbone = model.base_model
    states = [backbone.embeddings(pixel_values)]
    for index, block in enumerate(blocks(model)):
        hidden, weights = naive_attend(block, states[-1])
        if index in rates:
            importance = weights.mean(dim=1)[:, 0, PREFIX[family] :]
            hidden = naive_select(hidden, importance, rates[index], PREFIX[family])
        states.append(naive_transform(block, hidden))
    return states


# ---- outputs ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_a_naive_model(family: str, attention: str) -> None:
    states = naive_features(build_vit(family), family, build_images(), RATES)
    model = reduced(family)
    model.set_attn_implementation(attention)
    hidden = model.base_model(build_images(), output_hidden_states=True).hidden_states
    lengths = [64 + PREFIX[family], 44 + 1 + PREFIX[family], 20 + 1 + PREFIX[family]]
    assert [h.shape[1] for h in hidden] == [lengths[i] for i in (0, 1, 1, 2, 2)]
    # The last entry is what the backbone returns, behind its last norm.
    for state, expected in zip(hidden[:-1], states[:-1], strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    last = model.base_model.layernorm(states[-1])
    torch.testing.assert_close(model.base_model(build_images()).last_hidden_state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_and_eager_agree(family: str) -> None:
    logits = []
    for attention in ("sdpa", "eager"):
        model = reduced(family)
        model.set_attn_implementation(attention)
        logits.append(predict(model))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_changes_the_outputs(family: str) -> None:
    assert not torch.allclose(predict(reduced(family)), predict(build_vit(family)), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_parts_of_training_are_those_of_the_stock_block(family: str) -> None:
    name = "drop_path_rate" if family.startswith("dinov2") else "hidden_dropout_prob"
    logits = []
    for rates in ({}, {1: 63 / 64}):  # at this rate nothing is merged, but the block's code is ours
        model = reduced(family, rates, **{name: 0.5}).train()
        torch.manual_seed(0)
        logits.append(model(build_images()).logits)
    assert torch.equal(*logits)
    assert not torch.allclose(logits[0], predict(build_vit(family)), atol=1e-3)


def test_a_gated_mlp() -> None:
    options = {"use_swiglu_ffn": True}
    states = naive_features(build_vit("dinov2", **options), "dinov2", build_images(), RATES)
    model = reduced("dinov2", **options)
    last = model.dinov2.layernorm(states[-1])
    torch.testing.assert_close(model.dinov2(build_images()).last_hidden_state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_rate_one_is_dense(family: str) -> None:
    model = reduced(family, {0: 1.0, 3: 1})
    assert keep_rates_in_force(model) == {}
    assert torch.equal(predict(model), predict(build_vit(family)))


def test_adapter_with_keep_rate_one_is_dense() -> None:
    model = adapter(keep_rate=1.0)
    dense = adapter(token_layers=0)
    dense.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(predict(model), predict(dense))


def test_nothing_happens_where_one_token_would_be_merged() -> None:
    assert torch.equal(predict(reduced(rates={1: 63 / 64})), predict(build_vit()))
    assert not torch.equal(predict(reduced(rates={1: 62 / 64})), predict(build_vit()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    logits = predict(reduced().to(dtype), dtype=dtype)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), predict(reduced()), rtol=0.1, atol=0.3)


def test_samples_do_not_mix() -> None:
    model = reduced()
    both = predict(model)
    alone = model(build_images()[1:]).logits
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


# ---- what transformers offers ----


@pytest.mark.parametrize("make", [reduced, adapter])
def test_attentions_are_captured(make: Any) -> None:
    model = make()
    model.set_attn_implementation("eager") if hasattr(model, "set_attn_implementation") else None
    model.get_base_model().set_attn_implementation("eager") if hasattr(model, "get_base_model") else None
    outputs = model(build_images(), output_attentions=True, output_hidden_states=True)
    lengths = [state.shape[1] for state in outputs.hidden_states]
    assert len(lengths) == 5
    assert len(set(lengths)) > 1
    assert [a.shape for a in outputs.attentions] == [(2, 2, length, length) for length in lengths[:-1]]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [reduced, adapter])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing(use_reentrant: bool, make: Any) -> None:
    torch.manual_seed(0)
    model = make().train()
    data = LabelledImages(3).batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert all(block.gradient_checkpointing for block in blocks(model))
        model.zero_grad()
        pixel_values = data["pixel_values"].clone().requires_grad_()
        model(pixel_values, labels=data["labels"]).loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"x": pixel_values.grad}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_merged_token_carries_gradient() -> None:
    model = reduced(rates={0: 0.5}).train()
    pixel_values = build_images().requires_grad_()
    model(pixel_values).logits.sum().backward()
    patches = pixel_values.grad.abs().unfold(2, 4, 4).unfold(3, 4, 4).sum(dim=(1, 4, 5))
    assert (patches > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_interpolated_positions(family: str) -> None:
    model, pixel_values = reduced(family), build_images(image_size=48)
    states = model.base_model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
    counts = [144, 100 + 1, 45 + 1]
    assert [s.shape[1] - PREFIX[family] for s in states.hidden_states] == [counts[i] for i in (0, 1, 1, 2, 2)]


@pytest.mark.parametrize("make", [reduced, adapter])
def test_deepcopy_and_pickle(make: Any) -> None:
    model = make()
    expected = predict(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(predict(other), expected)
        set_token_selection(other, False)
        assert not torch.equal(predict(other), expected)
    assert torch.equal(predict(model), expected)


@pytest.mark.parametrize("family", ["deit", "dinov2_with_registers"])
@pytest.mark.parametrize("context", [nullcontext(), torch.device("cpu")], ids=["", "under a default device"])
def test_compiles_in_one_graph(family: str, context: Any) -> None:
    torch._dynamo.reset()
    model = adapter(build_vit(family, num_hidden_layers=2), token_layers=[0])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with context:
        torch.testing.assert_close(compiled(build_images()).logits, predict(model), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_selects_where_an_attention_was_compiled_before() -> None:
    model = build_vit()
    for block in model.vit.layers:
        block.attention = torch.compile(block.attention, backend="eager")
    expected = build_vit()
    for other in (model, expected):
        apply_token_selection(other, {1: 0.5})
    torch.testing.assert_close(model(build_images()).logits, expected(build_images()).logits)
    apply_token_selection(model, {})
    torch.testing.assert_close(model(build_images()).logits, build_vit()(build_images()).logits)


@pytest.mark.parametrize("dynamic", [None, True])
def test_trains_compiled_when_the_rate_changes(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    model = adapter(build_vit(num_hidden_layers=2), token_layers=[0]).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    for rate in (0.5, 0.3, 0.8):  # a second float in the same place would count as a variable
        install_keep_rates(model.base_model.model, "default", {0: rate})
        torch.testing.assert_close(compiled(build_images()).logits, predict(model), rtol=1e-4, atol=1e-5)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    model = Logits(adapter(build_vit(num_hidden_layers=2), token_layers=[0]))
    with torch.no_grad():
        program = torch.export.export(model, (build_images(),), strict=strict)
        torch.testing.assert_close(program.module()(build_images()), model(build_images()), rtol=1e-4, atol=1e-5)


def test_merged_adapter_exports() -> None:
    model = Logits(adapter(build_vit(num_hidden_layers=2), token_layers=[0]).merge_and_unload())
    with torch.no_grad():
        program = torch.export.export(model, (build_images(),), strict=False)
        torch.testing.assert_close(program.module()(build_images()), model(build_images()), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path: Path) -> None:
    model = Logits(adapter(build_vit(num_hidden_layers=2), token_layers=[0]).merge_and_unload()).eval()
    shapes = {"pixel_values": {0: "batch"}}
    path = tmp_path / "model.onnx"
    # With one image, torch 2.10 would make a graph for one image alone.
    torch.onnx.export(model, (build_images(2),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 3):
        (logits,) = session.run(None, {"pixel_values": build_images(count).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(logits), model(build_images(count)), rtol=1e-4, atol=1e-4)


# ---- masks ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_masks_are_refused(attention: str) -> None:
    model = reduced()
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match=r"`attention_mask`.*set_token_selection"):
        model.vit(build_images(), attention_mask=mask)
    set_token_selection(model, False)
    model.vit(build_images(), attention_mask=mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_without_padding_pass(attention: str) -> None:
    model = reduced()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        states = model.vit(build_images(), attention_mask=torch.ones(2, 65, dtype=torch.long)).last_hidden_state
        torch.testing.assert_close(states, model.vit(build_images()).last_hidden_state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_masks_are_refused_by_a_compiled_model(attention: str) -> None:
    torch._dynamo.reset()
    model = reduced(rates={0: 0.6}, num_hidden_layers=2)
    model.set_attn_implementation(attention)
    compiled = torch.compile(model.vit, backend="eager", fullgraph=True)
    mask = torch.ones(2, 65, dtype=torch.long)
    with torch.no_grad():
        states = compiled(build_images(), attention_mask=mask).last_hidden_state
        torch.testing.assert_close(states, model.vit(build_images()).last_hidden_state, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match=r"`attention_mask`.*set_token_selection"):
            compiled(build_images(), attention_mask=mask.index_fill(1, torch.tensor([64]), 0))


@pytest.mark.parametrize(
    ("attention", "mask"), [("sdpa", torch.ones(2, 1, 65, 65).bool()), ("eager", torch.zeros(2, 1, 65, 65))]
)
def test_masks_are_cut_to_the_tokens_left(attention: str, mask: Tensor) -> None:
    model = reduced()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        states = model.vit(build_images(), attention_mask=mask).last_hidden_state
        torch.testing.assert_close(states, model.vit(build_images()).last_hidden_state, rtol=1e-4, atol=1e-5)


# ---- which models, which rates ----


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("vit", ViTForMaskedImageModeling),
        ("deit", DeiTForMaskedImageModeling),
        ("dinov2", Dinov2Backbone),
        ("dinov2_with_registers", Dinov2WithRegistersBackbone),
    ],
)
def test_models_that_need_every_patch_are_refused(family: str, model_class: type[nn.Module]) -> None:
    model = build_vit(family, model_class=model_class)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="needs every patch"):
        apply_token_selection(model, {1: 0.5})
    with pytest.raises(ValueError, match=r"`token_layers`.*needs every patch"):
        get_peft_model(model, TRPTSConfig(token_layers=[1]))
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({1: 0.0}, "(0, 1]"),
        ({1: 1.5}, "(0, 1]"),
        ({1: float("nan")}, "(0, 1]"),
        ({1: True}, "(0, 1]"),
        ({1: "0.5"}, "(0, 1]"),
        ({-1: 0.5}, "block index"),
        ({"x": 0.5}, "block index"),
        ({"²": 0.5}, "block index"),
        ([0.5], "block index"),
        ({4: 0.5}, "below 4"),
        (None, "`keep_rates` must be given"),
    ],
)
def test_bad_rates_change_nothing(rates: Any, message: str) -> None:
    model, plain = reduced(), build_vit()
    for victim, expected in ((model, predict(model)), (plain, predict(plain))):
        if rates is None and victim is model:
            continue
        before = [type(m) for m in victim.modules()]
        with pytest.raises(ValueError, match="`keep_rates`") as error:
            apply_token_selection(victim, rates)
        assert message in str(error.value)
        assert torch.equal(predict(victim), expected)
        assert [type(m) for m in victim.modules()] == before


def test_models_outside_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match="vit, deit"):
        apply_token_selection(nn.Sequential(nn.Linear(2, 2)), {0: 0.5})


def test_models_with_an_adapter_are_refused() -> None:
    model = adapter()
    for victim in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="merge_and_unload"):
            apply_token_selection(victim, {0: 0.5})


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rates_restore_the_stock_model(family: str) -> None:
    model = reduced(family)
    apply_token_selection(model, {})
    assert_stock(model, family)
    assert not hasattr(model.config, "trpts_keep_rates")


def test_rates_are_replaced() -> None:
    model = reduced()
    apply_token_selection(model, {3: 0.9})
    assert keep_rates_in_force(model) == {3: 0.9}
    assert torch.equal(predict(model), predict(reduced(rates={3: 0.9})))


def test_a_bare_backbone_selects_too() -> None:
    model = build_vit(model_class=ViTModel)
    apply_token_selection(model, {0: 0.5})
    assert model(build_images()).last_hidden_state.shape[1] == 1 + 32 + 1


# ---- what others put around a block ----


def put_hooks(model: nn.Module) -> None:
    attach_execution_device_hook(model, "cpu")  # as for a model that is spread over devices


def select_tokens(model: nn.Module) -> None:
    apply_token_selection(model, RATES)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
@pytest.mark.parametrize(
    "steps",
    [
        (put_hooks, select_tokens),
        (select_tokens, put_hooks),
        (put_hooks, remove_hook_from_submodules, select_tokens),
        (select_tokens, put_hooks, remove_hook_from_submodules),
        (put_hooks, select_tokens, remove_hook_from_submodules),
    ],
)
def test_hooks_of_accelerate_may_come_and_go(family: str, steps: Any) -> None:
    model = build_vit(family)
    for step in steps:
        step(model)
    assert torch.equal(predict(model), predict(reduced(family)))
    apply_token_selection(model, {})
    assert torch.equal(predict(model), predict(build_vit(family)))


def compile_forward(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("part", ["", ".attention"])
def test_a_replaced_forward_is_refused(part: str) -> None:
    model = build_vit()
    compile_forward(model.get_submodule(f"vit.layers.2{part}"))
    expected = predict(model)
    for victim in (apply_token_selection, lambda model, rates: adapter(model, token_layers=list(rates))):
        with pytest.raises(ValueError, match=r"`(keep_rates|token_layers)` must be of blocks that run the `forward`"):
            victim(model, {0: 0.5, 2: 0.5})
    apply_token_selection(model, {})
    assert torch.equal(predict(model), expected)


def test_a_replaced_forward_that_no_selection_needs_is_none_of_its_business() -> None:
    model = build_vit()
    compile_forward(blocks(model)[0])
    compile_forward(blocks(model)[3].attention)
    apply_token_selection(model, {1: 0.5})
    assert torch.equal(predict(model), predict(reduced(rates={1: 0.5})))


@pytest.mark.parametrize("part", ["", ".attention"])
def test_a_replaced_forward_is_refused_before_anything_is_measured(part: str) -> None:
    base = build_vit()
    compile_forward(base.get_submodule(f"vit.layers.0{part}"))
    model = get_peft_model(base, TRPTSConfig(modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match="`token_layers` must be of blocks that run the `forward`"):
        calibrate(model, [None])


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload", "delete_adapter"])
def test_a_forward_replaced_afterwards_goes_on(leave: str) -> None:
    model = adapter()
    for block in blocks(model):
        compile_forward(block)
        compile_forward(block.attention)
    expected = predict(model) if leave == "merge_and_unload" else predict(build_vit())
    left = model.delete_adapter("default") if leave == "delete_adapter" else getattr(model, leave)()
    torch.testing.assert_close(predict(left or model.base_model.model), expected, rtol=1e-4, atol=1e-5)
    if leave == "merge_and_unload":
        apply_token_selection(left, {1: 0.3})
        assert keep_rates_in_force(left) == {1: 0.3}


# ---- classes, names, state ----


def assert_stock(model: nn.Module, family: str = "vit") -> None:
    stock = build_vit(family)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in stock.named_modules()}
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(predict(model), predict(stock))


@pytest.mark.parametrize("family", FAMILIES)
def test_class_names_and_types_stay(family: str) -> None:
    model = reduced(family)
    layer_class, attention_class = STOCK[family]
    for block in blocks(model):
        assert isinstance(block, layer_class)
        assert isinstance(block.attention, attention_class)
        assert type(block).__name__ == layer_class.__name__
        assert type(block.attention).__name__ == attention_class.__name__
    assert model.state_dict().keys() == build_vit(family).state_dict().keys()


def test_blocks_before_the_first_stay_stock() -> None:
    classes = [type(block) is modeling_vit.ViTLayer for block in blocks(reduced(rates={2: 0.5}))]
    assert classes == [True, True, False, False]


def test_only_selecting_blocks_have_the_child() -> None:
    assert [hasattr(block, "token_selection") for block in blocks(reduced())] == [True, False, True, False]
    assert [hasattr(block, "token_selection") for block in blocks(adapter())] == [False, True, False, False]


def test_disabling_gives_stock_outputs() -> None:
    model = adapter()
    before = predict(model)
    with model.disable_adapter():
        assert torch.equal(predict(model), predict(build_vit()))
    assert torch.equal(predict(model), before)


def test_switching_to_an_adapter_without_tokens_is_dense() -> None:
    model = adapter()
    model.add_adapter("dense", TRPTSConfig(token_layers=0))
    before = predict(model)
    model.set_adapter("dense")
    assert keep_rates_in_force(model) == {}
    torch.testing.assert_close(predict(model), predict(build_vit()), rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_restores_the_stock_model(family: str) -> None:
    model = adapter(build_vit(family))
    base = model.unload()
    assert_stock(base, family)
    assert not hasattr(base.config, "trpts_keep_rates")


@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_deleting_restores_the_stock_blocks() -> None:
    model = adapter(token_layers=[0, 1])
    model.add_adapter("late", TRPTSConfig(token_layers=[2], keep_rate=0.5))
    model.delete_adapter("default")
    assert [type(block) is modeling_vit.ViTLayer for block in blocks(model)] == [True, True, False, False]
    assert keep_rates_in_force(model) == {2: 0.5}


def test_disagreeing_adapters_are_refused_in_forward() -> None:
    """However they were activated."""
    model = adapter()
    model.add_adapter("late", TRPTSConfig(token_layers=[2], keep_rate=0.5))
    for module in model.modules():
        if hasattr(module, "_active_adapter"):
            module._active_adapter = ["default", "late"]
    with pytest.raises(ValueError, match="alike"):
        predict(model)


def test_new_token_layers_know_the_other_adapters() -> None:
    """A block that gets its first token layer from a second adapter leaves the first one dense there."""
    model = adapter()
    before = predict(model)
    model.add_adapter("late", TRPTSConfig(token_layers=[2], keep_rate=0.5))
    assert torch.equal(predict(model), before)
    with model.disable_adapter():
        model.add_adapter("later", TRPTSConfig(token_layers=[3], keep_rate=0.5))
        assert torch.equal(predict(model), predict(build_vit()))
    assert torch.equal(predict(model), before)


# ---- switching it off ----


@pytest.mark.parametrize("make", [reduced, adapter])
def test_set_token_selection(make: Any) -> None:
    model = make()
    before = predict(model)
    set_token_selection(model, False)
    assert keep_rates_in_force(model) == {}
    dense = predict(model)
    assert not torch.equal(dense, before)
    if make is reduced:
        assert torch.equal(dense, predict(build_vit()))
    set_token_selection(model, True)
    assert torch.equal(predict(model), before)


def test_adapters_that_select_differently_go_together_with_all_tokens() -> None:
    """Active together or merged; they have to part before tokens are selected again."""
    model = get_peft_model(build_vit(), TRPTSConfig(token_layers=[1], keep_rate=0.5, init_weights=False))
    model.add_adapter("other", TRPTSConfig(token_layers=[2], keep_rate=0.5, init_weights=False))
    tuner, both = model.base_model, ["default", "other"]
    model.eval()
    with pytest.raises(ValueError, match="alike"):
        tuner.set_adapter(both)
    set_token_selection(model, False)
    tuner.set_adapter(both)
    with torch.no_grad():
        logits = model(build_images()).logits
        with pytest.raises(ValueError, match="alike"):
            set_token_selection(model, True)
        assert torch.equal(model(build_images()).logits, logits)
        model.merge_adapter(both)
        for name, part in model.named_modules():
            if name.endswith("token_selection"):
                part._active_adapter = ["other"]  # merged adapters are in force, whichever is active
        torch.testing.assert_close(model(build_images()).logits, logits)
        with pytest.raises(ValueError, match="alike"):
            set_token_selection(model, True)
        model.unmerge_adapter()
        tuner.set_adapter("other")
        set_token_selection(model, True)
        assert not torch.allclose(model(build_images()).logits, logits)
        set_token_selection(model, False)
        tuner.set_adapter(both)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(build_images()).logits, logits)
    assert keep_rates_in_force(merged) == {}


def test_set_token_selection_without_any() -> None:
    with pytest.raises(ValueError, match="apply_token_selection"):
        set_token_selection(build_vit(), True)
    set_token_selection(build_vit(), False)


def test_a_token_layer_added_later_is_switched_off_too() -> None:
    model = adapter()
    set_token_selection(model, False)
    model.add_adapter("late", TRPTSConfig(token_layers=[2], keep_rate=0.5))
    model.set_adapter("late")
    assert keep_rates_in_force(model) == {}


def test_switched_off_selection_stays_off_after_merging() -> None:
    model = adapter()
    set_token_selection(model, False)
    before = predict(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(predict(merged), before, rtol=1e-4, atol=1e-5)


# ---- rates that travel with the config ----


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_travel_with_a_merged_model(tmp_path: Path, family: str) -> None:
    merged = adapter(build_vit(family)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["trpts_keep_rates"] == {"1": 0.5}
    loaded = type(merged).from_pretrained(tmp_path)
    assert token_selections(loaded) == {}
    apply_token_selection(loaded)
    assert keep_rates_in_force(loaded) == {1: 0.5}
    assert torch.equal(predict(loaded), predict(merged))


def test_a_plain_reduced_model_travels(tmp_path: Path) -> None:
    model = reduced()
    model.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    apply_token_selection(loaded)
    assert torch.equal(predict(loaded), predict(model))


def test_the_record_of_a_rate_stays_where_the_blocks_have_no_entries() -> None:
    model = adapter()
    selection = token_selections(model.get_base_model())[1]
    model.vit.layers[0].to("meta")  # as accelerate's offloading leaves it
    selection._move_adapter_to_device_of_base_layer("default")
    assert int(selection.trpts_keep_ppm["default"]) == 500_000
