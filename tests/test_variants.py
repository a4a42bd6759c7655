"""What the ablations compare."""

from __future__ import annotations

import json

from benchmarks.baselines import BASELINES
from benchmarks.variants import ABLATIONS, METHODS, SETTINGS, VARIANTS, Variant
from trpts_peft import TRPTSConfig


def test_the_reference_is_the_default_configuration() -> None:
    default = TRPTSConfig()
    assert {name: getattr(default, name) for name in SETTINGS} == SETTINGS
    assert METHODS["trpts"].options == SETTINGS
    unnamed = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
               "init_weights", "connections", "selected_token_layers", "unit_importance"}  # fmt: skip
    assert {f for f in TRPTSConfig.__annotations__ if f != "allow_other_base"} == unnamed | set(SETTINGS)


def test_a_name_is_one_variant() -> None:
    assert set(BASELINES) < set(METHODS)
    for variant in [v for compared in ABLATIONS.values() for v in compared]:
        assert VARIANTS[variant.name] == variant
        assert VARIANTS[variant.rate_of or variant.name].rate_of == ""
        assert Variant(**json.loads(json.dumps(vars(variant)))) == variant


def test_ablations_change_one_thing() -> None:
    for question in ("token layers", "allocation", "connections", "biases"):
        for variant in ABLATIONS[question]:
            changed = {k for k, v in variant.options.items() if k in SETTINGS and v != SETTINGS[k]}
            assert changed <= {"keep_rate", "token_placement"} or len(changed - {"max_connections"}) <= 1, variant.name
