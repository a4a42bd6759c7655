"""Run a model over labelled data: the Fisher information of its linears, the features in front of its head."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .compiled import COMPILER, force_eager
from .config import TRPTSConfig
from .data import Batches, check_bare, check_whole, processes, sum_of_processes
from .families import find_family, is_of_family
from .fisher import FisherCollector, FisherScores, LossFn, eval_mode, logits_of, per_sample_cross_entropy
from .head import Head, check_head
from .layer import TRPTSLinear
from .traversal import base_of
from .vit import token_selections

__all__ = ["bare_base", "base_weights", "collect_features", "estimate_fisher", "measure", "targeted_linears"]

SCORES = ("fisher", "gradient")
LABELS = ("dataset", "model")

logger = logging.getLogger(__name__)


@contextmanager
def base_weights(model: nn.Module, adapter_name: str | None = None) -> Iterator[None]:
    """Within, the model runs with its base weights and all of its tokens; what adapters train is left alone.

    Modules that are trained whole (`modules_to_save`) are those of the named adapter, whichever is active, and the
    base model's where it has none; without a name, those in force.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("Scores need gradients, got `torch.inference_mode`: call this outside of it.")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if layer.merged:
            raise ValueError("`model` must hold no merged adapter, got one: call `unmerge_adapter()` first.")
    disabled = [(layer, layer.disable_adapters) for layer in layers]
    enabled = [(selection, selection.enabled) for selection in token_selections(model).values()]
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    in_force = [(wrapper, wrapper._active_adapter, wrapper.disable_adapters) for wrapper in wrappers]
    try:
        if adapter_name is not None:
            for wrapper in wrappers:
                wrapper._active_adapter = [adapter_name] if adapter_name in wrapper.modules_to_save else []
                wrapper._disable_adapters = False
        for layer, _ in disabled:
            layer._disable_adapters = True
        for selection, _ in enabled:
            selection.enabled = False
        with force_eager():
            yield
    finally:
        for layer, flag in disabled:
            layer._disable_adapters = flag
        for selection, flag in enabled:
            selection.enabled = flag
        for wrapper, active, flag in in_force:
            wrapper._active_adapter, wrapper._disable_adapters = active, flag


def _base_linear(module: nn.Module) -> nn.Linear | None:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base if isinstance(base, nn.Linear) else None


def targeted_linears(base: nn.Module, config: Any, adapter_name: str | None) -> dict[str, nn.Linear]:
    """{name in the base model: base linear} of those that an adapter trains, or that a config names."""
    linears = {}
    for name, module in base.named_modules():
        if ".base_layer" in f".{name}" or ".modules_to_save." in name or ".original_module" in name:
            continue
        linear = _base_linear(module)
        if linear is None:
            continue
        mine = isinstance(module, TRPTSLinear) and str(adapter_name) in module.trpts_values
        if mine if adapter_name is not None else bool(check_target_module_exists(config, name)):
            _check_not_compiled(name)
            linears[name] = linear
    if not linears:
        raise ValueError(
            f"`target_modules` must match at least one nn.Linear of the model, got {config.target_modules!r}."
        )
    return linears


def _check_not_compiled(name: str) -> None:
    if COMPILER in name:
        raise ValueError(
            f"`model` must have no compiled blocks yet, got {name}: calibrate or measure before `torch.compile`, or "
            "compile in place, by `block.compile()`."
        )


def bare_base(model: nn.Module) -> nn.Module:
    """The base model, with nothing around it or around the PeftModel that holds it."""
    check_bare(model)
    base = base_of(model)
    check_bare(base)
    return base


def check_words(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, legal) in choices.items():
        if value not in legal:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, legal))}, got {value!r}.")


def check_workspace(workspace_mb: float) -> None:
    if isinstance(workspace_mb, bool) or not isinstance(workspace_mb, (int, float)) or not workspace_mb > 0:
        raise ValueError(f"`workspace_mb` must be a number above 0, got {workspace_mb!r}.")


