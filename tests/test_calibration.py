"""`calibrate`: what it decides, what it writes, and that an error changes nothing."""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from conftest import LabelledImages, build_images, build_vit
from trpts_peft import (
    FisherScores,
    Selection,
    TRPTSConfig,
    apply_token_selection,
    calibrate,
    estimate_fisher,
    select,
    set_token_selection,
)
from trpts_peft.layer import TRPTSLinear
from trpts_peft.vit import keep_rates_in_force

DATA = LabelledImages(13)
QUIET: dict[str, Any] = {"progress": False}


def adapter(base: nn.Module | None = None, **options: Any) -> PeftModel:
    defaults: dict[str, Any] = {"modules_to_save": ["classifier"], "keep_rate": 0.5, "top_percent": 5}
    return get_peft_model(base or build_vit(), TRPTSConfig(**{**defaults, **options}))


def state_of(model: Any) -> dict[str, Any]:
    configs = {name: copy.deepcopy(config.to_dict()) for name, config in model.peft_config.items()}
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "configs": configs,
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
    }


def assert_unchanged(before: dict[str, Any], model: Any) -> None:
    after = state_of(model)
    assert before["tensors"].keys() == after["tensors"].keys()
    # Compared as bytes, since some of them are not a number.
    changed = [n for n, t in before["tensors"].items() if t.numpy().tobytes() != after["tensors"][n].numpy().tobytes()]
    assert changed == []
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key


def assert_equal(one: Selection, other: Selection) -> None:
    assert one.connections == other.connections
    assert one.token_layers == other.token_layers
    assert one.importance == other.importance
    assert [name for name in one.columns if not torch.equal(one.columns[name], other.columns[name])] == []


def naive_fisher(
    model: nn.Module, names: list[str], data: Dataset[Any], *, mean_gradient: bool = False
) -> dict[str, Tensor]:
    """One sample, one backward pass at a time."""
    model.requires_grad_(True)
    weights = [model.get_submodule(name).weight for name in names]
    total = [torch.zeros_like(weight) for weight in weights]
    for sample in (data[i] for i in range(len(data))):
        loss = F.cross_entropy(model(sample["pixel_values"][None]).logits, sample["labels"][None])
        for sums, grad in zip(total, torch.autograd.grad(loss, weights), strict=True):
            sums += grad if mean_gradient else grad.square()
    return {name: (sums / len(data)).abs() for name, sums in zip(names, total, strict=True)}


# ---- what it decides ----


def test_selection_is_that_of_a_naive_fisher() -> None:
    model = adapter()
    selection = calibrate(model, DATA, **QUIET)
    base = build_vit()
    head = model.base_model.model.classifier.modules_to_save["default"]
    base.classifier.load_state_dict(head.state_dict())
    scores = naive_fisher(base, list(selection.columns), DATA)
    measured = estimate_fisher(base, DATA, **QUIET)
    for name, score in scores.items():
        torch.testing.assert_close(measured[name], score, rtol=1e-4, atol=1e-4 * float(score.max()))
    assert_equal(selection, select(measured, model.peft_config["default"], base))


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_selection_does_not_depend_on_batch_size(batch_size: int, family: str) -> None:
    one, other = adapter(build_vit(family)), adapter(build_vit(family))
    first = calibrate(one, DATA, batch_size=4, **QUIET)
    assert_equal(first, calibrate(other, DATA, batch_size=batch_size, **QUIET))
    heads = [model.base_model.model.classifier.modules_to_save["default"].weight for model in (one, other)]
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(DATA, batch_size=5),
        lambda: DataLoader(DATA, batch_size=3, shuffle=True),
        lambda: DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True),
        lambda: [DATA[i] for i in range(13)],
    ],
    ids=["loader", "shuffled", "dropping the last", "list"],
)
def test_selection_does_not_depend_on_the_way_data_comes(loader: Any) -> None:
    assert_equal(calibrate(adapter(), DATA, **QUIET), calibrate(adapter(), loader(), **QUIET))


def test_workspace_does_not_change_the_selection() -> None:
    assert_equal(calibrate(adapter(), DATA, **QUIET), calibrate(adapter(), DATA, workspace_mb=0.01, **QUIET))


def test_an_adapter_without_a_head_is_calibrated_with_the_bases_whichever_is_active() -> None:
    selections = []
    for active in ("default", "second"):
        model = adapter()
        model.base_model.model.classifier.modules_to_save["default"].weight.data.normal_()
        model.add_adapter("second", TRPTSConfig(token_layers=0))
        model.set_adapter(active)
        selections.append(calibrate(model, DATA, adapter_name="second", probe_head=False, **QUIET))
    assert_equal(*selections)


def test_selection_is_of_the_base_whatever_the_adapter_holds() -> None:
    """Neither an update nor a token selection in force takes part in the measurement."""
    model = adapter(token_layers=[0, 1], keep_rate=0.2)
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_()
    selection = calibrate(model, DATA, overwrite=True, **QUIET)
    assert_equal(selection, calibrate(adapter(token_layers=[0, 1], keep_rate=0.2), DATA, **QUIET))


