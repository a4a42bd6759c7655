"""Checks an adapter that a loader has put into a model, and takes it out again where its file is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.functional import set_adapter
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .checkpoint import adapted_linears, check_adapter
from .compiled import COMPILER, without_compilers
from .config import TRPTSConfig
from .layer import TRPTSLinear
from .traversal import base_of
from .tuner_layer import TRPTSLayer
from .vit import adapter_selections, drop_idle_selections

__all__ = ["LoadCheck", "restore_modules", "restore_trainable", "trainable_names", "withdrawn_on_failure"]

# transformers' loader looks in the file for the names that the linears have in the wrappers.
_COMPILED = " Blocks were compiled before: load the adapter first, or by `PeftModel.from_pretrained`."
_checking = threading.Lock()  # of all checks, not of each, which could be neither copied nor pickled


class LoadCheck:
    """Forward pre-hook of a model that an adapter was injected into directly: checks it once, before the first pass."""

    def __init__(self, adapter_name: str, trainable: frozenset[str], active: tuple[str, ...], compiled: bool) -> None:
        self.adapter_name = adapter_name
        self.compiled = compiled  # whether some blocks were already, when the adapter came
        self.trainable = trainable  # names of the parameters that trained before the adapter came
        self.active = active  # the adapters that were in force
        self.refused: str | None = None  # why; for passes that have waited for it, and would go on without the adapter

    def __call__(self, model: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            if model.training:  # gradients need what follows from the columns, which a loader may have exchanged
                raise RuntimeError(
                    f"Adapter {self.adapter_name!r} must be checked before it is compiled for training, got a "
                    "compiled model: run one forward pass first."
                )
            return
        with _checking:  # the first requests of a server may come together
            if self.refused is not None:
                raise ValueError(self.refused)
            if self in model._forward_pre_hooks.values():
                with without_compilers(model):
                    self._check(model)

    def _check(self, model: nn.Module) -> None:
        config = getattr(model, "peft_config", {}).get(self.adapter_name)
        try:
            if isinstance(config, TRPTSConfig):
                check_adapter(model, config, self.adapter_name)
        except Exception as error:
            self.refused = f"{error}{_COMPILED}" if self.compiled else str(error)
            withdraw(model, self.adapter_name, active=self.active)
            if self.compiled:
                raise ValueError(self.refused) from error
            raise
        for _, layer in adapted_linears(model, self.adapter_name):
            layer.refresh(self.adapter_name)
            if layer.is_chosen(self.adapter_name):  # else no loader has put anything there
                layer.fresh.pop(self.adapter_name, None)
        for selection in adapter_selections(model).values():
            selection.awaited.discard(self.adapter_name)
        for key, hook in list(model._forward_pre_hooks.items()):  # last: until then other threads wait for what it does
            if hook is self:
                del model._forward_pre_hooks[key]


def _trainable_before(model: nn.Module) -> frozenset[str]:
    if isinstance(model, PeftModel):
        return cast(frozenset[str], model.base_model.trainable_before)
    checks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, LoadCheck)]
    return checks[0].trainable if checks else frozenset()


_Merged = list[tuple[TRPTSLayer, list[str]]]


def _merged_layers(model: nn.Module) -> _Merged:
    return [(m, list(m.merged_adapters)) for m in model.modules() if isinstance(m, TRPTSLayer) and m.merged]


def _unmerged(model: nn.Module) -> _Merged:
    """Unmerge all layers, the last first, as two may share a weight; returns what was merged into them."""
    merged = _merged_layers(model)
    for layer, _ in reversed(merged):
        layer.unmerge()
    return merged


def _merge_again(merged: _Merged, without: str | None = None) -> None:
    for layer, names in merged:
        left = [name for name in names if name != without]
        if left and not layer.merged:
            layer.merge(adapter_names=left)


@contextmanager
def withdrawn_on_failure(model: nn.Module) -> Iterator[None]:
    """Where what runs within raises, take out each adapter that it has put into the model, or put in anew."""
    before, trainable = _settled(model), trainable_names(model)
    merged = _merged_layers(model)
    try:
        yield
    except Exception:
        after = _settled(model)
        spoiled = [name for name in after if name not in before or (before[name] and not after[name])]
        for name in spoiled:
            withdraw(model, name, trainable=None if before else trainable)
        if set(before) - set(spoiled):
            restore_trainable(model, trainable)
        _merge_again(merged)  # PEFT unmerges what it adds an adapter to
        raise


def _settled(model: nn.Module) -> dict[str, bool]:
    """{adapter in the model: whether it was calibrated, or loaded, since it was put in}."""
    layers = [module for module in model.modules() if isinstance(module, TRPTSLinear)]
    names = dict.fromkeys(name for layer in layers for name in layer.trpts_columns)
    return {name: not any(name in layer.fresh for layer in layers) for name in names}


def withdraw(
    model: nn.Module, adapter_name: str, *, active: Sequence[str] = (), trainable: frozenset[str] | None = None
) -> None:
    """Take out an adapter whose file was refused; with the last one, all that PEFT has put into the base model.

    Args:
        model: a PeftModel, or a base model that the adapter was injected into.
        adapter_name: the adapter.
        active: what is to be in force where the adapter was; without any, the first of the others.
        trainable: names of the parameters that trained before; None: as noted when the first adapter came.
    """
    trainable = _trainable_before(model) if trainable is None else trainable
    base = base_of(model)
    configs: dict[str, Any] = getattr(base, "peft_config", {})
    others = [name for name in configs if name != adapter_name]
    merged = _unmerged(base)  # it may have been merged before anyone has looked at it
    if others and any(adapter_name in layer.active_adapters for _, layer in adapted_linears(base, adapter_name)):
        names = [name for name in active if name in others] or others[:1]
        set_adapter(base, names, inference_mode=configs[names[0]].inference_mode, layer_cls=TRPTSLayer)
    _delete(base, adapter_name)
    _merge_again(merged, adapter_name)
    configs.pop(adapter_name, None)
    drop_idle_selections(base)
    for key, hook in list(base._forward_pre_hooks.items()):
        if isinstance(hook, LoadCheck) and (not others or hook.adapter_name == adapter_name):
            del base._forward_pre_hooks[key]
    _unwrap_idle(base)
    if not others:
        _strip(base, trainable)


def _delete(base: nn.Module, adapter_name: str) -> None:
    """As PEFT's function of that name, which refuses to where two adapters are in force."""
    for module in base.modules():
        if isinstance(module, TRPTSLayer):
            module.delete_adapter(adapter_name)
        elif isinstance(module, ModulesToSaveWrapper):
            module.delete_adapter(adapter_name, [name for name in module.active_adapters if name != adapter_name])


def _strip(base: nn.Module, trainable: frozenset[str]) -> None:
    """Undo what else an injection has done: no configs, trainable what was trainable."""
    if hasattr(base, "peft_config"):
        del cast(Any, base).peft_config
    if hasattr(base, "_hf_peft_config_loaded"):
        cast(Any, base)._hf_peft_config_loaded = False
    restore_trainable(base, trainable)


def _unwrap_idle(base: nn.Module) -> None:
    """Put the base's own modules in the places of wrappers that no adapter uses any more."""
    for name, module in list(base.named_modules()):
        if isinstance(module, TRPTSLinear) and not len(module.trpts_values):
            base.set_submodule(name, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and not len(module.modules_to_save):
            base.set_submodule(name, module.original_module)


def restore_modules(base: nn.Module) -> None:
    """Put the original modules in the places of what `modules_to_save` trains."""
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Names, not tensors: what is put back in their places trains as they did, compiled meanwhile or not."""
    return frozenset(name.replace(COMPILER, "") for name, p in model.named_parameters() if p.requires_grad)


def restore_trainable(base: nn.Module, trainable: frozenset[str]) -> None:
    """Let exactly the parameters of these names train."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.replace(COMPILER, "") in trainable)
