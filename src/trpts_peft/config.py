"""The configuration of a TR-PTS adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from peft import PeftConfig

from .card import update_card
from .peft_type import TRPTS

__all__ = ["TRPTSConfig"]

_UNITS = ("block", "module")
_IMPORTANCES = ("fisher", "gradient", "magnitude", "random")
_PLACEMENTS = ("sparse", "dense", "random")


def _refuse(name: str, rule: str, value: object) -> None:
    raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _all(values: object, rule: Callable[[Any], bool]) -> bool:
    return isinstance(values, (list, tuple, set, frozenset)) and all(rule(value) for value in values)


def _check_real(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        _refuse(name, f"in ({low:g}, {high:g}]", value)


def _check_count(name: str, value: object, least: int) -> None:
    if not _is_int(value) or value < least:  # type: ignore[operator]
        _refuse(name, f"a whole number of at least {least}", value)


def _check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        _refuse(name, f"one of {', '.join(map(repr, words))}", value)


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _refuse(name, "True or False", value)


@dataclass
class TRPTSConfig(PeftConfig):
    """Configuration of Task-Relevant Parameter and Token Selection.

    Every option is described once, in its field's `help`: `trpts_peft.TRPTSConfig.describe()` prints them all.

    Raises:
        ValueError: an option is out of its range; the message names the option, the rule and the value received.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (suffixes) of the linears to train, or a regular expression. None: the family's default, "
            "for a ViT q_proj, k_proj, v_proj, o_proj, fc1, fc2."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or a regular expression of linears to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks whose linears are trained. None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that holds the blocks, where it is not a common one."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and stored whole, usually ['classifier']."}
    )
    top_percent: float = field(
        default=1.0, metadata={"help": "M of eq. 3: the share of all scores, in percent, that counts as important."}
    )
    min_connections: int = field(
        default=1, metadata={"help": "C_min of eq. 4: inputs per neuron that the least important unit trains."}
    )
    max_connections: int | None = field(
        default=4, metadata={"help": "Cap on the inputs that a neuron trains; None for none."}
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the targeted weights to train. C_min is then solved for instead of `min_connections`."
        },
    )
    allocation_unit: str = field(
        default="block", metadata={"help": "What shares one C: a transformer 'block' or each linear ('module')."}
    )
    importance: str = field(
        default="fisher",
        metadata={"help": "Score of a weight: 'fisher', 'gradient' (|mean gradient|), 'magnitude' or 'random'."},
    )
    train_bias: bool = field(default=True, metadata={"help": "Whether the targeted linears train their biases too."})
    keep_rate: float = field(
        default=0.95, metadata={"help": "Share of the image tokens (eq. 9) that a token layer keeps. 1: all."}
    )
    token_layers: int | list[int] = field(
        default=3,
        metadata={"help": "How many blocks select tokens (chosen by `calibrate`), or the list of their indices."},
    )
    token_placement: str = field(
        default="sparse",
        metadata={
            "help": "Which blocks an integer `token_layers` takes: those with the fewest trainable connections "
            "('sparse'), the most ('dense'), or drawn with `seed` ('random')."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of what a 'random' importance and token placement draw."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the identity (True), or from random values, for tests (False)."}
    )
    connections: dict[str, int] | None = field(
        default=None, metadata={"help": "Result of `calibrate`: inputs per neuron of each linear."}
    )
    selected_token_layers: list[int] | None = field(
        default=None, metadata={"help": "Result of `calibrate`: indices of the blocks that select tokens."}
    )
    unit_importance: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Result of `calibrate`: share w of the top scores in each unit (eq. 3)."},
    )
    # Set on a loaded config by who wants to skip the check; not an argument, so that no file can ask for it.
    allow_other_base: bool = field(
        default=False,
        init=False,
        metadata={
            "help": "Accept a base model other than the adapter was calibrated on. No argument: set on a loaded config."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = TRPTS
        for option in fields(self):
            setattr(self, option.name, _without_numpy(getattr(self, option.name)))
        self._check_names()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_layer_patterns()
        self._check_parameter_options()
        self._check_token_options()
        self._check_results()

    def checked(self) -> TRPTSConfig:
        """A copy whose options are checked again, and brought into their form: they may have been assigned since.

        Raises:
            ValueError: as when a config is made.
        """
        config = copy.deepcopy(self)
        config.__post_init__()
        return config

    @classmethod
    def describe(cls) -> str:
        """One line per option: name, default, meaning."""
        own = [f for name, f in cls.__dataclass_fields__.items() if name in cls.__annotations__]
        return "\n".join(f"{f.name} = {f.default!r}: {f.metadata['help']}" for f in own)

    @property
    def fixed_token_layers(self) -> list[int]:
        """Indices of the token layers as far as they are known: those of `calibrate`, else an explicit list."""
        if self.selected_token_layers is not None:
            return self.selected_token_layers
        return self.token_layers if isinstance(self.token_layers, list) else []

    @property
    def initial_connections(self) -> int:
        """Inputs per neuron before calibration: halfway between least and most, as no unit is known to matter more."""
        if self.max_connections is None:
            return self.min_connections
        return (self.min_connections + self.max_connections + 1) // 2

    def to_dict(self) -> dict[str, Any]:
        """The options as a dictionary that the constructor takes back."""
        options: dict[str, Any] = super().to_dict()
        del options["allow_other_base"]
        return options

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and the adapter's part of the model card that PEFT has put beside it.

        Args:
            save_directory: the folder.
            **kwargs: as for PEFT's configs.
        """
        base = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        super().save_pretrained(save_directory, **kwargs)
        update_card(save_directory, self, base.get("base_model_class"))

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or _all(value, lambda v: isinstance(v, str))):
                _refuse(name, "None, a string or a list of strings", value)
        if not (self.modules_to_save is None or _all(self.modules_to_save, lambda v: isinstance(v, str))):
            _refuse("modules_to_save", "None or a list of strings", self.modules_to_save)
        if not (self.auto_mapping is None or isinstance(self.auto_mapping, dict)):
            _refuse("auto_mapping", "None or a dictionary", self.auto_mapping)
        layers = [self.layers_to_transform] if _is_int(self.layers_to_transform) else self.layers_to_transform
        if not (layers is None or _all(layers, lambda v: _is_int(v) and v >= 0)):
            _refuse("layers_to_transform", "None, a block index or a list of them, none below 0", layers)

    def _check_layer_patterns(self) -> None:
        # The same two rules, in the same words, as PEFT's own configs.
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def _check_parameter_options(self) -> None:
        _check_real("top_percent", self.top_percent, 0, 100)
        _check_count("min_connections", self.min_connections, 1)
        if self.max_connections is not None:
            _check_count("max_connections", self.max_connections, 1)
            if self.max_connections < self.min_connections:
                rule = f"at least `min_connections` ({self.min_connections}) or None"
                _refuse("max_connections", rule, self.max_connections)
        if self.budget is not None:
            _check_real("budget", self.budget, 0, 1)
        _check_word("allocation_unit", self.allocation_unit, _UNITS)
        _check_word("importance", self.importance, _IMPORTANCES)
        for name in ("train_bias", "init_weights"):
            _check_flag(name, getattr(self, name))
        _check_count("seed", self.seed, 0)
        if self.seed >= 2**63:
            _refuse("seed", "below 2**63", self.seed)

    def _check_token_options(self) -> None:
        _check_real("keep_rate", self.keep_rate, 0, 1)
        _check_word("token_placement", self.token_placement, _PLACEMENTS)
        if isinstance(self.token_layers, (tuple, set, range)):
            self.token_layers = list(self.token_layers)
        if isinstance(self.token_layers, list):
            self._check_indices("token_layers", self.token_layers)
            self.token_layers = sorted(self.token_layers)
        else:
            _check_count("token_layers", self.token_layers, 0)

    def _check_results(self) -> None:
        if self.selected_token_layers is not None:
            self._check_indices("selected_token_layers", self.selected_token_layers)
        shares = self.unit_importance
        if shares is not None and not (isinstance(shares, dict) and _all(list(shares.values()), _is_share)):
            _refuse("unit_importance", "None or a dictionary {unit: share from 0 to 1}", shares)
        if self.connections is None:
            return
        if not isinstance(self.connections, dict) or not self.connections:
            _refuse("connections", "None or a dictionary {linear: inputs per neuron}", self.connections)
        for name, count in self.connections.items():
            if not isinstance(name, str) or not _is_int(count) or count < 1:
                _refuse("connections", "a dictionary {linear: whole number of at least 1}", {name: count})

    @staticmethod
    def _check_indices(name: str, value: object) -> None:
        indices: list[Any] = value if isinstance(value, list) else [None]
        if not all(_is_int(i) and i >= 0 for i in indices) or len(set(indices)) != len(indices):
            _refuse(name, "a list of distinct block indices, none below 0", value)


def _without_numpy(value: Any) -> Any:
    """Numbers as Python has them, as sweeps over `np.arange` may bring others, which JSON does not know."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return type(value)(map(_without_numpy, value)) if type(value) in (list, tuple, set) else value
