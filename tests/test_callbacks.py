"""What TRPTSCallback logs, against a naive loop, and that training does not notice it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import LabelledImages, build_vit, needs_adapter_methods
from trpts_peft import TRPTSCallback, TRPTSConfig, set_token_selection
from trpts_peft.layer import TRPTSLinear

DATA = LabelledImages(8)


def adapter(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """Not calibrated, with random values: that is all the callback needs."""
    defaults: dict[str, Any] = {"modules_to_save": ["classifier"], "keep_rate": 0.5, "token_layers": [0, 2]}
    return get_peft_model(base or build_vit(), TRPTSConfig(**{**defaults, "init_weights": False, **options}))


def trainer_of(model: nn.Module, path: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 0.01}
    return Trainer(model, TrainingArguments(str(path), **{**defaults, **options}), train_dataset=DATA)


def train(model: nn.Module, path: Path, **options: Any) -> Trainer:
    trainer = trainer_of(model, path, **options)
    trainer.add_callback(TRPTSCallback(trainer))
    trainer.train()
    return trainer


def log(trainer: Trainer) -> None:
    """What a step does at whose end the Trainer is about to log."""
    trainer.control.should_log = True
    TRPTSCallback(trainer).on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """The callback's entries, without what the Trainer adds to each."""
    entries = [e for e in trainer.state.log_history if any(key.startswith("trpts_") for key in e)]
    return [{key: value for key, value in e.items() if key not in ("epoch", "step")} for e in entries]


def naive_norms(model: nn.Module, names: tuple[str, ...] = ("default",)) -> dict[str, float]:
    """√ΣΔ² per block, entry by entry of dense matrices."""
    sums: dict[str, float] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, TRPTSLinear):
            delta = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
            for adapter_name in names:
                for row, columns in enumerate(layer.trpts_columns[adapter_name].tolist()):
                    for slot, column in enumerate(columns):
                        delta[row, column] += layer.trpts_values[adapter_name][row, slot].item()
            block = f"block_{number[1]}" if (number := re.search(r"\.layers?\.(\d+)", name)) else "other"
            sums[block] = sums.get(block, 0.0) + float(delta.square().sum())
    return {f"trpts_norm/{block}": total**0.5 for block, total in sums.items()}


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_what_is_logged(family: str, tmp_path: Path) -> None:
    trainer = train(adapter(build_vit(family)), tmp_path)
    first, last = logged(trainer)
    tokens = {"trpts_tokens_kept/block_0": (32 + 1) / 64, "trpts_tokens_kept/block_2": (16 + 1) / 64}
    assert last == pytest.approx(naive_norms(trainer.model) | tokens, rel=1e-5)
    assert list(last) == [*(f"trpts_norm/block_{i}" for i in range(4)), *tokens]
    assert first.keys() == last.keys() and first != last


def test_only_adapted_blocks_are_named_and_the_rest_is_other(tmp_path: Path) -> None:
    targets = r".*layers\.[13]\.mlp\.fc1|classifier"
    model = adapter(target_modules=targets, token_layers=[], modules_to_save=None)
    last = logged(train(model, tmp_path))[-1]
    assert last == pytest.approx(naive_norms(model), rel=1e-5)
    assert list(last) == ["trpts_norm/block_1", "trpts_norm/block_3", "trpts_norm/other"]


def test_several_active_adapters_add_up(tmp_path: Path) -> None:
    model = adapter()
    model.add_adapter("b", TRPTSConfig(keep_rate=0.5, token_layers=[0, 2], init_weights=False, max_connections=2))
    model.base_model.set_adapter(["default", "b"])
    last = logged(train(model, tmp_path))[-1]
    expected = naive_norms(model, ("default", "b"))
    assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_no_tokens_are_named_while_all_stay(tmp_path: Path) -> None:
    model = adapter()
    set_token_selection(model, False)
    assert list(logged(train(model, tmp_path))[-1]) == [f"trpts_norm/block_{i}" for i in range(4)]