def drawn(size: int, count: int) -> list[int]:
    """Which samples `num_samples` takes."""
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].tolist())


def test_num_samples_are_drawn_from_the_data() -> None:
    subset = [DATA[i] for i in drawn(len(DATA), 5)]
    assert_equal(calibrate(adapter(), DATA, num_samples=5, **QUIET), calibrate(adapter(), subset, **QUIET))


def test_gradient_importance_is_the_mean_gradient() -> None:
    model = adapter(importance="gradient", min_connections=2, max_connections=2)
    selection = calibrate(model, DATA, probe_head=False, **QUIET)
    scores = naive_fisher(build_vit(), list(selection.columns), DATA, mean_gradient=True)
    for name, score in scores.items():
        assert torch.equal(selection.columns[name], score.topk(2, dim=1).indices.sort(dim=1).values)


def test_magnitude_needs_no_data() -> None:
    model = adapter(importance="magnitude", min_connections=2, max_connections=2)
    selection = calibrate(model, None, probe_head=False, **QUIET)
    for name, columns in selection.columns.items():
        weight = build_vit().get_submodule(name).weight
        assert torch.equal(columns, weight.abs().topk(2, dim=1).indices.sort(dim=1).values)


def test_random_importance_follows_the_seed() -> None:
    runs = [calibrate(adapter(importance="random", seed=s), None, probe_head=False, **QUIET) for s in (1, 1, 2)]
    assert_equal(runs[0], runs[1])
    assert any(not torch.equal(runs[0].columns[n], runs[2].columns[n]) for n in runs[0].columns)
    model = adapter(importance="random", seed=1)
    with torch.device("meta"):  # the default device is not where it is drawn
        assert_equal(runs[0], calibrate(model, None, probe_head=False, **QUIET))


def test_given_scores_are_used() -> None:
    model = adapter()
    scores = FisherScores({n: torch.rand(s) for n, s in shapes_of(model).items()}, 1)
    selection = calibrate(model, None, scores=scores, probe_head=False, **QUIET)
    assert_equal(selection, select(scores, TRPTSConfig(keep_rate=0.5, top_percent=5), build_vit()))


def shapes_of(model: PeftModel) -> dict[str, torch.Size]:
    base = build_vit()
    names = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "trpts_values")]
    return {name: base.get_submodule(name).weight.shape for name in names if name.startswith("vit")}


def test_sampled_labels_are_the_same_each_time() -> None:
    runs = [calibrate(adapter(), DATA, labels="model", **QUIET) for _ in range(2)]
    assert_equal(*runs)


def test_own_loss() -> None:
    loss = lambda outputs, labels: F.cross_entropy(outputs.logits, labels, reduction="none")  # noqa: E731
    assert_equal(calibrate(adapter(), DATA, loss_fn=loss, **QUIET), calibrate(adapter(), DATA, **QUIET))


def test_without_probe_the_adapters_own_head_predicts() -> None:
    model = adapter()
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.weight.data.normal_()
    base = build_vit()
    base.classifier.load_state_dict(head.state_dict())
    selection = calibrate(model, DATA, probe_head=False, **QUIET)
    assert_equal(selection, calibrate(adapter(base), DATA, probe_head=False, **QUIET))


@pytest.mark.parametrize("active", ["default", "second"])
def test_modules_trained_whole_are_the_adapters_own_whichever_is_active(active: str) -> None:
    """Not the other adapter's, which this one would never run with."""
    model = adapter(modules_to_save=["classifier", "layernorm"])
    model.base_model.model.vit.layernorm.modules_to_save["default"].weight.data.normal_()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    norm = model.base_model.model.vit.layernorm.modules_to_save["second"]
    norm.weight.data.uniform_(0.5, 2)
    base = build_vit()
    base.vit.layernorm.load_state_dict(norm.state_dict())
    model.set_adapter(active)
    before = state_of(model)
    with torch.no_grad():
        logits = model(build_images()).logits
    selection = calibrate(model, DATA, adapter_name="second", **QUIET)
    expected = adapter(base)
    assert_equal(selection, calibrate(expected, DATA, **QUIET))
    heads = [m.base_model.model.classifier.modules_to_save[n] for m, n in ((model, "second"), (expected, "default"))]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert torch.equal(norm.weight, before["tensors"]["base_model.model.vit.layernorm.modules_to_save.second.weight"])
    if active == "default":
        with torch.no_grad():
            assert torch.equal(model(build_images()).logits, logits)


