"""The adapter file: its compact form, and the checks that a file has to pass before anything of it is used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .config import TRPTSConfig
from .layer import TRPTSLinear
from .tuner_layer import MODEL_PREFIX
from .vit import AdapterTokenSelection, adapter_selections, in_millionths, of_millionths

__all__ = [
    "FLOATS",
    "check_adapter",
    "check_columns",
    "check_config",
    "check_file",
    "check_floats",
    "check_values",
    "pack_columns",
    "saved_module_tensors",
    "sizes_ignored",
    "unpack_columns",
    "without_base_tensors",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what values in a file may be

# A base of another dtype passes (bfloat16 rounds to within 2⁻⁹), another base does not.
_RTOL, _ATOL = 2.0**-7, 2.0**-24
_MOST_UINT16_INPUTS = 65_536
_ignores_sizes = ContextVar("ignore_mismatched_sizes", default=False)
_LOAD = "load the file with `PeftModel.from_pretrained(model, path, is_trainable=True)`"
_REMEDY = f"calibrate this model on the same data first, or {_LOAD}"


@contextmanager
def sizes_ignored(ignored: bool) -> Iterator[None]:
    """Within, if `ignored`, modules trained whole may have other shapes in the file: PEFT leaves those tensors out."""
    token = _ignores_sizes.set(ignored)
    try:
        yield
    finally:
        _ignores_sizes.reset(token)


def pack_columns(columns: Tensor, in_features: int) -> Tensor:
    """Columns (out, C) as the file holds them: uint16, or int32 above 65,536 inputs."""
    return columns.to(torch.uint16 if in_features <= _MOST_UINT16_INPUTS else torch.int32)


def unpack_columns(columns: Tensor) -> Tensor:
    """Columns as memory holds them: int64."""
    return columns.to(torch.int64)


def adapted_linears(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, TRPTSLinear]]:
    """The linears that the adapter trains, with their names in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, TRPTSLinear) and adapter_name in module.trpts_columns:
            yield name, module


def trained_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """What the adapter trains in them: values and biases."""
    return [part for _, layer in adapted_linears(model, adapter_name) for part in layer.trained_parts(adapter_name)]


def _refuse(name: str, rule: str, got: object, remedy: str) -> None:
    raise ValueError(f"The adapter's `{name}` must be {rule}, got {got}: {remedy}.")


def check_columns(name: str, columns: Tensor, in_features: int) -> None:
    """Refuse what are no columns (out_features, C) of a linear with so many inputs."""
    broken = "the file is damaged or was made for another model"
    if columns.dtype not in (torch.uint16, torch.int32, torch.int64):
        _refuse(name, "whole numbers", columns.dtype, broken)
    columns = unpack_columns(columns)
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= in_features:
        _refuse(name, f"from 0 to {in_features - 1}", f"{low} to {high}", broken)
    if not bool((columns.diff(dim=1) > 0).all()):
        _refuse(name, "ascending and distinct in each row", "other columns", broken)


def check_floats(name: str, values: Tensor) -> None:
    """Refuse integers, and floats of so few bits that torch cannot compute with them."""
    if values.dtype not in FLOATS:
        _refuse(name, "floating-point numbers of 16 bits or more", values.dtype, "the file is damaged")