def check_labels(labels: Tensor, classes: int) -> None:
    _check_kind_of_labels(labels)
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"`labels` must be from 0 to {classes - 1}, the labels of the head, got {int(labels.min())} to "
            f"{int(labels.max())}: load the model with `num_labels` of the data set."
        )


def _check_kind_of_labels(labels: Tensor) -> None:
    if labels.is_floating_point() or labels.dim() != 1:
        raise ValueError(
            f"`labels` must be one whole number per sample, its class, got {labels.dtype} {tuple(labels.shape)}: for "
            "other targets pass a `loss_fn`, and `probe_head=False` to `calibrate`."
        )


def _sampled_labels(logits: Tensor, index: int) -> Tensor:
    """Labels drawn from the prediction; seeded by the batch, not by the process that happens to see it."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            "`labels` must be 'dataset' for a model that does not tell classes apart, got 'model' with logits of shape "
            f"{tuple(logits.shape)}."
        )
    generator = torch.Generator().manual_seed(index)
    probabilities = logits.detach().float().softmax(dim=-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


def measure(
    base: nn.Module,
    batches: Batches,
    linears: Mapping[str, nn.Linear],
    score: str,
    labels: str,
    loss_fn: LossFn | None,
    workspace_mb: float,
    progress: bool,
    adapter_name: str | None = None,
) -> FisherScores:
    """Run over this process's batches, then add up what all processes have collected."""
    # A model that merely holds a supported ViT may feed it two images a sample, or crops of one, in its own order.
    collector = FisherCollector(linears, score, workspace_mb, known_layout=is_of_family(base))
    with base_weights(base, adapter_name), collector.collecting(base):
        for k, batch in enumerate(batches.iterate("Fisher", progress)):
            targets = batch.pop("labels")
            outputs = base(**batch)
            if labels == "model":
                targets = _sampled_labels(logits_of(outputs), k * batches.world + batches.rank)
            if loss_fn is None:
                check_labels(targets, logits_of(outputs).shape[-1])
                targets = targets.long()
            loss = (loss_fn or per_sample_cross_entropy)(outputs, targets)
            if loss.shape != targets.shape[:1]:
                raise ValueError(f"`loss_fn` must return one loss per sample, got shape {tuple(loss.shape)}.")
            collector.add(loss)
            del loss, outputs  # they hold the inputs of all linears, which would stay during the next forward pass
    scores = collector.result(sum_of_processes if batches.world > 1 else (lambda total: total))
    _check_measured(scores)
    idle = [name for name in linears if name not in collector.called]
    if idle and batches.rank == 0:
        logger.warning(
            "The model has not called %d of the targeted linears, of which %s is the first: an adapter there is idle. "
            "Leave them out of `target_modules`, or list them in `exclude_modules`.",
            len(idle),
            idle[0],
        )
    return scores


def _check_measured(scores: FisherScores) -> None:
    for name, score in scores.items():
        if not math.isfinite(float(score.max())):  # of scores that are not negative; NaN is the largest
            raise ValueError(f"`model` must have finite gradients, got others in {name}: check weights and inputs.")
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError(
            "`model` must have a gradient, got zero everywhere: its head is all zeros (fit it first, as `calibrate` "
            "does with `probe_head=True`), or it predicts every sample perfectly."
        )