def test_modules_trained_whole_are_the_adapters_own_while_adapters_are_off() -> None:
    selections = []
    for off in (False, True):
        model = adapter(modules_to_save=["classifier", "layernorm"])
        model.base_model.model.vit.layernorm.modules_to_save["default"].weight.data[:8] = 3
        with model.disable_adapter() if off else nullcontext():
            selections.append(calibrate(model, DATA, **QUIET))
            with torch.no_grad():
                assert torch.equal(model(build_images()).logits, build_vit()(build_images()).logits) == off
    assert_equal(*selections)


class HeldHead(nn.Module):
    """A head as some of timm's: the linear is a part of it, and there is another one of that name further in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.pre_logits = nn.Linear(16, 3), nn.ModuleDict({"fc": nn.Linear(32, 16)})

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.fc(self.pre_logits["fc"](features).tanh())
        return out


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_may_hold_its_linear(trained: bool) -> None:
    base = build_vit()
    base.classifier = HeldHead()
    plain = base.classifier.fc.weight.clone()
    model = adapter(base, modules_to_save=["classifier"] if trained else None)
    model.add_adapter("other", TRPTSConfig(modules_to_save=["classifier"], token_layers=0))
    with nullcontext() if trained else pytest.warns(UserWarning, match=r"modules_to_save=\['fc'\]"):
        calibrate(model, DATA, adapter_name="default", **QUIET)
    wrapper = model.base_model.model.classifier
    assert torch.equal(wrapper.original_module.fc.weight, plain)
    for held in wrapper.modules_to_save.values():
        assert torch.equal(held.pre_logits["fc"].weight, base.classifier.original_module.pre_logits["fc"].weight)
    assert torch.equal(wrapper.modules_to_save["other"].fc.weight, plain)
    if trained:
        assert not torch.equal(wrapper.modules_to_save["default"].fc.weight, plain)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


class Neck(nn.Module):
    """A linear of a head's name that is none: what it gives goes through a cosine classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_vit().vit
        self.fc = nn.Linear(32, 3)
        self.classes = nn.Parameter(torch.randn(3, 3))

    def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
        features = self.fc(self.backbone(pixel_values=pixel_values).last_hidden_state[:, 0])
        return SequenceClassifierOutput(logits=F.linear(F.normalize(features), F.normalize(self.classes)))


def headed(head: nn.Module) -> nn.Module:
    base = build_vit()
    base.classifier = head
    return base