def test_of_two_vits_the_norms_alone_are_logged(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = build_vit(), build_vit()

        def forward(self, pixel_values: Any, labels: Any = None) -> Any:
            return self.student(pixel_values, labels=labels)

    trainer = train(adapter(Pair(), target_modules=r"student\..*fc1", modules_to_save=None), tmp_path)
    assert {key.partition("/")[0] for key in logged(trainer)[-1]} == {"trpts_norm"}


def test_values_of_16_bits_are_summed_in_32(tmp_path: Path) -> None:
    model = adapter(build_vit().to(torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "trpts_values" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    trainer = trainer_of(model, tmp_path)
    log(trainer)
    (entry,) = logged(trainer)
    assert {k: v for k, v in entry.items() if "norm" in k} == pytest.approx(naive_norms(model), rel=1e-6)


@needs_adapter_methods
def test_an_adapter_injected_by_transformers(tmp_path: Path) -> None:
    vit = build_vit()
    vit.add_adapter(TRPTSConfig(init_weights=False, token_layers=[1], keep_rate=0.5))
    last = logged(train(vit, tmp_path))[-1]
    assert last == pytest.approx({**naive_norms(vit), "trpts_tokens_kept/block_1": 33 / 64}, rel=1e-5)


def test_a_model_that_is_no_vit(tmp_path: Path) -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(8, 8)), TRPTSConfig(target_modules=["0"], init_weights=False))
    trainer = trainer_of(net, tmp_path)
    log(trainer)
    assert logged(trainer) == [pytest.approx({"trpts_norm/other": naive_norms(net)["trpts_norm/other"]}, rel=1e-5)]


def own_entries(trainer: Trainer) -> list[dict[str, float]]:
    """The Trainer's entries, without its timings."""
    entries = [e for e in trainer.state.log_history if not any(key.startswith("trpts_") for key in e)]
    return [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in entries]


@pytest.mark.parametrize("strategy", [{"logging_steps": 2}, {"logging_strategy": "epoch"}], ids=["steps", "epoch"])
def test_training_does_not_notice_it(strategy: dict[str, Any], tmp_path: Path) -> None:
    trainers = []
    for run in (Trainer.train, lambda trainer: trainer.add_callback(TRPTSCallback(trainer)) or trainer.train()):
        torch.manual_seed(0)
        model, epochs = adapter(build_vit(hidden_dropout_prob=0.1)), {"max_steps": -1, "num_train_epochs": 2}
        trainers.append(trainer_of(model, tmp_path, per_device_train_batch_size=2, **epochs, **strategy))
        run(trainers[-1])
    alone, watched = trainers
    assert own_entries(alone) == own_entries(watched)
    assert len(logged(watched)) == sum("loss" in entry for entry in own_entries(watched)) > 1
    expected, state = alone.model.state_dict(), watched.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_the_model_is_only_looked_at(tmp_path: Path) -> None:
    model = adapter()
    trainer, before = trainer_of(model, tmp_path), pickle.dumps(model)
    log(trainer)
    assert pickle.dumps(model) == before


class Reporter(TrainerCallback):
    """What a reporter such as TensorBoard's is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


def test_reporters_get_it_at_the_step_of_the_loss(tmp_path: Path) -> None:
    trainer, reporter = trainer_of(adapter(), tmp_path), Reporter()
    trainer.add_callback(reporter)
    trainer.add_callback(TRPTSCallback(trainer))
    trainer.train()
    assert [step for step, logs in reporter.seen if "trpts_norm/block_0" in logs] == [1, 2]
    assert [step for step, logs in reporter.seen if "loss" in logs] == [1, 2]


def test_one_transfer_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, transfers = trainer_of(adapter(), tmp_path), []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, n=name, m=method: (transfers.append(n), m(x))[1])
    log(trainer)
    assert transfers == ["tolist"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    "method",
    [
        "none",
        pytest.param("lora", marks=needs_adapter_methods),
        pytest.param("inactive", marks=needs_adapter_methods),
    ],
)
def test_a_trainer_without_an_active_adapter_is_refused(method: str, tmp_path: Path) -> None:
    vit = build_vit()
    if method == "inactive":
        vit.add_adapter(TRPTSConfig(), "first")
    if method != "none":
        vit.add_adapter(LoraConfig(target_modules=["q_proj"]), "second")
    with pytest.raises(ValueError, match=r"^`trainer` must train a model with an active TR-PTS adapter, got ViT"):
        TRPTSCallback(trainer_of(vit, tmp_path))
