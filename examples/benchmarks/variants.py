"""What the grid runs: the methods of the paper's tables, and TR-PTS with one thing changed at a time.

`trpts` is the default configuration. The paper leaves open, or shows in its tables 4 and 5, what `ABLATIONS` compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.baselines import BASELINES, LINEARS

__all__ = ["ABLATIONS", "METHODS", "SETTINGS", "VARIANTS", "Variant"]


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        name: what its cells are called.
        method: a key of `BASELINES`.
        options: of the method.
        scoring: how GPS and TR-PTS measure: arguments of `estimate_fisher`; or {"per_batch": size} for the squares of
            batches' gradients, {"varying": True} without the constant part of each input, {"shared": share} for inputs
            drawn by all neurons of a linear among the same share of them.
        token_options: of the TRPTSConfig that chooses where another method drops tokens; None: it drops none.
        probed_head: whether training starts from the head that `calibrate` fits, or from a random one.
        rate_of: the variant whose learning rate it trains at; empty: its own.
        rate_times: a factor on that learning rate.
        draws: whether the method draws by an option `seed`, which is then that of the cell.
        macs_of: the variant whose multiply-accumulates the keep rate is chosen to match; empty: it is in `options`.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)
    token_options: Mapping[str, Any] | None = None
    probed_head: bool = True
    rate_of: str = ""
    rate_times: float = 1.0
    draws: bool = False
    macs_of: str = ""

    def seeded(self, seed: int) -> dict[str, Any]:
        """The options for a cell of this seed."""
        return {**self.options, **({"seed": seed} if self.draws else {})}


# The defaults of TRPTSConfig, written out so that a cell says what it is whatever becomes of them.
SETTINGS = {
    "top_percent": 1.0,
    "min_connections": 1,
    "max_connections": 4,
    "budget": None,
    "allocation_unit": "block",
    "importance": "fisher",
    "train_bias": True,
    "keep_rate": 0.95,
    "token_layers": 3,
    "token_placement": "sparse",
}

_trpts = partial(Variant, method="trpts", rate_of="trpts")


def _options(name: str, **changed: Any) -> Variant:
    settings = {**SETTINGS, **changed}
    draws = "random" in (settings["importance"], settings["token_placement"])
    return _trpts(name, options=settings, draws=draws)


def _methods() -> dict[str, Variant]:
    """Every method as it is; TR-PTS with all tokens at TR-PTS's rate, so that the two differ in tokens alone."""
    every = {name: Variant(name, name) for name in BASELINES}
    every["lora-six"] = Variant("lora-six", "lora", {"targets": LINEARS})
    every["shira"] = Variant("shira", "shira", draws=True)
    every["trpts"] = Variant("trpts", "trpts", SETTINGS)
    return every | {"trpts-all-tokens": _options("trpts-all-tokens", token_layers=0)}


METHODS = _methods()


def _saving(placement: str, reference: str) -> Variant:
    """Tokens dropped elsewhere, at the keep rate that saves as much as another variant does on the task."""
    variant = _options(f"{placement}-equal", token_placement=placement)
    options = {name: value for name, value in variant.options.items() if name != "keep_rate"}
    return replace(variant, options=options, macs_of=reference)


def _scoring(name: str, **scoring: Any) -> Variant:
    return _trpts(name, options=SETTINGS, scoring=scoring)


def _scores(importance: str, name: str = "", **scoring: Any) -> Variant:
    """Two inputs per neuron by another score, all tokens: GPS but for the score, at a rate of its own as GPS."""
    options = {"importance": importance, "min_connections": 2, "max_connections": 2, "token_layers": 0}
    return replace(_options(f"{name or importance}-2", **options), rate_of="", scoring=scoring)


def _budget(percent: float) -> Variant:
    """So many percent of the weights, at a rate of its own as the methods it is compared with."""
    return replace(_options(f"budget-{percent:g}", budget=percent / 100, max_connections=None), rate_of="")


def _at(speed: str, variant: Variant) -> Variant:
    """A step of the grid's learning rates away from the best one."""
    times = {"fast": 3.0, "slow": 1 / 3}[speed]
    return replace(variant, name=f"{variant.name}-{speed}", rate_of=variant.rate_of or variant.name, rate_times=times)


_DEFAULT = METHODS["trpts"]
_linear_tokens = Variant("linear-tokens", "linear", token_options=SETTINGS, rate_of="linear")

# {question: the variants it compares}
ABLATIONS = {
    "parameters and tokens": [METHODS["linear"], _linear_tokens, METHODS["trpts-all-tokens"], _DEFAULT],
    "token layers": [
        _DEFAULT,
        _options("sparse-0.8", keep_rate=0.8),
        _options("dense-0.95", token_placement="dense"),
        _options("dense-0.8", token_placement="dense", keep_rate=0.8),
        _options("random-0.95", token_placement="random"),
        _options("random-0.8", token_placement="random", keep_rate=0.8),
        _saving("dense", "sparse-0.8"),
        _saving("random", "sparse-0.8"),
        _options("late-0.8", token_layers=[9, 10, 11], keep_rate=0.8),  # the last three of 12 blocks, whatever the task
    ],
    "score": [_scores("fisher"), METHODS["gps"], _scores("magnitude"), _scores("random")],
    "inputs marked": [
        _scores("fisher"),
        _scores("fisher", "varying", varying=True),
        _scores("fisher", "shared", shared=1 / 16),
        _scores("random"),
    ],
    "learning rate": [
        _DEFAULT,
        _at("fast", _DEFAULT),
        METHODS["lora"],
        _at("fast", METHODS["lora"]),
        _scores("fisher"),
        _at("fast", _scores("fisher")),
        _at("slow", _scores("random")),
        _scores("random"),
    ],
    "allocation": [
        _DEFAULT,
        _options("module-units", allocation_unit="module"),
        _options("top-0.1", top_percent=0.1),
        _options("top-5", top_percent=5.0),
        _options("top-20", top_percent=20.0),
    ],
    "connections": [
        _options("cap-1", max_connections=1),
        _DEFAULT,
        _options("least-2", min_connections=2),
        _options("cap-16", max_connections=16),
        _options("no-cap", max_connections=None),
        _budget(8.8),
        METHODS["lora"],
        METHODS["lora-six"],
        METHODS["shira"],
    ],
    "biases": [_DEFAULT, _options("no-bias", train_bias=False)],
    "head": [_DEFAULT, _trpts("random-head", options=SETTINGS, probed_head=False)],
    "Fisher information": [
        _DEFAULT,
        _scoring("per-batch", per_batch=32),
        _scoring("drawn-labels", labels="model"),
        _scoring("samples-32", num_samples=32),
        _scoring("samples-128", num_samples=128),
    ],
}

VARIANTS = METHODS | {variant.name: variant for compared in ABLATIONS.values() for variant in compared}