def estimate_fisher(
    model: nn.Module,
    data: Any,
    *,
    score: str = "fisher",
    target_modules: list[str] | str | None = None,
    num_samples: int | None = None,
    batch_size: int = 32,
    loss_fn: LossFn | None = None,
    labels: str = "dataset",
    workspace_mb: float = 256,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> FisherScores:
    """Eq. 2: F[o, i] = mean over samples of (∂L/∂W[o, i])², per sample, at the base weights, with the model's head.

    Runs in eval mode, with all tokens and without adapters; the model is left as it was. With several processes (under
    `accelerate launch`) the batches are shared out and every process returns the same scores.

    Args:
        model: a classifier, plain or a PeftModel.
        data: a Dataset or DataLoader yielding dicts with the model's main input (`pixel_values`) and `labels`; it must
            not augment.
        score: `"fisher"`, or `"gradient"` for the absolute value of the mean gradient (GPS).
        target_modules: names of linears, as in `TRPTSConfig`; None: those of the adapter, else the family's default.
        num_samples: how many samples to use, drawn with a fixed seed; None: all.
        batch_size: samples per forward pass.
        loss_fn: `loss_fn(outputs, labels)`, labels as `data` has them: a loss per sample, (B,); None: cross-entropy.
        labels: `"dataset"`, or `"model"` to draw them from the prediction (the true Fisher information).
        workspace_mb: bound in MiB on the per-sample gradients held at a time (at least one neuron's of one sample).
        accelerator: whose processes share the work; None: those of the present launch.
        progress: show a progress bar.

    Returns:
        {linear in the base model: float32 (out_features, in_features)} on the CPU.

    Raises:
        ValueError: no samples, an input or `labels` missing, labels outside the head, scores all zero or not finite, no
            targeted linear, one that does not see one sample after the other, or the model is sharded.
        TypeError: `data` is neither a Dataset nor a DataLoader.
    """
    check_words(score=(score, SCORES), labels=(labels, LABELS))
    check_workspace(workspace_mb)
    check_whole(model)
    base = bare_base(model)
    rank, world = processes(accelerator)
    linears = _linears_to_score(base, target_modules)
    batches = Batches(data, base, num_samples=num_samples, batch_size=batch_size, rank=rank, world=world)
    return measure(base, batches, linears, score, labels, loss_fn, workspace_mb, progress)


def _linears_to_score(base: nn.Module, target_modules: list[str] | str | None) -> dict[str, nn.Linear]:
    if target_modules is None:
        adapted = [m for m in base.modules() if isinstance(m, TRPTSLinear) and m.active_adapters]
        if adapted:
            return targeted_linears(base, None, adapted[0].active_adapters[0])
        family = find_family(base)
        if family is None:
            raise ValueError("`target_modules` must be given for a model outside the table of families, got None.")
        target_modules = list(family.target_modules)
    return targeted_linears(base, TRPTSConfig(target_modules=target_modules), None)


def _features(base: nn.Module, batch: Mapping[str, Any], head: Head) -> Tensor:
    """What the head sees of a batch, on the CPU."""
    calls: list[tuple[Tensor, Tensor]] = []
    with head.capture(calls):
        base(**batch)
    return calls.pop()[0].to("cpu", copy=True)  # of a ViT it is a view of all tokens


def collect_features(
    base: nn.Module, batches: Batches, heads: Sequence[Head], progress: bool, adapter_name: str | None = None
) -> tuple[Head, Tensor, Tensor]:
    """The head among `heads` that predicts, and what it sees: float64 (n, features) and labels (n,).

    In the order of the data, whatever the number of processes.
    """
    mine: list[tuple[int, Tensor, Tensor, int]] = []
    with torch.no_grad(), eval_mode(base), base_weights(base, adapter_name):
        for k, batch in enumerate(batches.iterate("Features", progress)):
            labels = batch.pop("labels")
            place = mine[0][3] if mine else check_head(heads, partial(base, **batch))
            features = _features(base, batch, heads[place])
            _check_kind_of_labels(labels)
            if features.dim() != 2 or len(features) != len(labels):
                shapes = f"{tuple(features.shape)} with labels {tuple(labels.shape)}"
                raise ValueError(f"`probe_head` must be False where the head does not see (B, features), got {shapes}.")
            mine.append((k * batches.world + batches.rank, features, labels.cpu(), place))
    parts = gather_object(mine) if batches.world > 1 else mine
    if not parts:
        raise ValueError("`data` must hold at least one sample, got none.")
    parts = sorted(parts, key=lambda part: part[0])
    features, labels = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    return heads[parts[0][3]], features.double(), labels
