"""What PEFT asks of a method: the tuner."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from accelerate.utils import is_compiled_module
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from .checkpoint import (
    adapted_linears,
    check_config,
    check_file,
    pack_columns,
    parts_of,
    saved_module_tensors,
    trained_parameters,
    unpack_columns,
    without_base_tensors,
)
from .compiled import COMPILER, force_eager, has_compilers, without_compilers, without_names_of_compilers
from .config import TRPTSConfig
from .data import check_loading, check_whole
from .families import FAMILIES
from .layer import TRPTSLinear
from .merging import base_parameter
from .sparse_linear import digest
from .targets import check_adapter_name, check_called, check_target
from .token_layers import check_saved_modules, check_token_layers
from .traversal import Found, find_modules, is_offloaded, on_each, tuner_layers
from .tuner_layer import PREFIX, TRPTSLayer
from .vit import (
    AdapterTokenSelection,
    adapter_selections,
    apply_token_selection,
    check_no_fixed_selection,
    drop_idle_selections,
    forget_token_selection,
    install_keep_rates,
    keep_rates_in_force,
    remove_token_selection,
)
from .weighted import add_weighted_adapter
from .withdrawal import LoadCheck, restore_modules, restore_trainable, trainable_names

__all__ = ["TRPTSModel"]

logger = logging.getLogger(__name__)

_TARGETS = {family.model_type: list(family.target_modules) for family in FAMILIES}


class TRPTSModel(BaseTuner):
    """The tuner of TR-PTS, made by `get_peft_model(model, TRPTSConfig(...))`; `calibrate` decides what it trains."""

    prefix: str = PREFIX
    tuner_layer_cls = TRPTSLayer
    target_module_mapping = _TARGETS

    # ---- injection ----

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.trainable_before = trainable_names(model)
        active = next((tuple(m.active_adapters) for m in model.modules() if isinstance(m, TRPTSLayer)), ())
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if isinstance(peft_config, TRPTSConfig):
            # Injected without a PeftModel, perhaps by transformers' `load_adapter`, which calls none of our hooks.
            check = LoadCheck(adapter_name, self.trainable_before, active, has_compilers(model))
            model.register_forward_pre_hook(check)
            if peft_config.connections is not None:
                for part in parts_of(model, adapter_name):
                    part.expect_file(adapter_name)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse a config that does not fit the model before anything is changed."""
        check_loading()
        layers = peft_config.fixed_token_layers
        if layers:
            argument = "token_layers" if peft_config.selected_token_layers is None else "selected_token_layers"
            check_token_layers(model, layers, argument)
        if layers or (peft_config.connections is None and peft_config.token_layers):
            check_no_fixed_selection(model)
        check_saved_modules(model, peft_config.modules_to_save or ())
        targets = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if name.startswith(adapted) or not self._check_target_module_exists(targets, name):
                continue
            check_called(name, model.get_submodule(name.rpartition(".")[0]))
            check_target(peft_config, name, module.get_base_layer() if isinstance(module, TRPTSLinear) else module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adapt the targeted linears, and let the known token layers select tokens."""
        check_adapter_name(model, adapter_name)
        with without_compilers(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = cast(TRPTSConfig, self.peft_config[adapter_name])
        cast(Any, model).peft_config = self.peft_config  # as PEFT does behind this; token selections hold on to it
        install_keep_rates(model, adapter_name, dict.fromkeys(config.fixed_token_layers, config.keep_rate))
        if config.connections is None:
            logger.warning(
                "TR-PTS adapter '%s' is not calibrated yet: each neuron trains its %d input(s) of largest weight until "
                "`trpts_peft.calibrate(model, train_dataset)` chooses them for the task.",
                adapter_name,
                config.initial_connections,
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(target, TRPTSLinear):
            check_target(peft_config, current_key, target)
            layer = TRPTSLinear(cast(nn.Linear, target))
            layer._active_adapter = adapter_name
        assert isinstance(layer, TRPTSLinear)
        layer.update_layer(
            adapter_name,
            layer.magnitude_columns(_count(peft_config, current_key, layer.in_features)),
            train_bias=peft_config.train_bias,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
        )
        layer.fresh[adapter_name] = digest(layer.trpts_columns[adapter_name])
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """No more than that: PEFT's takes the weight of whatever is unwrapped, and a head of two layers has none."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT does; what it makes anew would train, even where the adapter is inactive or for inference."""
        trains = [parameter.requires_grad for parameter in trained_parameters(self.model, adapter_name)]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for parameter, flag in zip(trained_parameters(self.model, adapter_name), trains, strict=True):
            parameter.requires_grad_(flag)

    # ---- forward ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, one per sample, to every layer that has to know them."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_mixed_batch(adapter_names)

        def pass_names(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": adapter_names}

        takers = [m for m in self.modules() if isinstance(m, (TRPTSLinear, AuxiliaryTrainingWrapper))]
        with ExitStack() as stack:
            try:
                stack.enter_context(force_eager())
            except RuntimeError as error:
                raise ValueError(
                    "`adapter_names` must be passed to a model that is not compiled as a whole, got "
                    f'{sorted(set(adapter_names))} for one: call it within `torch.compiler.set_stance("force_eager")`.'
                ) from error
            for taker in takers:
                stack.callback(taker.register_forward_pre_hook(pass_names, with_kwargs=True).remove)
            yield

    def _check_mixed_batch(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        for selection in adapter_selections(self.model).values():
            if selection.enabled:
                selection.rate_of(adapter_names)  # samples of one batch must keep equally many tokens
                if selection.rate_of(adapter_names[:1]) != selection.keep_rate:
                    raise ValueError(
                        "`adapter_names` must name adapters that select tokens like the active one, got "
                        f"{sorted(set(adapter_names))}: call `set_token_selection(model, False)` first."
                    )

    # ---- several adapters ----

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several that select tokens alike; their updates add up."""
        found = find_modules(self.model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        self._check_alike([adapter_name] if isinstance(adapter_name, str) else adapter_name, found)
        for wrapper in found:
            if isinstance(wrapper, ModulesToSaveWrapper):  # of two heads one is in force, which is said before any is
                wrapper.check_set_adapter(adapter_name)
        # In reverse, for what is merged is unmerged, as in `unmerge_adapter`.
        set_adapter(Found(found[::-1]), adapter_name, inference_mode=inference_mode, layer_cls=TRPTSLayer)
        self.active_adapter = adapter_name

    def disable_adapter_layers(self) -> None:
        """As of any method; what is merged is unmerged first, in the order that two which share a weight need."""
        merged = [layer for layer in tuner_layers(self.model) if layer.merged]
        _check_present(merged)
        on_each(reversed(merged), lambda layer: layer.unmerge())
        super().disable_adapter_layers()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the updates of the active (or the named) adapters into the base weights; `unmerge_adapter` is exact."""
        layers = tuner_layers(self.model)
        names = self._check_merge(layers, adapter_names, safe_merge)
        self._check_merge_allowed()
        on_each(layers, lambda layer: layer.merge(safe_merge, adapter_names))
        if adapter_names is not None:
            _warn_of_other_copies(self.model, names)

    def unmerge_adapter(self) -> None:
        """Put back the base weights that merging has overwritten, to the bit."""
        layers = tuner_layers(self.model)
        _check_present(layers)
        on_each(reversed(layers), lambda layer: layer.unmerge())  # two may share a weight, merged one after the other

    def _check_merge(self, layers: list[Any], adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """Refuse before any layer is merged; returns the adapters that are merged then, those of before included."""
        if set(adapter_names or ()) - set(self.peft_config):
            raise ValueError(
                f"`adapter_names` must be a list of adapters of the model, got {adapter_names!r}: it has "
                f"{list(self.peft_config)}."
            )
        _check_whole(layers)
        wanted = adapter_names or self.active_adapters
        names = _merged_with(layers, wanted)
        self._check_alike(names, layers)
        if safe_merge:
            _check_entries(layers, wanted)
        return names

    def _check_merge_allowed(self) -> None:
        """As PEFT's, which composes its warning of tied embeddings before it asks whether one is adapted."""
        if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in self.targeted_module_names):
            super()._check_merge_allowed()  # type: ignore[no-untyped-call]

    def _check_alike(self, adapter_names: list[str], layers: list[Any] | None = None) -> None:
        for layer in tuner_layers(self.model) if layers is None else layers:
            if isinstance(layer, AdapterTokenSelection) and layer.enabled:
                layer.rate_of([name for name in adapter_names if name in layer.keep_rates])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; blocks in which no other one selects tokens become stock blocks again."""
        others = [name for name in self.active_adapters if name != adapter_name]
        wrappers = find_modules(self.model, (ModulesToSaveWrapper,)) if len(others) > 1 else []
        if any(adapter_name in wrapper.modules_to_save for wrapper in wrappers):  # PEFT would stop half-way
            raise ValueError(
                f"`adapter_name` must not train a whole module while two others are active, got {adapter_name!r} "
                f"beside {others}: activate one adapter first, by `set_adapter`."
            )
        super().delete_adapter(adapter_name)
        drop_idle_selections(self.model)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the weighted sum of adapters as a new one; see `trpts_peft.weighted.add_weighted_adapter`."""
        with without_compilers(self):
            add_weighted_adapter(self, adapters, weights, adapter_name)

    def train(self, mode: bool = True) -> TRPTSModel:
        """As of any module; says so where an adapter is about to train with no more than the config of another."""
        for name, config in self.peft_config.items() if mode else ():
            if cast(TRPTSConfig, config).connections is not None and not self._is_chosen(name):
                logger.warning(
                    "TR-PTS adapter '%s' is not calibrated: its config has the results of another one, of which it "
                    "takes the numbers of inputs, but its inputs are those of largest weight. Call "
                    "`trpts_peft.calibrate(model, train_dataset)`.",
                    name,
                )
        super().train(mode)
        return self

    def _is_chosen(self, adapter_name: str) -> bool:
        _, layer = next(adapted_linears(self.model, adapter_name), (None, None))
        return layer is None or layer.is_chosen(adapter_name)

    def extra_repr(self) -> str:
        waiting = [
            name
            for name, config in self.peft_config.items()
            if cast(TRPTSConfig, config).connections is None or not self._is_chosen(name)
        ]
        return f"not calibrated: {', '.join(waiting)}" if waiting else ""

    # ---- leaving PEFT ----

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_token_selection: bool = True,
    ) -> nn.Module:
        """Merge, and return the base model, which goes on selecting tokens: its outputs are those of the adapter.

        Args:
            progressbar: show one.
            safe_merge: check for values that are not finite first.
            adapter_names: the adapters to merge; None: the active ones.
            keep_token_selection: False returns a plain model, whose outputs differ where tokens were selected. True
                leaves the rates in `config.trpts_keep_rates`, for `apply_token_selection` after `from_pretrained`.
        """
        names = self._check_merge(tuner_layers(self.model), adapter_names, safe_merge)
        _take_copies_of(self.model, names)
        rates = {
            index: rate
            for index, selection in adapter_selections(self.model).items()
            if selection.enabled and (rate := selection.rate_of(names)) is not None
        }
        model: nn.Module = super().merge_and_unload(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        remove_token_selection(model)
        if not keep_token_selection:
            rates = rates or keep_rates_in_force(model)  # those that the base had before, too
            forget_token_selection(model)
            if rates:
                logger.warning("Token selection is dropped: the outputs of the merged model differ from the adapter's.")
        elif rates:
            apply_token_selection(model, rates)
        return model

    def unload(self) -> nn.Module:
        """Return the base model as it was before any adapter, its own head and what was trainable included."""
        if any(module.merged for module in self.model.modules() if isinstance(module, TRPTSLinear)):
            self.unmerge_adapter()
        with without_compilers(self.model):  # a compiler that is left around a head goes on with the one it was given
            restore_modules(self.model)
        model: nn.Module = super().unload()
        remove_token_selection(model)
        restore_trainable(model, self.trainable_before)
        return model

    # ---- files ----

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        check_config(model, config, adapter_name)
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name, layer in adapted_linears(model, adapter_name):
            name = name.replace("_fsdp_wrapped_module.", "")  # FSDP leaves its own name out of a state dict
            key = f"{name}.trpts_columns.{adapter_name}"
            if key in tensors:
                tensors[key] = pack_columns(tensors[key], layer.in_features)
                key = f"{name}.trpts_fingerprint.{adapter_name}"
                tensors[key] = tensors[key].float()
            elif state_dict:  # PEFT would save the adapter without it; processes that do not save pass an empty one
                raise ValueError(
                    f"`state_dict` must hold {key}, got none of that name: a wrapper has renamed the module, as FSDP's "
                    "activation checkpointing does; use `gradient_checkpointing=True` of `TrainingArguments` instead."
                )
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_names_of_compilers(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        inner = cast(Any, model)._orig_mod if is_compiled_module(model) else model
        with without_compilers(inner):
            tensors = {name.replace(COMPILER, ""): tensor for name, tensor in state_dict.items()}
            tensors = cls._checked(inner, config, adapter_name, tensors)
        names = {name.replace(COMPILER, ""): name for name in model.state_dict()} if has_compilers(model) else {}
        return {names.get(name, name): tensor for name, tensor in tensors.items()}

    @classmethod
    def _checked(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file under the names that they have in the model itself, as memory holds them."""
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tensors = without_base_tensors(model, tensors)
        check_file(model, config, adapter_name, tensors)
        for name, layer in adapted_linears(model, adapter_name):
            key = f"{name}.trpts_columns.{adapter_name}"
            tensors[key] = unpack_columns(tensors[key])
            if config.allow_other_base:  # the base was accepted: it is the adapter's from now on
                tensors[f"{name}.trpts_fingerprint.{adapter_name}"] = layer.base_fingerprint()
            layer.fresh.pop(adapter_name, None)
        for key, own in saved_module_tensors(model, adapter_name).items():
            if key in tensors:
                tensors[key] = tensors[key].to(own.dtype)  # loading on meta would keep the dtype of the file
        return tensors


def _check_whole(layers: list[Any]) -> None:
    """Refuse sharded layers. The first linear tells: whatever shards a model takes all of its parameters."""
    check_whole(next(layer for layer in layers if isinstance(layer, TRPTSLinear)))
    _check_present(layers)


def _check_present(layers: list[Any]) -> None:
    """Refuse to merge where a weight cannot be written, before any is; `on_each` fetches those of base layers."""
    for layer in layers:
        if type(layer) is TRPTSLinear:
            base = cast(nn.Module, layer._modules["base_layer"])
            weight = base._parameters.get("weight")
            if (weight is None or weight.is_meta) and not is_offloaded(layer):
                base_parameter(base, "weight")


def _merged_with(layers: list[Any], adapter_names: list[str]) -> list[str]:
    """The adapters that are merged into linears already and those that are to be, in this order."""
    merged = [name for layer in layers if isinstance(layer, TRPTSLinear) for name in layer.merged_adapters]
    return list(dict.fromkeys([*merged, *adapter_names]))


def _holders(wrapper: Any, adapter_names: list[str]) -> list[str]:
    """Those of the adapters that train a copy of the wrapped module."""
    return [adapter for adapter in adapter_names if adapter in wrapper.modules_to_save]


def _take_copies_of(model: nn.Module, adapter_names: list[str]) -> None:
    """Have the modules that merged adapters train whole, such as the head, stay when PEFT unwraps them.

    Raises:
        ValueError: two of the adapters train the same one. Nothing is changed.
    """
    wrappers = find_modules(model, (ModulesToSaveWrapper,))
    for wrapper in wrappers:
        if len(holders := _holders(wrapper, adapter_names)) > 1:
            raise ValueError(
                f"`adapter_names` must name one adapter that trains {_name_of(model, wrapper)} whole, merged ones "
                f"included, got {holders}: merge one of them, after `unmerge_adapter()`, or their weighted sum."
            )
    for wrapper in wrappers:
        wrapper._active_adapter = next(iter(_holders(wrapper, adapter_names)), [])


def _warn_of_other_copies(model: nn.Module, adapter_names: list[str]) -> None:
    wrappers = find_modules(model, (ModulesToSaveWrapper,))
    others = [wrapper for wrapper in wrappers if _holders(wrapper, adapter_names) != wrapper.active_adapters]
    if others:
        logger.warning(
            "Adapters %s are merged, but %s stays that of the active one: only `set_adapter` changes it.",
            adapter_names,
            _name_of(model, others[0]),
        )


def _name_of(model: nn.Module, module: nn.Module) -> str:
    name: str = next(name for name, other in model.named_modules() if other is module)
    return name


def _check_entries(layers: list[Any], adapter_names: list[str]) -> None:
    """Refuse before any layer is merged: a model merged by half is of no use."""
    linears = (layer for layer in layers if isinstance(layer, TRPTSLinear))
    on_each(linears, lambda layer: layer.check_merge([n for n in adapter_names if n not in layer.merged_adapters]))


def _count(config: TRPTSConfig, name: str, in_features: int) -> int:
    if config.connections is not None:
        return config.connections[name]
    return min(config.initial_connections, in_features)
