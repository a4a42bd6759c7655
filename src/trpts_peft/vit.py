"""Token selection in a Hugging Face ViT: at which rate its blocks select, for whom, and whether at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .families import find_blocks, num_prefix_tokens
from .functional import select_and_merge
from .selecting_blocks import CHILD, blocks_of, refresh_classes
from .token_layers import check_token_layers
from .tuner_layer import TRPTSLayer, integers_stay, is_unchanged, version

__all__ = [
    "AdapterTokenSelection",
    "TokenSelection",
    "apply_token_selection",
    "check_rates",
    "install_keep_rates",
    "keep_rates_in_force",
    "remove_token_selection",
    "set_token_selection",
    "token_selections",
]

_CONFIG_KEY = "trpts_keep_rates"
_MILLION = 1_000_000


def in_millionths(rate: float) -> int:
    """A keep rate as the file holds it."""
    return round(rate * _MILLION)


def of_millionths(record: int) -> float:
    """The rate of a record: the simplest fraction that it is rounded from, so that 1/3 does not come back as less."""
    simplest = float(Fraction(record, _MILLION).limit_denominator(1000))
    return simplest if in_millionths(simplest) == record else record / _MILLION


class TokenSelection(nn.Module):
    """The token selection of one block at a fixed rate; forward hooks on it see all that it does."""

    def __init__(self, num_prefix_tokens: int, keep_rate: float | None = None) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.fixed_keep_rate = keep_rate
        self.enabled = True

    @property
    def keep_rate(self) -> float | None:
        """The rate in force, in (0, 1); None where all tokens stay."""
        return self._below_one(self.fixed_keep_rate) if self.enabled else None

    @staticmethod
    def _below_one(rate: float | None) -> float | None:
        return rate if rate is not None and rate < 1 else None

    @property
    def selects(self) -> bool:
        """Whether the block needs a class that selects tokens."""
        return True

    def forward(self, hidden_states: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """`functional.select_and_merge` at the rate in force."""
        rate = self.keep_rate
        return select_and_merge(hidden_states, importance, 1.0 if rate is None else rate, self.num_prefix_tokens)


def _is_rate(record: Tensor) -> bool:
    """Whether a loader has put one where `expect_file` has put none."""
    return not record.is_meta and int(record) >= 0


def _follow_loaded_rates(selection: nn.Module, _incompatible_keys: object) -> None:
    """Put the rates that any `load_state_dict` has brought in force."""
    assert isinstance(selection, AdapterTokenSelection)
    records = selection.trpts_keep_ppm
    selection.awaited = {name for name in selection.awaited if not _is_rate(records[name])}
    selection.follow_records()


class AdapterTokenSelection(TokenSelection, TRPTSLayer):
    """The token selection of one block at the rate of whichever adapter is in force."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("keep_rates", "trpts_keep_ppm")

    def __init__(
        self, num_prefix_tokens: int, blocks: tuple[nn.Module, ...] = (), configs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(num_prefix_tokens)
        self._configs = {} if configs is None else configs  # the model's `peft_config`, to follow what is loaded
        self._blocks = blocks  # of the model, to restore their classes; a tuple, so that they are no child modules
        # Of every adapter; None for one that selects nothing here. As text, which compilers take for constant: a float
        # that has changed is a variable to them, and so would be the number of tokens.
        self.keep_rates: dict[str, str | None] = {}
        # The rate in millionths, for the file: an adapter can be told from one with other token layers.
        self.trpts_keep_ppm = BufferDict(persistent=True)
        self._followed: dict[str, tuple[Tensor, int]] = {}  # the records that were looked at, and their version
        self.awaited: set[str] = set()  # adapters whose records are yet to come from a file, and to be checked
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.register_load_state_dict_post_hook(_follow_loaded_rates)  # type: ignore[no-untyped-call]

    @property
    def keep_rate(self) -> float | None:
        """The rate of the adapters in force, None where all tokens stay.

        Raises:
            ValueError: two adapters in force differ in their rate.
        """
        if self.disable_adapters or not self.enabled:
            return None
        return self.rate_of(self.merged_adapters or self.active_adapters)

    def own_rate(self, adapter_name: str) -> float | None:
        """The rate of an adapter here, None if it selects nothing in this block."""
        text = self.keep_rates.get(adapter_name)
        return None if text is None else float(text)

    def rate_of(self, adapter_names: list[str]) -> float | None:
        """The rate below one that the named adapters share in this block; None if all tokens stay."""
        rates = [self._below_one(self.own_rate(name)) for name in adapter_names]
        if any(rate != rates[0] for rate in rates):
            raise ValueError(
                "Adapters used together must select tokens alike, got in one block the rates "
                f"{dict(zip(adapter_names, rates, strict=True))}: use them one at a time, or call "
                "`set_token_selection(model, False)` first."
            )
        return rates[0] if rates else None

    @property
    def weight(self) -> Tensor:
        """There is none; PEFT's property would look for it without end."""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")

    @property
    def bias(self) -> Tensor:
        """There is none."""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'bias'")

    def set_rate(self, adapter_name: str, rate: float | None) -> None:
        """Set the rate of an adapter here; None if it selects nothing in this block."""
        self.keep_rates[adapter_name] = None if rate is None else repr(float(rate))
        self.awaited.discard(adapter_name)
        if rate is not None:
            self.trpts_keep_ppm[adapter_name] = torch.tensor(in_millionths(rate), device=self._device())
        elif adapter_name in self.trpts_keep_ppm:
            del self.trpts_keep_ppm[adapter_name]

    def follow_records(self) -> None:
        """Put the rates that a loader has brought in force, and into the configs: the records alone are in a file."""
        for name, record in self.trpts_keep_ppm.items():
            rate = self.own_rate(name)
            there = type(record) is Tensor and not record.is_meta  # and does not stand for another
            if rate is None or not there or name in self.awaited or is_unchanged(record, self._followed.get(name)):
                continue
            self._followed[name] = record, version(record)  # to look into it makes a GPU wait
            if int(record) != in_millionths(rate) and 0 < int(record) <= _MILLION:
                rate = of_millionths(int(record))
                self.keep_rates[name] = repr(rate)
                if name in self._configs and self._configs[name].keep_rate != rate:
                    self._configs[name] = copy.copy(self._configs[name])
                    self._configs[name].keep_rate = rate

    def follow_configs(self, model: nn.Module) -> None:
        """Take the configs of the model's adapters for those to bring up to date; transformers exchanges the dict."""
        self._configs = getattr(model, "peft_config", self._configs)

    def train(self, mode: bool = True) -> AdapterTokenSelection:
        """As of any module; follows what a loader has left behind that exchanged tensors past `load_state_dict`."""
        if not torch.compiler.is_compiling():
            self.follow_records()
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks anew: its tensors count their writes anew."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_followed": {}}

    def _device(self) -> torch.device | None:
        """That of the blocks: DDP hands buffers around on one device."""
        return next(self._blocks[0].parameters()).device if self._blocks else None

    def expect_file(self, adapter_name: str) -> None:
        """Put a value that no file holds where a loader has to put the file's."""
        if adapter_name in self.trpts_keep_ppm:
            self.trpts_keep_ppm[adapter_name] = torch.tensor(-1)
            self.awaited.add(adapter_name)

    def expect_no_file(self, adapter_name: str) -> None:
        """Take `expect_file` back, unless it was answered."""
        if adapter_name in self.trpts_keep_ppm and _is_rate(self.trpts_keep_ppm[adapter_name]):
            self.awaited.discard(adapter_name)
            self.follow_records()
        else:
            self.set_rate(adapter_name, self.own_rate(adapter_name))

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterTokenSelection:
        """As of any module, but rates stay whole numbers."""
        super()._apply(integers_stay(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def follow(self, layer: TRPTSLayer) -> None:
        """Take over from another layer which adapter is active, and whether it is disabled."""
        self._active_adapter = list(layer.active_adapters)
        self._disable_adapters = layer.disable_adapters

    def enable_adapters(self, enabled: bool) -> None:
        """Follow `disable_adapter` and its end."""
        super().enable_adapters(enabled)
        # A disabled linear unmerges, at once or, merged meanwhile, in the next pass.
        gone = self._unmerged_in_linears() if enabled and self.merged_adapters else set(self.merged_adapters)
        self.merged_adapters = [name for name in self.merged_adapters if name not in gone]

    def _unmerged_in_linears(self) -> set[str]:
        layers = (m for block in self._blocks for m in block.modules() if isinstance(m, TRPTSLayer))
        linears = [layer for layer in layers if not isinstance(layer, TokenSelection)]
        return {n for m in linears for n in m._all_available_adapter_names() if n not in m.merged_adapters}

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget the adapter; blocks in which no other one selects tokens get their stock classes back."""
        super().delete_adapter(adapter_name)
        self.awaited.discard(adapter_name)
        refresh_classes(self._blocks)

    @property
    def selects(self) -> bool:
        """Whether some adapter, active or not, selects tokens here."""
        return any(rate is not None for rate in self.keep_rates.values())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to write: only remember whose rate is in force."""
        names = dict.fromkeys(check_adapters_to_merge(cast(Any, self), adapter_names))
        self.merged_adapters.extend(name for name in names if name in self.keep_rates)

    def unmerge(self) -> None:
        """Follow the active adapters again."""
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """LoRA cannot drop tokens."""
        return self.own_rate(adapter_name) is None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the record that a loader brought to the blocks: DDP hands buffers around on one device."""
        target = self._device() if device is None else device
        if adapter_name in self.trpts_keep_ppm and target is not None and target.type != "meta":
            self.trpts_keep_ppm[adapter_name] = self.trpts_keep_ppm[adapter_name].to(target)

    def extra_repr(self) -> str:
        return f"keep_rates={self.keep_rates}"


def token_selections(model: nn.Module) -> dict[int, TokenSelection]:
    """{block index: its token selection}, for the blocks that have one."""
    found = {index: getattr(block, CHILD, None) for index, (_, block) in enumerate(find_blocks(model))}
    return {index: selection for index, selection in found.items() if selection is not None}


def adapter_selections(model: nn.Module) -> dict[int, AdapterTokenSelection]:
    """The same for those that follow adapters, not a fixed rate."""
    return {i: s for i, s in token_selections(model).items() if isinstance(s, AdapterTokenSelection)}


def keep_rates_in_force(model: nn.Module) -> dict[int, float]:
    """{block index: rate} of the blocks that select tokens as the model stands."""
    rates = {index: selection.keep_rate for index, selection in token_selections(model).items()}
    return {index: rate for index, rate in rates.items() if rate is not None}


def _new_selection(model: nn.Module) -> AdapterTokenSelection:
    """A token selection that knows the adapters of the model, all with no rate, and which of them is in force."""
    selection = AdapterTokenSelection(num_prefix_tokens(model), blocks_of(model), getattr(model, "peft_config", None))
    for module in model.modules():
        if isinstance(module, AdapterTokenSelection):
            selection.enabled = module.enabled
        elif isinstance(module, TRPTSLayer):
            selection.follow(module)
            for name in module._all_available_adapter_names():
                selection.keep_rates.setdefault(name, None)
    return selection


def check_rates(model: nn.Module, adapter_name: str, rates: Mapping[int, float]) -> None:
    """Refuse rates of an adapter that is active together with others which select tokens otherwise.

    Args:
        model: a model that holds the adapter.
        adapter_name: the adapter.
        rates: {block index: keep rate} that it is to have.
    """
    selections = adapter_selections(model)
    active: list[str] = next((m.active_adapters for m in model.modules() if isinstance(m, TRPTSLayer)), [])
    others = [name for name in active if name != adapter_name]
    if adapter_name not in active or not others or not all(selection.enabled for selection in selections.values()):
        return
    for index in sorted({*selections, *rates}):
        theirs = selections[index].rate_of(others) if index in selections else None
        own = rates.get(index, 1.0)
        if own != (1.0 if theirs is None else theirs):
            raise ValueError(
                f"`token_layers` and `keep_rate` must be those of {others}, which are active together with "
                f"{adapter_name!r}, got the rate {own:g} in block {index}: activate it alone first."
            )


def install_keep_rates(model: nn.Module, adapter_name: str, rates: Mapping[int, float]) -> None:
    """Let an adapter select tokens in exactly these blocks; other adapters keep theirs.

    Args:
        model: a model that holds the adapter.
        adapter_name: the adapter.
        rates: {block index: keep rate}; checked before, by `check_token_layers`.
    """
    for index, (_, block) in enumerate(find_blocks(model)):
        if index in rates and getattr(block, CHILD, None) is None:
            setattr(block, CHILD, _new_selection(model))
        selection = getattr(block, CHILD, None)
        if isinstance(selection, AdapterTokenSelection):
            selection.follow_configs(model)
            selection.set_rate(adapter_name, rates.get(index))
    drop_idle_selections(model)


def _drop_selections(model: nn.Module, is_dropped: Callable[[TokenSelection], bool]) -> None:
    """Restore the stock blocks where the token selection is one of these."""
    for block in blocks_of(model):
        selection = getattr(block, CHILD, None)
        if selection is not None and is_dropped(selection):
            delattr(block, CHILD)
    refresh_classes(blocks_of(model))


def drop_idle_selections(model: nn.Module) -> None:
    """Restore the stock blocks where no adapter selects tokens any more."""
    _drop_selections(model, lambda selection: not selection.selects)


def remove_token_selection(model: nn.Module) -> None:
    """Restore the stock blocks of all adapters, and the config where nothing selects tokens any more."""
    _drop_selections(model, lambda selection: isinstance(selection, AdapterTokenSelection))
    if not token_selections(model):
        _write_rates(_config_of(model), {})


def check_no_fixed_selection(model: nn.Module) -> None:
    """Refuse a model that selects tokens at fixed rates already, where an adapter is to select them."""
    if len(token_selections(model)) > len(adapter_selections(model)):
        raise ValueError(
            "`model` must not select tokens at fixed rates when an adapter does, got one that does: call "
            "`apply_token_selection(model, {})` before it gets an adapter, or set `token_layers=0`."
        )


def forget_token_selection(model: nn.Module) -> None:
    """Drop fixed rates, and those that a config carries from a merged model."""
    _drop_selections(model, lambda _: True)
    _write_rates(_config_of(model), {})


def set_token_selection(model: nn.Module, enabled: bool) -> None:
    """Switch between reduced (True) and dense (False) forward passes with the same weights.

    Args:
        model: a model whose adapter, or whose config, selects tokens.
        enabled: whether tokens are selected.

    Raises:
        ValueError: `enabled` is True, but no block of the model selects tokens, or adapters in force, which came
            together while it was off, select differently.
    """
    selections = token_selections(model)
    if enabled and not selections:
        raise ValueError(
            "`model` must select tokens in some block, got one that does not: use `calibrate`, a list as "
            "`token_layers`, or `apply_token_selection`."
        )
    for following in adapter_selections(model).values() if enabled else ():
        following.rate_of(following.merged_adapters or following.active_adapters)
    for selection in selections.values():
        selection.enabled = enabled


def apply_token_selection(model: nn.Module, keep_rates: Mapping[int, float] | None = None) -> None:
    """Select tokens in a plain ViT at fixed rates, without an adapter.

    Args:
        model: a supported ViT that holds no TR-PTS adapter, such as one returned by `merge_and_unload()`.
        keep_rates: {block index: keep rate in (0, 1]}; empty to select nowhere. None: the rates that a merged model
            carries as `config.trpts_keep_rates`. Rates given are written there, to travel with `save_pretrained`.

    Raises:
        ValueError: no rates are given and the config has none, a rate or an index is out of range, the model is not
            supported, or it holds an adapter. Nothing is changed.
    """
    config = _config_of(model)
    if any(isinstance(module, TRPTSLayer) for module in model.modules()):
        raise ValueError("`model` must hold no TR-PTS adapter, got one that does: call `merge_and_unload()` first.")
    if keep_rates is None:
        keep_rates = getattr(config, _CONFIG_KEY, None)
    if keep_rates is None:
        raise ValueError(
            f"`keep_rates` must be given for a model whose config has no `{_CONFIG_KEY}`: pass {{block index: rate}}."
        )
    rates = _checked_rates(model, keep_rates)
    _drop_selections(model, lambda _: True)
    for index, rate in rates.items():
        setattr(blocks_of(model)[index], CHILD, TokenSelection(num_prefix_tokens(model), rate))
    refresh_classes(blocks_of(model))
    _write_rates(config, rates)


def _checked_rates(model: nn.Module, keep_rates: Mapping[Any, Any]) -> dict[int, float]:
    if not isinstance(keep_rates, Mapping):  # it may have come from a `config.json`
        raise ValueError(f"`keep_rates` must be {{block index: rate in (0, 1]}}, got {keep_rates!r}.")
    rates = {}
    for index, rate in keep_rates.items():
        is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not str(index).isdecimal() or not is_number or not 0 < rate <= 1:
            raise ValueError(f"`keep_rates` must be {{block index: rate in (0, 1]}}, got {{{index!r}: {rate!r}}}.")
        rates[int(index)] = float(rate)  # JSON turns the indices into strings
    check_token_layers(model, sorted(rates), argument="keep_rates")
    return rates


def _config_of(model: nn.Module) -> Any:
    """The config of a model, or, where it has none, of the one ViT that it holds; None where there is no such one."""
    if hasattr(model, "config"):
        return model.config
    configs = {id(config): config for _, block in find_blocks(model) for config in [cast(Any, block).attention.config]}
    return next(iter(configs.values())) if len(configs) == 1 else None


def _write_rates(config: Any, rates: Mapping[int, float]) -> None:
    if config is None:
        return
    if rates:
        setattr(config, _CONFIG_KEY, {str(index): rate for index, rate in sorted(rates.items())})
    elif hasattr(config, _CONFIG_KEY):
        delattr(config, _CONFIG_KEY)
