"""From data to a calibrated adapter: probe the head, measure the Fisher information, select, install."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import nn

from .adapters import find_adapter
from .checkpoint import adapted_linears, trained_parameters
from .config import TRPTSConfig
from .data import Batches, check_whole, of_first_process, processes
from .families import find_family
from .fisher import FisherScores, LossFn
from .head import Head, find_heads, num_labels
from .layer import TRPTSLinear
from .measurement import (
    LABELS,
    SCORES,
    bare_base,
    check_labels,
    check_words,
    check_workspace,
    collect_features,
    measure,
    targeted_linears,
)
from .probe import LinearProbe, fit_linear_probe
from .selection import Selection, check_feasible, select
from .stale import retire_users_of
from .vit import check_no_fixed_selection, check_rates, install_keep_rates

__all__ = ["calibrate"]

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    adapter_name: str | None = None,
    scores: FisherScores | None = None,
    probe_head: bool = True,
    overwrite: bool = False,
    num_samples: int | None = None,
    batch_size: int = 32,
    loss_fn: LossFn | None = None,
    labels: str = "dataset",
    workspace_mb: float = 256,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Selection:
    """Decide from data which connections an adapter trains and which blocks select tokens; set it up so, and return it.

    Comes before training, DDP and `torch.compile`: the adapter's parameters take another shape, and its config in
    `model.peft_config` is replaced. The update starts at zero.

    Args:
        model: a PeftModel with a TR-PTS adapter, or a model that one was injected into.
        data: as for `estimate_fisher`; None where neither the probe nor the scores need it.
        adapter_name: the adapter; None: the active one.
        scores: scores to use instead of measuring.
        probe_head: fit the head first, and start training from it if it is in `modules_to_save`.
        overwrite: calibrate an adapter that is calibrated, loaded or trained already.
        num_samples, batch_size, loss_fn, labels, workspace_mb, accelerator: as for `estimate_fisher`.
        progress: show progress bars, and print what was selected.

    Raises:
        ValueError: as `estimate_fisher` and `select`, or the adapter is calibrated or merged. Nothing is changed.
    """
    check_words(labels=(labels, LABELS))
    check_workspace(workspace_mb)
    base, name, config = _bare_adapter(model, adapter_name)
    linears = _checked_linears(base, config, name, scores, overwrite)
    measures = scores is None and config.importance in SCORES
    batches = _batches(base, data, num_samples, batch_size, accelerator) if measures or probe_head else None
    fitted = _fit_head(base, batches, name, progress) if batches and probe_head else None
    if batches and measures:
        with fitted.predicting() if fitted else nullcontext():
            scores = measure(base, batches, linears, config.importance, labels, loss_fn, workspace_mb, progress, name)
    selection = select(_scores_without_data(linears, config) if scores is None else scores, config, base)
    _install(base, cast(Any, model).peft_config, name, config, selection)
    start = fitted.install() if fitted else []
    if progress and processes(accelerator)[0] == 0:
        print(*start, selection.summary(), sep="\n")
    return selection


def _batches(base: nn.Module, data: Any, num_samples: int | None, batch_size: int, accelerator: Any) -> Batches:
    if data is None:
        raise ValueError(
            "`data` must be a Dataset or DataLoader, got None: only `probe_head=False` with `scores`, or with "
            '`importance="magnitude"` or `"random"`, needs none.'
        )
    rank, world = processes(accelerator)
    return Batches(data, base, num_samples=num_samples, batch_size=batch_size, rank=rank, world=world)


def _bare_adapter(model: nn.Module, adapter_name: str | None) -> tuple[nn.Module, str, TRPTSConfig]:
    bare_base(model)
    return find_adapter(model, adapter_name)


def _check_calibratable(base: nn.Module, config: TRPTSConfig, adapter_name: str, overwrite: bool) -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError("`calibrate` must make trainable parameters, got `torch.inference_mode`: call it outside.")
    check_whole(base)
    layers = [layer for _, layer in adapted_linears(base, adapter_name)]
    if any(layer.merged for layer in layers):
        raise ValueError("`model` must hold no merged adapter, got one: call `unmerge_adapter()` first.")
    trained = config.init_weights and any(layer.is_trained(adapter_name) for layer in layers)
    calibrated = config.connections is not None and any(layer.is_chosen(adapter_name) for layer in layers)
    if not overwrite and (calibrated or trained):
        raise ValueError(
            f"`overwrite` must be True to calibrate adapter {adapter_name!r} again, got False: its columns, values and "
            "head would be replaced."
        )
    if isinstance(config.token_layers, int) and config.token_layers and find_family(base) is None:
        name = type(base).__name__
        logger.warning("%s is of no family in which tokens can be selected: all of them stay. See README.", name)
    if config.token_layers:
        check_no_fixed_selection(base)


def _checked_linears(
    base: nn.Module, config: TRPTSConfig, adapter_name: str, scores: FisherScores | None, overwrite: bool
) -> dict[str, nn.Linear]:
    """The targeted linears, once all is refused that can be before anything is measured."""
    _check_calibratable(base, config, adapter_name, overwrite)
    linears = targeted_linears(base, config, adapter_name)
    check_feasible(config, {n: (m.out_features, m.in_features) for n, m in linears.items()}, base)
    if scores is not None:
        _check_given(scores, linears)
    return linears


def _check_given(scores: FisherScores, linears: Mapping[str, nn.Linear]) -> None:
    if set(scores) != set(linears):
        difference = sorted(set(scores) ^ set(linears))
        raise ValueError(f"`scores` must be of exactly the targeted linears, got a difference in {difference[:4]}.")
    for name, linear in linears.items():
        if scores[name].shape != linear.weight.shape:
            shapes = f"{tuple(linear.weight.shape)} for {name}, got {tuple(scores[name].shape)}"
            raise ValueError(f"`scores` must have the shape of the weights, {shapes}.")


def _scores_without_data(linears: Mapping[str, nn.Linear], config: TRPTSConfig) -> FisherScores:
    if config.importance == "magnitude":
        return FisherScores({n: m.weight.detach().abs().float().cpu() for n, m in linears.items()}, 0)
    generator = torch.Generator().manual_seed(config.seed)
    how: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the defaults
    return FisherScores({n: torch.rand(m.weight.shape, **how) for n, m in linears.items()}, 0)


class _FittedHead(NamedTuple):
    """A head, and the probe that was fitted in its place."""

    head: Head
    probe: LinearProbe

    def predicting(self) -> AbstractContextManager[None]:
        """Within, the model predicts with the probe."""
        return self.head.replaced(self.probe.weight, self.probe.bias)

    def install(self) -> list[str]:
        """Let training start from the probe, where the head trains; returns what there is to say of it."""
        if self.head.trainable:
            self.head.write(self.probe.weight, self.probe.bias)
            return [self.probe.summary()]
        warnings.warn(
            f"The head {self.head.name!r} is not trained: the probe was used for scoring only. Pass "
            f"`modules_to_save=[{self.head.name.rpartition('.')[2]!r}]` to start training from it.",
            stacklevel=3,
        )
        return []


def _fit_head(base: nn.Module, batches: Batches, adapter_name: str, progress: bool) -> _FittedHead:
    """Fit the head on the frozen features of all processes' samples; every process gets the same one."""
    head, features, labels = collect_features(base, batches, find_heads(base, adapter_name), progress, adapter_name)
    check_labels(labels, num_labels(head))
    if not bool(features.isfinite().all()):
        raise ValueError(
            "`model` must have finite features, got others in front of its head: check weights and inputs."
        )
    probe = fit_linear_probe(features, labels.long(), num_labels(head), fit_bias=head.linear.bias is not None)
    if batches.world > 1:
        for tensor in (probe.weight, probe.bias):
            tensor.copy_(of_first_process(tensor))
    logger.info("%s, strength %g, held-out loss %.3f", probe.summary(), probe.strength, probe.held_out_loss)
    return _FittedHead(head, probe)


def _install(
    base: nn.Module, configs: dict[str, Any], adapter_name: str, config: TRPTSConfig, selection: Selection
) -> None:
    rates = dict.fromkeys(selection.token_layers, config.keep_rate)
    check_rates(base, adapter_name, rates)
    for name, columns in selection.columns.items():
        layer = base.get_submodule(name)
        assert isinstance(layer, TRPTSLinear)
        layer.replace_columns(adapter_name, columns)
    retire_users_of(trained_parameters(base, adapter_name))
    if not any(layer.trpts_values[adapter_name].requires_grad for _, layer in adapted_linears(base, adapter_name)):
        logger.warning("Adapter '%s' is not trainable: activate it, or load it with `is_trainable=True`.", adapter_name)
    install_keep_rates(base, adapter_name, rates)
    calibrated = copy.deepcopy(config)
    calibrated.connections = dict(selection.connections)
    calibrated.selected_token_layers = list(selection.token_layers)
    calibrated.unit_importance = dict(selection.importance)
    configs[adapter_name] = calibrated
