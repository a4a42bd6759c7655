"""Adapters under transformers' plain Trainer: labels, checkpoints, resuming, and what its options do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from conftest import LabelledImages, build_vit
from trpts_peft import TRPTSCallback, TRPTSConfig, calibrate

DATA, HELD_OUT = LabelledImages(16), LabelledImages(8, seed=5)


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    """accelerate remembers autocast and compilation for the rest of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def adapter(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """Calibrated by weight magnitude; selects tokens in the first of two blocks."""
    defaults: dict[str, Any] = {"modules_to_save": ["classifier"], "keep_rate": 0.5, "token_layers": [0]}
    config = TRPTSConfig(**{"importance": "magnitude", **defaults, **options})
    model = get_peft_model(base or build_vit(num_hidden_layers=2), config)
    calibrate(model, None, probe_head=False, progress=False)
    return model


def trainer_of(model: nn.Module, path: Path, callbacks: Any = None, metrics: Any = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.02}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    defaults |= {"logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(str(path), **{**defaults, **options})
    return Trainer(model, args, train_dataset=DATA, eval_dataset=HELD_OUT, callbacks=callbacks, compute_metrics=metrics)


def train(model: nn.Module, path: Path, **options: Any) -> Trainer:
    trainer = trainer_of(model, path, **options)
    trainer.train()
    return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- evaluation ----


class Scores:
    """Metrics that are given beforehand, so that it is known which checkpoint is the best."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.label_ids: list[Any] = []

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        self.label_ids.append(prediction.label_ids)
        return {"score": self.scores.pop(0)}


def test_labels_are_found_and_the_best_checkpoint_is_restored(tmp_path: Path) -> None:
    model, metrics = adapter(), Scores(0.1, 0.9, 0.5)
    trainable = trained(model).keys()
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = train(model, tmp_path, metrics=metrics, **steps, **best)
    assert logged(trainer, "eval_score") == [0.1, 0.9, 0.5] and len(logged(trainer, "eval_loss")) == 3
    assert all((ids == HELD_OUT.labels.numpy()).all() for ids in metrics.label_ids)
    files = [load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3)]
    restored = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert same(restored, files[0]) and not same(restored, files[1])
    assert trained(model).keys() == trainable


# ---- resuming ----


class Interrupt(TrainerCallback):
    """Somebody stops the run, right after a checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt


LONG: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}


def base_with_dropout() -> nn.Module:
    return build_vit(num_hidden_layers=2, hidden_dropout_prob=0.1)


def calibrated_anew(_checkpoint: Path) -> nn.Module:
    return adapter(base_with_dropout())


def from_checkpoint(checkpoint: Path) -> nn.Module:
    return PeftModel.from_pretrained(base_with_dropout(), checkpoint, is_trainable=True)


@pytest.mark.parametrize("build", [calibrated_anew, from_checkpoint])
def test_resuming_is_exact(build: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    whole = train(calibrated_anew(tmp_path), tmp_path / "whole", **LONG)
    with pytest.raises(KeyboardInterrupt):
        train(calibrated_anew(tmp_path), tmp_path / "cut", callbacks=[Interrupt()], **LONG)
    resumed = trainer_of(build(tmp_path / "cut" / "checkpoint-6"), tmp_path / "cut", **LONG)
    resumed.train(resume_from_checkpoint=True)
    assert same(trained(resumed.model), trained(whole.model))
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert logged(resumed, "loss") == logged(whole, "loss")
    expected, state = (t.optimizer.state_dict() for t in (whole, resumed))
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys() and len(expected["state"]) == len(trained(whole.model))
    assert all(same(moments, state["state"][index]) for index, moments in expected["state"].items())


@pytest.mark.parametrize("other", [{"min_connections": 2}, {"token_layers": [1]}])
def test_resuming_into_another_adapter_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    train(adapter(), tmp_path, save_strategy="steps", save_steps=2)
    model = adapter(**other)
    before = trained(model)
    with pytest.raises(ValueError, match="calibrate this model on the same data first"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=True)
    assert same(trained(model), before)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    base = build_vit(hidden_size=128, intermediate_size=256)
    size = sum(parameter.numel() * 4 for parameter in base.parameters())
    train(adapter(base), tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    files = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-3").iterdir()}
    state = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    assert files.keys() == state | {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] < size / 10 and sum(files.values()) < size / 3


# ---- one step ----


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, and how many tokens reach the second block."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.tokens: set[int] = set()
        model.get_base_model().vit.layers[1].register_forward_pre_hook(
            lambda _, args: self.tokens.add(args[0].shape[1])
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}


def watched_step(model: nn.Module, path: Path, **options: Any) -> tuple[Watch, list[float]]:
    """Gradients and loss of one step from values that are not zero."""
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    watch = Watch(model)
    return watch, logged(train(model, path, callbacks=[watch], max_steps=1, max_grad_norm=0, **options), "loss")


def test_gradients_accumulate(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_steps": 2}
    one = train(adapter(), tmp_path, per_device_train_batch_size=8, **options)
    two = train(adapter(), tmp_path, gradient_accumulation_steps=2, **options)
    torch.testing.assert_close(trained(two.model), trained(one.model), rtol=0, atol=1e-5)
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
    assert not same(trained(one.model), trained(adapter()))


def test_label_smoothing(tmp_path: Path) -> None:
    model = adapter()
    with torch.no_grad():
        scores = model(DATA.pixel_values).logits.log_softmax(dim=1)
    truth = scores[torch.arange(len(DATA)), DATA.labels]
    expected = -(0.9 * truth + 0.1 * scores.mean(dim=1)).mean()
    batch = {"per_device_train_batch_size": len(DATA), "max_steps": 1}
    trainer = train(model, tmp_path, label_smoothing_factor=0.1, **batch)
    assert logged(trainer, "loss") == [pytest.approx(float(expected), rel=1e-5)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    expected, loss = watched_step(adapter(), tmp_path)
    model = adapter()
    if use_reentrant:
        model.enable_input_require_grads()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    watch, checkpointed = watched_step(model, tmp_path, gradient_checkpointing=True, **options)
    assert model.get_base_model().vit.layers[0].gradient_checkpointing
    assert watch.tokens == expected.tokens == {1 + 32 + 1}
    torch.testing.assert_close(watch.gradients, expected.gradients, rtol=0, atol=1e-6)
    assert checkpointed == pytest.approx(loss, abs=1e-6)


def test_compiled(tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    # What transformers would find out, and write down, in the first step, so that it had to compile again.
    options: dict[str, Any] = {"num_hidden_layers": 1, "problem_type": "single_label_classification"}
    eager, model = (adapter(build_vit(**options), target_modules=["fc1"]) for _ in range(2))
    trainer = trainer_of(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    trainer.add_callback(TRPTSCallback(trainer))
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.testing.assert_close(trained(model), trained(train(eager, tmp_path).model), rtol=0, atol=1e-5)
    assert logged(trainer, "trpts_tokens_kept/block_0") == [33 / 64] * 2


def test_autocast_leaves_values_in_32_bits(tmp_path: Path) -> None:
    (full, loss), (half, rounded) = (watched_step(adapter(), tmp_path, bf16=bf16) for bf16 in (False, True))
    assert rounded != loss and rounded == pytest.approx(loss, rel=0.02)
    assert {gradient.dtype for gradient in half.gradients.values()} == {torch.float32}
    one, other = (torch.cat([g.flatten() for g in watch.gradients.values()]) for watch in (full, half))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99