def check_values(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Refuse what is not finite once it has the dtype that the model keeps it in."""
    check_floats(name, values)
    if not bool(values.to(dtype).isfinite().all()):
        _refuse(name, f"finite as {dtype}", "others", "the file is damaged, or its training diverged")


def _check_fingerprint(name: str, fingerprint: Tensor, layer: TRPTSLinear) -> None:
    if layer.base_layer.weight.is_meta:
        return
    base, stored = layer.base_fingerprint().cpu(), fingerprint.float().cpu()
    if not torch.allclose(base, stored, rtol=_RTOL, atol=_ATOL):
        _refuse(
            name,
            "that of this base model",
            "another one",
            "load the base that the adapter was calibrated on, or set `config.allow_other_base = True` on its loaded "
            "config and pass that as `config`",
        )


def _check_linear(name: str, layer: TRPTSLinear, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for part, own in expected.items():
        key = f"{name}.{part}"
        if part not in tensors:
            _refuse(key, "in the file", "a file without it", _REMEDY)
        if tensors[part].shape != own.shape:
            _refuse(key, f"of shape {tuple(own.shape)}", tuple(tensors[part].shape), _REMEDY)
    check_columns(f"{name}.trpts_columns", tensors["trpts_columns"], layer.in_features)
    check_floats(f"{name}.trpts_fingerprint", tensors["trpts_fingerprint"])
    for part in ("trpts_values", "trpts_bias"):
        if part in tensors:
            check_values(f"{name}.{part}", tensors[part], expected[part].dtype)


_PARTS = ("trpts_columns", "trpts_values", "trpts_bias", "trpts_fingerprint")


def _own_tensors(layer: TRPTSLinear, adapter_name: str) -> dict[str, Tensor]:
    containers = {part: getattr(layer, part) for part in _PARTS}
    return {part: container[adapter_name] for part, container in containers.items() if adapter_name in container}


def without_base_tensors(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file but those of the base model that are as it has them.

    PEFT saves embeddings, those of patches too, for who asks (`save_embedding_layers=True`).
    """
    suspects = [key for key in state_dict if ".trpts_" not in key and ".modules_to_save." not in key]
    base = model.state_dict() if suspects else {}
    equal = {key for key in suspects if key in base and _are_equal(state_dict[key], base[key])}
    return {key: tensor for key, tensor in state_dict.items() if key not in equal}


def _are_equal(stored: Tensor, own: Tensor) -> bool:
    """To the bit, or, where they differ in dtype, as the same base in two dtypes does."""
    if own.is_meta or stored.shape != own.shape or stored.dtype == own.dtype:
        return not own.is_meta and torch.equal(stored.to(own.device), own)
    return torch.allclose(stored.to(own.device).double(), own.double(), rtol=_RTOL, atol=_ATOL)


def check_file(model: nn.Module, config: TRPTSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Check the tensors of an adapter file against the model that is to take them. Nothing is changed.

    Args:
        model: the model, with the adapter injected.
        config: the adapter's config.
        adapter_name: its name.
        state_dict: the file's tensors under the model's keys.

    Raises:
        ValueError: as `check_state_dict`, or there is another tensor, which a loader would put into the base model or
            into another adapter, or drop.
    """
    for name, layer in adapted_linears(model, adapter_name):
        if layer.merged:
            _refuse(name, "unmerged while a file is loaded", "a merged one", "call `unmerge_adapter()` first")
    check_state_dict(model, config, adapter_name, state_dict)
    own = {
        f"{name}.{part}.{adapter_name}"
        for name, layer in adapted_linears(model, adapter_name)
        for part in _own_tensors(layer, adapter_name)
    }
    own |= set(_keep_rates(model, adapter_name)) | set(saved_module_tensors(model, adapter_name))
    embeddings = _embedding_keys(model)
    for key, tensor in state_dict.items():
        if key in embeddings:
            check_values(key, tensor, tensor.dtype)
    own |= embeddings
    _check_surplus(state_dict, {key.removeprefix(MODEL_PREFIX) for key in own}, _dropped(model, config))


def check_state_dict(
    model: nn.Module, config: TRPTSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Check an adapter's tensors in a state dict that may hold others; arguments as for `check_file`.

    Raises:
        ValueError: something is missing, of another shape, out of range, not finite, or made for another base.
    """
    _check_token_layers(model, config, adapter_name, state_dict)
    _check_linears(model, config, adapter_name)
    for name, layer in adapted_linears(model, adapter_name):
        keys = {part: f"{name}.{part}.{adapter_name}" for part in _PARTS}
        tensors = {part: state_dict[key] for part, key in keys.items() if key in state_dict}
        _check_linear(name, layer, tensors, _own_tensors(layer, adapter_name))
        if config.connections is not None and not config.allow_other_base:
            _check_fingerprint(f"{name}.trpts_fingerprint", tensors["trpts_fingerprint"], layer)
    _check_saved_modules(model, config, adapter_name, state_dict)


def _remedy_of_rates(
    model: nn.Module, config: TRPTSConfig, adapter_name: str, stored: Mapping[str, int], own: Mapping[str, int]
) -> str:
    """What to do where the tensors select tokens in other blocks, or at another rate, than the adapter."""
    if config.connections is None:
        return _REMEDY
    if any(adapter_name in layer.fresh for _, layer in adapted_linears(model, adapter_name)):
        return (
            "the tensors were saved with another `adapter_config.json`: restore that, and call "
            "`trpts_peft.set_keep_rate` once the adapter is loaded"
        )
    rates = set(stored.values())
    if stored.keys() == own.keys() and len(rates) == 1:
        rate = of_millionths(rates.pop())
        return f"call `trpts_peft.set_keep_rate(model, {rate!r}, {adapter_name!r})` first, or {_LOAD}"
    return _REMEDY


def _check_surplus(state_dict: Mapping[str, Tensor], own: Collection[str], dropped: tuple[str, ...]) -> None:
    names = sorted(key.removeprefix(MODEL_PREFIX) for key in state_dict)
    surplus = [name for name in names if name not in own and not name.startswith(dropped)]
    if surplus:
        of_its_kind = surplus[0].rpartition(".")[2] in _PARTS  # a file of other settings, perhaps to resume from
        remedy = _REMEDY if of_its_kind else "the file is damaged or was made for another model"
        _refuse(surplus[0], "absent, since this adapter has none", f"{len(surplus)} such tensors", remedy)


def _embedding_keys(model: nn.Module) -> set[str]:
    """Embeddings of words, which PEFT saves with an adapter where the vocabulary was resized; patches have none."""
    words = []
    for end in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # models that have none say so in either way
            words.append(getattr(model, f"get_{end}_embeddings")())
    words = [module for module in words if isinstance(module, (nn.Embedding, nn.Linear))]
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if any(module is other for other in words)
        for key in module.state_dict()
    }


def _dropped(model: nn.Module, config: TRPTSConfig) -> tuple[str, ...]:
    """Where a model has lost what the config names in `modules_to_save`, such as its head, there is nothing to load."""
    modules = {name.removeprefix(MODEL_PREFIX): module for name, module in model.named_modules()}
    lost = (
        name
        for name, module in modules.items()
        if isinstance(module, ModulesToSaveWrapper) and not module.original_module.state_dict()
    )
    return tuple(f"{name}." for name in lost if name.rpartition(".")[2] in (config.modules_to_save or ()))


def _check_linears(model: nn.Module, config: TRPTSConfig, adapter_name: str) -> None:
    if config.connections is None:
        return
    adapted = {name.removeprefix(MODEL_PREFIX) for name, _ in adapted_linears(model, adapter_name)}
    if difference := sorted(adapted ^ set(config.connections)):
        broken = "its `adapter_config.json` is damaged or was made for another model"
        _refuse("connections", "of exactly the adapted linears", f"a difference in {difference[:4]}", broken)


def _keep_rates(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """The keep rates of an adapter's token layers, in millionths, by their keys in the model's state dict."""
    return {
        f"{name}.trpts_keep_ppm.{adapter_name}": in_millionths(rate)
        for name, module in model.named_modules()
        if isinstance(module, AdapterTokenSelection) and (rate := module.own_rate(adapter_name)) is not None
    }


def check_config(model: nn.Module, config: TRPTSConfig, adapter_name: str) -> None:
    """Refuse to write an adapter beside a config that says otherwise: nobody could load it.

    Raises:
        ValueError: something was assigned to the config that the adapter does not follow.
    """
    own, again = "that of the adapter", "assign the former again"
    token_layers = []
    for index, selection in adapter_selections(model).items():
        rate = selection.own_rate(adapter_name)
        if rate is not None:
            token_layers.append(index)
            if in_millionths(rate) != in_millionths(config.keep_rate):
                remedy = f"call `trpts_peft.set_keep_rate`, or {again}"
                _refuse("config.keep_rate", f"{own}, {rate:g}", config.keep_rate, remedy)
            record = selection.trpts_keep_ppm[adapter_name]
            here = not record.is_meta and adapter_name not in selection.awaited
            if here and int(record) != in_millionths(rate):
                rule = f"the rate in millionths, {in_millionths(rate)}"
                remedy = "after a loader that exchanges tensors call `model.eval()`, or `trpts_peft.set_keep_rate`"
                _refuse("trpts_keep_ppm", rule, int(record), remedy)
    if token_layers != sorted(config.fixed_token_layers):
        _refuse("config.token_layers", f"{own}, {token_layers}", sorted(config.fixed_token_layers), again)
    for _, layer in adapted_linears(model, adapter_name):
        trains_bias = adapter_name in layer.trpts_bias
        if layer.base_layer.bias is not None and trains_bias != config.train_bias:
            _refuse("config.train_bias", f"{own}, {trains_bias}", config.train_bias, again)
        count = layer.trpts_columns[adapter_name].shape[1]
        if config.connections is None and count != (initial := min(config.initial_connections, layer.in_features)):
            _refuse("config.min_connections", f"{own}: {count} inputs per neuron", initial, again)


def _check_token_layers(
    model: nn.Module, config: TRPTSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    endings = (f".trpts_keep_ppm.{adapter_name}", ".trpts_keep_ppm")
    tensors = {key: value for key, value in state_dict.items() if key.endswith(endings)}
    for key, value in tensors.items():
        if value.dim() > 0 or value.dtype not in (torch.int64, torch.int32):
            _refuse(key, "a whole number", f"{tuple(value.shape)} of {value.dtype}", "the file is damaged")
    stored, own = {key: int(value) for key, value in tensors.items()}, _keep_rates(model, adapter_name)
    stored = {key.removeprefix(MODEL_PREFIX): value for key, value in stored.items()}
    own = {key.removeprefix(MODEL_PREFIX): value for key, value in own.items()}
    if stored != own:
        remedy = _remedy_of_rates(model, config, adapter_name, stored, own)
        _refuse("token layers", f"those of this adapter, {_read(own)}", _read(stored), remedy)


def _read(rates: Mapping[str, int]) -> str:
    named = (f"{key.partition('.token_selection')[0]} at {ppm / 1e6:g}" for key, ppm in sorted(rates.items()))
    return ", ".join(named) or "none"


def _check_saved_modules(
    model: nn.Module, config: TRPTSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Modules trained whole, such as the head. Another base may have another head: PEFT decides about its shape."""
    for key, own in saved_module_tensors(model, adapter_name).items():
        if key not in state_dict:
            continue
        if state_dict[key].shape != own.shape and not config.allow_other_base and not _ignores_sizes.get():
            loading = "`PeftModel.from_pretrained(..., ignore_mismatched_sizes=True)`"
            remedy = f"load a base model with this head, as with `num_labels`, or the adapter by {loading}"
            _refuse(key, f"of shape {tuple(own.shape)}", tuple(state_dict[key].shape), remedy)
        if isinstance(own, nn.Parameter) and own.is_floating_point():  # a buffer may well hold an infinite mask
            check_values(key, state_dict[key], own.dtype)
        elif state_dict[key].dtype != own.dtype:
            _refuse(key, f"of {own.dtype}", state_dict[key].dtype, "the file is damaged")


def saved_module_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's `modules_to_save`, by their keys in the model's state dict."""
    return {
        f"{name}.modules_to_save.{adapter_name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict(keep_vars=True).items()
    }


def parts_of(model: nn.Module, adapter_name: str) -> list[TRPTSLinear | AdapterTokenSelection]:
    """The modules that hold something of the adapter's: its linears and its token selections."""
    linears = [layer for _, layer in adapted_linears(model, adapter_name)]
    return [*linears, *(m for m in model.modules() if isinstance(m, AdapterTokenSelection))]


def check_adapter(model: nn.Module, config: TRPTSConfig, adapter_name: str) -> None:
    """Check an adapter that a loader may have put into the model without passing by `check_state_dict`.

    Raises:
        ValueError: as `check_state_dict`, or only a part of the adapter was loaded.
    """
    parameters = trained_parameters(model, adapter_name)
    saved = saved_module_tensors(model, adapter_name).values()
    parameters += [tensor for tensor in saved if isinstance(tensor, nn.Parameter)]
    # Set by transformers' loader; it stays on parameters as the model moves, on buffers it does not.
    loaded = [getattr(parameter, "_is_hf_initialized", False) for parameter in parameters]
    if any(loaded) and not all(loaded):
        missing = f"{len(loaded) - sum(loaded)} of {len(loaded)} missing"
        _refuse("parameters", "all in the file", missing, "the file does not fit its `adapter_config.json`")
    if not any(loaded) and config.connections is not None:
        for part in parts_of(model, adapter_name):
            part.expect_no_file(adapter_name)
    check_state_dict(model, config, adapter_name, model.state_dict())
