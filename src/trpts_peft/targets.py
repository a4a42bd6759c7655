"""What an adapter may be named and train: what cannot be is refused before anything is changed."""

from __future__ import annotations

import logging

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import TRPTSConfig
from .layer import TRPTSLinear

__all__ = ["check_adapter_name", "check_called", "check_target"]

logger = logging.getLogger(__name__)

# Parts of the names of tensors that PEFT, and the layers of this package, put around an adapter's.
_RESERVED = {"base_model", "model", "base_layer", "original_module", "modules_to_save", "token_selection"}
_RESERVED |= {*TRPTSLinear.adapter_layer_names, *TRPTSLinear.other_param_names, "trpts_keep_ppm"}


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name by which the tensors of the adapter could not be told from others.

    PEFT looks for it, between dots or at the end, in the names of all tensors: to leave out those of other adapters
    when one is saved, and to take it out of the names in the file.

    Args:
        model: the base model, perhaps with adapters.
        adapter_name: the name.
    """
    if "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(
            "`adapter_name` must have no dot, and be no name that torch's containers use, "
            f"got {adapter_name!r}: choose another."
        )
    if adapter_name in _RESERVED | _parts_of_names(model):
        raise ValueError(
            "`adapter_name` must be no part of the names of the model's tensors, where PEFT looks for it, got "
            f"{adapter_name!r}: pass another one."
        )


def _parts_of_names(model: nn.Module) -> set[str]:
    """What stands between the dots in the names of the model's tensors, but for names of adapters."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrappers = [(f"{name}.", module) for name, module in model.named_modules() if isinstance(module, kinds)]
    prefixes = tuple(prefix for prefix, _ in wrappers)
    adapters = {adapter for _, wrapper in wrappers for adapter in _adapters_of(wrapper)}
    names = [*(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_buffers())]
    within: set[str] = set()
    outside: set[str] = set()
    for name in names:
        (within if name.startswith(prefixes) else outside).update(name.split("."))
    return outside | (within - adapters)


def _adapters_of(wrapper: BaseTunerLayer | AuxiliaryTrainingWrapper) -> set[str]:
    found = wrapper._get_available_adapters if isinstance(wrapper, AuxiliaryTrainingWrapper) else None
    return set(found() if found else wrapper._all_available_adapter_names())


def check_called(name: str, parent: nn.Module) -> None:
    """Refuse a target that trains but is not heard in evaluation; name one that is never heard.

    torch's modules read the weights of linears inside them, in training (`nn.MultiheadAttention`) or on the fast path.
    """
    if isinstance(parent, nn.MultiheadAttention):
        logger.warning("nn.MultiheadAttention reads the weight of %s without a call: an adapter there is idle.", name)
    if not isinstance(parent, nn.TransformerEncoderLayer) or not torch.backends.mha.get_fastpath_enabled():
        return
    if type(parent).forward is nn.TransformerEncoderLayer.forward and parent.self_attn.batch_first:
        raise TypeError(
            f"`target_modules` must name linears that the model calls, got {name} of an nn.TransformerEncoderLayer, "
            "which reads its weights past any adapter in evaluation: call "
            "`torch.backends.mha.set_fastpath_enabled(False)` first, or list it in `exclude_modules`."
        )


def check_target(config: TRPTSConfig, name: str, module: nn.Module) -> None:
    """Refuse a target that is no linear, and a number of connections that it cannot have."""
    if not isinstance(module, nn.Linear):
        raise TypeError(
            f"`target_modules` must name nn.Linear modules, got {name} of type {type(module).__name__}, "
            "which is not supported: leave it out, or list it in `exclude_modules`."
        )
    if "weight" not in module._parameters:
        raise TypeError(
            f"`target_modules` must name linears with a weight of their own, got {name}, whose weight is computed from "
            "others at each call: remove the parametrization first."
        )
    if module.weight.is_meta and "_hf_hook" in vars(module):
        raise ValueError(
            f"`model` must hold the weights of the targeted linears, got {name}, which accelerate has offloaded: "
            'offload it with the adapter in it, `cpu_offload(model, preload_module_classes=["TRPTSLinear"])`.'
        )
    if not module.weight.is_floating_point() or module.weight.shape != (module.out_features, module.in_features):
        raise TypeError(
            f"`target_modules` must name linears with plain weights, got {name} of type {type(module).__name__} with "
            f"{module.weight.dtype} {tuple(module.weight.shape)}, which is not supported: load the model unquantized."
        )
    if config.connections is None:
        return
    count = config.connections.get(name)
    if count is None or count > module.in_features:
        outer = next((other for other in config.connections if other.endswith(f".{name}")), None)
        remedy = "use `calibrate` on this one" if outer is None else f"load it into that one, where this is {outer}"
        raise ValueError(
            f"`connections` must hold a number from 1 to {module.in_features} for {name}, got {count}: the config was "
            f"made for another model; {remedy}."
        )