@pytest.mark.parametrize(
    ("make", "trained", "message"),
    [
        (Neck, "fc", "got fc, whose output is not what the model returns"),
        (lambda: headed(Cosine(32, 3)), "classifier", "got classifier, which does more"),
        (
            lambda: headed(nn.utils.parametrizations.weight_norm(nn.Linear(32, 3))),
            "classifier",
            "whose weight is computed",
        ),
    ],
)
def test_a_linear_that_does_not_predict_is_no_head(make: Any, trained: str, message: str) -> None:
    model = adapter(make(), modules_to_save=[trained], target_modules=["q_proj"], token_layers=0)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"`probe_head` must be False .*{message}"):
        calibrate(model, DATA, **QUIET)
    assert_unchanged(before, model)
    calibrate(model, DATA, probe_head=False, **QUIET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_that_rounds_predicts(dtype: torch.dtype) -> None:
    model = adapter(build_vit().to(dtype), token_layers=0)
    calibrate(model, DATA, **QUIET)
    assert model.base_model.model.classifier.modules_to_save["default"].weight.isfinite().all()


def test_the_head_of_a_model_that_casts_for_itself_predicts() -> None:
    class Casts(nn.Module):
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.vit = build_vit()

        def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.vit(pixel_values).logits
            return SequenceClassifierOutput(logits=logits.double().log_softmax(dim=1))

    model = adapter(Casts(), target_modules=["fc1"], token_layers=0)
    before = model.base_model.model.vit.classifier.modules_to_save["default"].weight.clone()
    calibrate(model, DATA, **QUIET)
    assert not torch.equal(model.base_model.model.vit.classifier.modules_to_save["default"].weight, before)


def test_a_trained_linear_before_the_head_is_passed_over() -> None:
    class Embedded(Neck):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(3, 3)

        def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
            tokens = self.backbone(pixel_values=pixel_values).last_hidden_state[:, 0]
            return SequenceClassifierOutput(logits=self.classifier(self.fc(tokens).tanh()))

    model = adapter(Embedded(), modules_to_save=["fc"], target_modules=["q_proj"], token_layers=0)
    neck = model.base_model.model.fc.modules_to_save["default"].weight.clone()
    with pytest.warns(UserWarning, match="The head 'classifier' is not trained"):
        calibrate(model, DATA, **QUIET)
    assert torch.equal(model.base_model.model.fc.modules_to_save["default"].weight, neck)


@pytest.mark.parametrize("name", ["fc", "classifier"])
def test_a_head_of_zeros_is_looked_at_too(name: str) -> None:
    base = Neck() if name == "fc" else headed(nn.Linear(32, 3))
    nn.init.zeros_(getattr(base, name).weight)
    nn.init.zeros_(getattr(base, name).bias)
    model = adapter(base, modules_to_save=[name], target_modules=["q_proj"], token_layers=0)
    with nullcontext() if name == "classifier" else pytest.raises(ValueError, match="not what the model returns"):
        calibrate(model, DATA, **QUIET)


def test_a_probe_is_not_lost_in_a_head_that_is_offloaded() -> None:
    model = adapter(token_layers=0)
    cpu_offload(model.base_model.model.classifier.modules_to_save["default"])
    with pytest.raises(ValueError, match=r"got classifier, whose weight is .* offloaded"):
        calibrate(model, DATA, **QUIET)


def test_a_head_that_the_model_does_not_call_is_named() -> None:
    base = Neck()
    base.score = nn.Linear(32, 3)
    model = adapter(base, modules_to_save=["score"], target_modules=["q_proj"], token_layers=0)
    with pytest.raises(ValueError, match="got score, which the model does not call"):
        calibrate(model, DATA, **QUIET)


class Distillation(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, as_tensor: bool = False) -> None:
        super().__init__()
        self.student, self.teacher, self.as_tensor = build_vit(), build_vit(), as_tensor

    def forward(self, pixel_values: Tensor) -> Any:
        self.teacher(pixel_values)
        outputs = self.student(pixel_values)
        return outputs.logits if self.as_tensor else outputs


@pytest.mark.parametrize("as_tensor", [True, False])  # whether nothing tells whose output the logits are
def test_of_several_heads_it_is_the_one_that_trains(as_tensor: bool) -> None:
    targets = {"target_modules": ["fc1"], "exclude_modules": r"teacher\..*", "token_layers": 1}
    model = adapter(Distillation(as_tensor), modules_to_save=["student.classifier"], **targets)
    loss = (lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none")) if as_tensor else None
    selection = calibrate(model, DATA, loss_fn=loss, **QUIET)
    head = model.base_model.model.student.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert selection.speedup is None and "predicted" not in selection.summary()  # which ViT runs how often is unknown


def test_adapters_that_are_active_together_go_on_selecting_alike() -> None:
    model = adapter(token_layers=0, modules_to_save=None)
    model.add_adapter("b", TRPTSConfig(token_layers=2, keep_rate=0.5, importance="magnitude"))
    model.base_model.set_adapter(["default", "b"])
    before = state_of(model)
    with pytest.raises(ValueError, match=r"must be those of \['default'\], .* got the rate 0\.5 in block"):
        calibrate(model, None, adapter_name="b", probe_head=False, **QUIET)
    assert_unchanged(before, model)
    model.set_adapter("b")
    calibrate(model, None, probe_head=False, **QUIET)


def test_with_all_tokens_adapters_go_together_whatever_they_select() -> None:
    model = adapter(token_layers=[1], modules_to_save=None)
    model.add_adapter("b", TRPTSConfig(token_layers=[2], keep_rate=0.5, importance="magnitude"))
    set_token_selection(model, False)
    model.base_model.set_adapter(["default", "b"])
    calibrate(model, None, adapter_name="b", probe_head=False, **QUIET)
    assert model.peft_config["b"].selected_token_layers == [2]


def test_a_model_around_a_peft_model_is_told_what_to_calibrate() -> None:
    outer = nn.Module()
    outer.backbone = adapter()
    with pytest.raises(ValueError, match=r"pass `model\.backbone`"):
        calibrate(outer, DATA, **QUIET)


# ---- what it writes ----


def test_result_is_installed() -> None:
    model = adapter(min_connections=2)
    selection = calibrate(model, DATA, **QUIET)
    config = model.peft_config["default"]
    assert config.connections == selection.connections
    assert config.selected_token_layers == list(selection.token_layers)
    assert config.unit_importance == selection.importance
    assert keep_rates_in_force(model.get_base_model()) == dict.fromkeys(selection.token_layers, 0.5)
    for name, columns in selection.columns.items():
        layer = model.get_base_model().get_submodule(name)
        assert torch.equal(layer.trpts_columns["default"], columns)
        assert not layer.trpts_values["default"].any()
        assert layer.trpts_values["default"].requires_grad


def test_the_base_is_never_written() -> None:
    base = build_vit()
    calibrate(adapter(base), DATA, **QUIET)
    state = base.state_dict()
    for name, tensor in build_vit().state_dict().items():
        key = name.replace("classifier", "classifier.original_module")
        for part in ("weight", "bias"):
            own = key.replace(f".{part}", f".base_layer.{part}")
            key = own if own in state else key
        assert torch.equal(state[key], tensor), name


def test_of_what_the_head_sees_no_more_is_kept_than_it_reads() -> None:
    """A ViT hands it the class token as a view of all tokens."""
    model, seen = adapter(), []
    base = model.get_base_model()
    base.register_forward_pre_hook(lambda *_: pytest.fail("kept") if any(not s.expired() for s in seen) else None)
    base.vit.layernorm.register_forward_hook(
        lambda _module, _args, output: seen.append(StorageWeakRef(output.untyped_storage()))
    )
    calibrate(model, DATA, **QUIET, batch_size=5)
    assert len(seen) > 2  # of more than one batch in each pass over the data


def test_probe_is_written_to_the_adapters_head() -> None:
    model = adapter()
    calibrate(model, DATA, **QUIET)
    head = model.base_model.model.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    with model.disable_adapter(), torch.no_grad():
        features = model.base_model.model.vit(DATA.pixel_values).last_hidden_state[:, 0]
    accuracy = (head.modules_to_save["default"](features).argmax(1) == DATA.labels).float().mean()
    assert accuracy > 0.8


def test_without_trainable_head_it_warns_and_restores() -> None:
    model = adapter(modules_to_save=None)
    base_head = copy.deepcopy(model.base_model.model.classifier.state_dict())
    with pytest.warns(UserWarning, match="modules_to_save") as record:
        selection = calibrate(model, DATA, **QUIET)
    assert len(record) == 1
    assert all(torch.equal(t, base_head[n]) for n, t in model.base_model.model.classifier.state_dict().items())
    assert_equal(selection, calibrate(adapter(), DATA, **QUIET))


def test_the_callers_config_holds_no_results() -> None:
    config = TRPTSConfig(keep_rate=0.5)
    model = get_peft_model(build_vit(), config)
    calibrate(model, DATA, probe_head=False, **QUIET)
    assert config.connections is None
    assert config.selected_token_layers is None
    assert model.peft_config["default"] is not config
    assert model.get_base_model().peft_config["default"] is model.peft_config["default"]


def test_flags_and_modes_are_restored() -> None:
    model = adapter().train()
    model.base_model.model.vit.layers[2].eval()
    before = state_of(model)
    calibrate(model, DATA, **QUIET)
    after = state_of(model)
    for key in ("trainable", "hooks", "training"):
        same = {name: value for name, value in after[key].items() if "token_selection" not in name}
        assert {name: before[key][name] for name in same} == same
    assert all(p.grad is None for p in model.parameters())


def test_summary_is_printed_only_with_progress(capsys: pytest.CaptureFixture[str]) -> None:
    selection = calibrate(adapter(), DATA, progress=True)
    head, _, table = capsys.readouterr().out.partition("\n")
    assert head.startswith("fitted head: accuracy ") and table == f"{selection.summary()}\n"
    calibrate(adapter(), LabelledImages(4), progress=True)  # too few to hold one out of each class
    assert capsys.readouterr().out.partition("\n")[0].endswith(" % on its data")
    with pytest.warns(UserWarning, match="not trained"):
        calibrate(adapter(modules_to_save=None), DATA, progress=True)
    calibrate(adapter(), DATA, probe_head=False, progress=True)
    assert "fitted head" not in capsys.readouterr().out
    calibrate(adapter(), DATA, progress=False)
    assert capsys.readouterr().out == ""


def test_the_log_says_what_the_probe_reached(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="trpts_peft")
    with pytest.warns(UserWarning, match="not trained"):  # and so it is not printed
        calibrate(adapter(modules_to_save=None), DATA, **QUIET)
    (line,) = [record.getMessage() for record in caplog.records if "held-out loss" in record.getMessage()]
    assert re.fullmatch(
        r"fitted head: accuracy [\d.]+ % on its data, [\d.]+ % held out, strength [\d.e-]+, held-out loss [\d.]+", line
    )


def test_a_default_dtype_changes_nothing_that_is_drawn() -> None:
    one, other = (adapter(importance="random") for _ in range(2))
    expected = calibrate(one, None, probe_head=False, progress=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        selection = calibrate(other, None, probe_head=False, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(columns, expected.columns[name]) for name, columns in selection.columns.items())


def test_an_optimizer_made_before_trains_what_is_there_now() -> None:
    model = adapter(min_connections=2).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    held = model(**{"pixel_values": build_images(), "labels": torch.tensor([0, 1])})  # and with it autograd's graph
    held.loss.backward(retain_graph=True)
    selection = calibrate(model, DATA, **QUIET)
    optimizer.step()  # of gradients of what was there before: nothing
    assert not any(layer.is_trained("default") for layer in model.modules() if isinstance(layer, TRPTSLinear))
    model(**{"pixel_values": build_images(), "labels": torch.tensor([0, 1])}).loss.backward()
    optimizer.step()
    for name in selection.columns:
        layer = model.get_base_model().get_submodule(name)
        assert layer.is_trained("default") and layer.trpts_bias["default"].any()


def test_calibrated_model_trains() -> None:
    model = adapter().train()
    calibrate(model, DATA, **QUIET)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = model(**DATA.batch()).loss.item()
    for _ in range(5):
        loss = model(**DATA.batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(**DATA.batch()).loss.item() < before


def test_other_adapters_are_left_alone() -> None:
    model = adapter(token_layers=0)
    model.add_adapter("second", TRPTSConfig(token_layers=0, importance="random"))
    before = {n: t.clone() for n, t in model.state_dict().items() if ".default" in n}
    calibrate(model, None, adapter_name="second", probe_head=False, **QUIET)
    after = model.state_dict()
    assert [n for n, t in before.items() if not torch.equal(after[n], t)] == []
    assert model.peft_config["default"].connections is None


def test_inject_adapter_in_model() -> None:
    base = build_vit()
    inject_adapter_in_model(TRPTSConfig(keep_rate=0.5, top_percent=5, modules_to_save=["classifier"]), base)
    selection = calibrate(base, DATA, **QUIET)
    assert_equal(selection, calibrate(adapter(), DATA, **QUIET))
    assert base.peft_config["default"].connections == selection.connections


# ---- models outside the table ----


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        pooled = F.adaptive_avg_pool2d(pixel_values, 4)
        return SequenceClassifierOutput(logits=self.head(torch.relu(self.body(pooled))))


@pytest.mark.parametrize("token_layers", [3, 0])
def test_mlp_selects_parameters_only(token_layers: int, caplog: pytest.LogCaptureFixture) -> None:
    config = TRPTSConfig(target_modules=["body.1", "body.3"], modules_to_save=["head"], token_layers=token_layers)
    model = get_peft_model(MLP(), config)
    selection = calibrate(model, DATA, **QUIET)
    assert ("MLP is of no family in which tokens can be selected" in caplog.text) == bool(token_layers)
    assert selection.token_layers == ()
    assert set(selection.columns) == {"body.1", "body.3"}
    assert "none" in selection.summary()


def test_explicit_token_layers_outside_the_table_are_refused() -> None:
    base = MLP()
    with pytest.raises(ValueError, match="`token_layers`"):
        get_peft_model(base, TRPTSConfig(target_modules=["body.1"], token_layers=[1]))
    assert type(base.body[1]) is nn.Linear


def test_bert_selects_parameters_only() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes))
    data = [{"input_ids": torch.randint(20, (6,)), "labels": i % 3} for i in range(7)]
    config = TRPTSConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    selection = calibrate(model, data, **QUIET)
    assert len(selection.columns) == 4
    assert selection.token_layers == ()


# ---- errors change nothing ----


def test_second_call_raises() -> None:
    model = adapter()
    calibrate(model, DATA, **QUIET)
    before = state_of(model)
    with pytest.raises(ValueError, match="`overwrite`"):
        calibrate(model, DATA, **QUIET)
    assert_unchanged(before, model)
    calibrate(model, DATA, overwrite=True, **QUIET)


def test_overwriting_starts_anew() -> None:
    model = adapter(token_layers=1)
    calibrate(model, DATA, **QUIET)
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_()
    selection = calibrate(model, LabelledImages(20, seed=4), overwrite=True, **QUIET)
    assert_equal(selection, calibrate(adapter(token_layers=1), LabelledImages(20, seed=4), **QUIET))
    assert not any(m.is_trained("default") for m in model.modules() if hasattr(m, "is_trained"))


def test_loaded_adapter_is_not_calibrated_again(tmp_path: Any) -> None:
    model = get_peft_model(build_vit(), TRPTSConfig(keep_rate=0.5))
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_vit(), tmp_path, is_trainable=True)
    before = state_of(loaded)
    with pytest.raises(ValueError, match="`overwrite`"):
        calibrate(loaded, DATA, probe_head=False, **QUIET)
    assert_unchanged(before, loaded)


def without(key: str) -> list[dict[str, Tensor]]:
    return [{k: v for k, v in DATA[i].items() if k != key} for i in range(4)]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no samples": ([], {}, "at least one sample"),
    "no samples in a loader": (DataLoader([], batch_size=2), {}, "at least one sample"),
    "no pixel values": (without("pixel_values"), {}, "`pixel_values`"),
    "no labels": (without("labels"), {}, "`labels`"),
    "no pixel values, loader": (DataLoader(without("pixel_values")), {}, "`pixel_values`"),
    "no labels, loader": (DataLoader(without("labels")), {}, "`labels`"),
    "label above the head": (LabelledImages(5, num_labels=4), {}, "0 to 2"),
    "label above the head, no probe": (LabelledImages(5, num_labels=4), {"probe_head": False}, "0 to 2"),
    "label of no class": ([{**DATA[0], "labels": torch.tensor(0.7)}], {}, "`probe_head=False`"),
    "several labels": ([{**DATA[0], "labels": torch.tensor([0, 1, 0])}], {}, r"one whole number .* \(1, 3\)"),
    "several labels, no probe": (
        [{**DATA[0], "labels": torch.tensor([0, 1, 0])}],
        {"probe_head": False},
        r"one whole number .* \(1, 3\)",
    ),
    "label below zero": ([{**DATA[0], "labels": torch.tensor(-1)}], {}, "0 to 2"),
    "no data": (None, {}, "`data`"),
    "batch size": (DATA, {"batch_size": 0}, "`batch_size`"),
    "num_samples": (DATA, {"num_samples": 0}, "`num_samples`"),
    "labels": (DATA, {"labels": "mine"}, "`labels`"),
    "adapter": (DATA, {"adapter_name": "other"}, "`adapter_name`"),
    "scores": (DATA, {"scores": FisherScores({"x": torch.ones(1, 1)}, 1)}, "`scores`"),
    "loss": (DATA, {"loss_fn": lambda outputs, labels: outputs.logits.mean()}, "`loss_fn`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_and_arguments_change_nothing(case: str) -> None:
    data, options, message = REFUSED[case]
    model = adapter().train()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, data, **options, **QUIET)
    assert_unchanged(before, model)


@pytest.mark.parametrize("data", [3, "flowers", {"pixel_values": 1}])
def test_data_of_another_type(data: Any) -> None:
    with pytest.raises(TypeError, match="`data`"):
        calibrate(adapter(), data, **QUIET)


def _zero_head(model: Any) -> None:
    for parameter in model.base_model.model.classifier.parameters():
        parameter.data.zero_()


def _break_weight(model: Any) -> None:
    model.base_model.model.vit.layers[1].mlp.fc1.base_layer.weight.data[2, 3] = float("nan")


BROKEN: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "head of zeros": (_zero_head, {}, {"probe_head": False}, "zero"),
    "weights not finite": (_break_weight, {}, {}, "finite"),
    "weights not finite, no probe": (_break_weight, {}, {"probe_head": False}, "finite"),
    "weights not finite, magnitude": (_break_weight, {"importance": "magnitude"}, {}, "finite"),
    "weights not finite, random": (_break_weight, {"importance": "random"}, {}, "finite"),
    "too many token layers": (lambda model: None, {"token_layers": 5}, {}, "`token_layers`"),
    "budget": (lambda model: None, {"budget": 0.9}, {}, "`budget`"),
    "merged": (lambda model: model.merge_adapter(), {}, {}, "merged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_are_left_as_they_were(case: str) -> None:
    spoil, config, options, message = BROKEN[case]
    model = adapter(**config)
    spoil(model)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, DATA, **options, **QUIET)
    assert_unchanged(before, model)


class Unreadable(Dataset[Any]):
    """Nobody is to look at a sample."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.9}, "`budget` must be from 0.0[0-9]* .* to .* `max_connections`, which is 4"),
        ({"token_layers": 5}, "`token_layers` must be at most 4"),
        ({"token_layers": 2, "layers_to_transform": [1]}, "`token_layers` must be at most 1"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_measured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(adapter(**options), Unreadable(), **QUIET)


def test_scores_of_another_model_are_refused_before_the_probe() -> None:
    with pytest.raises(ValueError, match="`scores`"):
        calibrate(adapter(), Unreadable(), scores=FisherScores({"x": torch.ones(1, 1)}, 1), **QUIET)


def test_a_model_of_another_method_is_refused() -> None:
    model = get_peft_model(build_vit(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`model` must hold a TR-PTS adapter, got a model without"):
        calibrate(model, DATA, **QUIET)


def test_no_targeted_linear() -> None:
    base = build_vit()
    with pytest.raises(ValueError, match="`target_modules`"):
        estimate_fisher(base, DATA, target_modules=["nothing"], **QUIET)
    with pytest.raises(ValueError, match="adapter"):
        calibrate(base, DATA, **QUIET)


def test_targeted_head_needs_no_probe() -> None:
    config = TRPTSConfig(target_modules=["fc1", "classifier"], token_layers=1)
    model = get_peft_model(build_vit(), config)
    before = state_of(model)
    with pytest.raises(ValueError, match="`probe_head`"):
        calibrate(model, DATA, **QUIET)
    assert_unchanged(before, model)
    assert "classifier" in calibrate(model, DATA, probe_head=False, **QUIET).columns


def test_fixed_rates_are_in_the_way() -> None:
    base = build_vit()
    apply_token_selection(base, {1: 0.5})
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match="apply_token_selection"):
        adapter(base)
    after = base.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert adapter(base, token_layers=0).peft_config["default"].token_layers == 0


def test_inference_mode_is_refused() -> None:
    model = adapter()
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        calibrate(model, DATA, **QUIET)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        estimate_fisher(model, DATA, **QUIET)


def test_compiled_blocks_are_refused_unless_they_have_no_targets() -> None:
    model = adapter(Distillation(), target_modules=["fc1"], exclude_modules=r"teacher\..*", token_layers=0)
    model.base_model.model.teacher.vit.layers[1] = torch.compile(build_vit().vit.layers[1], backend="eager")
    calibrate(model, DATA, probe_head=False, **QUIET)
    blocks = model.base_model.model.student.vit.layers
    blocks[1] = torch.compile(blocks[1], backend="eager")
    with pytest.raises(ValueError, match=r"`model` must have no compiled blocks yet, got student.*fc1"):
        calibrate(model, DATA, overwrite=True, probe_head=False, **QUIET)


def test_a_head_that_was_compiled_is_named() -> None:
    model = adapter(modules_to_save=[])
    model.base_model.model.classifier = torch.compile(model.base_model.model.classifier, backend="eager")
    with pytest.raises(ValueError, match=r"linear head .* in which parts are compiled: calibrate before"):
        calibrate(model, DATA, **QUIET)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, as it compiles
def test_blocks_compiled_in_place_that_have_run_are_calibrated_again_and_again() -> None:
    """Compiled code calls the hooks that it was compiled with, if any, and no others."""
    expected = calibrate(adapter(), DATA, **QUIET)
    model = adapter()
    for block in model.base_model.model.vit.layers:
        block.compile(backend="eager")
    batch = DATA.batch()  # of as many images as calibration looks at: other shapes would be compiled anew
    for index in range(2):
        model.eval()(**batch).loss.backward()
        with model.disable_adapter():
            model(**batch)
        selection = calibrate(model, DATA, overwrite=index > 0, **QUIET)
        assert selection.columns.keys() == expected.columns.keys()
        assert all(torch.equal(columns, expected.columns[name]) for name, columns in selection.columns.items())


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        (lambda m: torch.compile(m, backend="eager"), "OptimizedModule"),
        (nn.DataParallel, "DataParallel"),
        (lambda m: get_peft_model(torch.compile(build_vit(), backend="eager"), TRPTSConfig()), "OptimizedModule"),
    ],
)
def test_what_wraps_a_model_is_refused(wrapped: Any, name: str) -> None:
    """Its names of linears are not those that the adapter is loaded by."""
    model = adapter()
    before = state_of(model)
    with pytest.raises(ValueError, match=f"`model` must be the model itself, got {name}"):
        calibrate(wrapped(model), DATA, **QUIET)
    with pytest.raises(ValueError, match=f"`model` must be the model itself, got {name}"):
        estimate_fisher(wrapped(model), DATA, **QUIET)
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("option", "value"),
    [("importance", "fischer"), ("keep_rate", 80), ("top_percent", 150), ("token_layers", [1, 1]), ("seed", -1)],
)
def test_options_assigned_since_are_checked_again(option: str, value: Any) -> None:
    model = adapter()
    calibrate(model, DATA, **QUIET)
    setattr(model.peft_config["default"], option, value)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        calibrate(model, DATA, overwrite=True, **QUIET)
    assert_unchanged(before, model)


def test_options_assigned_since_are_brought_into_their_form() -> None:
    model = adapter()
    calibrate(model, DATA, **QUIET)
    model.peft_config["default"].token_layers = (2, 1)
    assert calibrate(model, DATA, overwrite=True, **QUIET).token_layers == (1, 2)
    assert model.peft_config["default"].token_layers == [1, 2]


# ---- estimate_fisher ----


def test_fisher_of_a_peft_model_is_that_of_its_base() -> None:
    model = adapter(token_layers=[1])
    for name, parameter in model.named_parameters():
        if "trpts_" in name:
            parameter.data.normal_()
    plain, own = estimate_fisher(build_vit(), DATA, **QUIET), estimate_fisher(model, DATA, **QUIET)
    assert plain.keys() == own.keys()
    assert [name for name in plain if not torch.allclose(plain[name], own[name], rtol=1e-5)] == []


def test_fisher_is_measured_with_all_tokens() -> None:
    base = build_vit()
    apply_token_selection(base, {0: 0.3})
    measured, plain = (estimate_fisher(model, DATA, **QUIET) for model in (base, build_vit()))
    assert [name for name in plain if not torch.allclose(plain[name], measured[name], rtol=1e-5)] == []
    assert keep_rates_in_force(base) == {0: 0.3}


def test_fisher_leaves_a_plain_model_alone() -> None:
    base = build_vit().train()
    base.classifier.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_fisher(base, DATA, target_modules=["fc1"], **QUIET)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags
    assert base.training
    assert all(p.grad is None for p in base.parameters())
    assert all(torch.equal(t, build_vit().state_dict()[n]) for n, t in base.state_dict().items())


def test_fisher_of_a_reference_input() -> None:
    """Images of one class only still count by their true label."""
    data = [{"pixel_values": build_images(1)[0], "labels": 1}]
    score = estimate_fisher(build_vit(), data, target_modules=["layers.3.mlp.fc2"], **QUIET)
    naive = naive_fisher(
        build_vit(), ["vit.layers.3.mlp.fc2"], [{"pixel_values": build_images(1)[0], "labels": torch.tensor(1)}]
    )
    torch.testing.assert_close(score["vit.layers.3.mlp.fc2"], naive["vit.layers.3.mlp.fc2"], rtol=1e-4, atol=1e-9)
