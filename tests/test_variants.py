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
    unnamed = {"seed", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
               "init_weights", "connections", "selected_token_layers", "unit_importance"}  # fmt: skip
    assert {f for f in TRPTSConfig.__annotations__ if f != "allow_other_base"} == unnamed | set(SETTINGS)


def test_a_name_is_one_variant() -> None:
    assert set(BASELINES) < set(METHODS)
    for variant in [v for compared in ABLATIONS.values() for v in compared]:
        assert VARIANTS[variant.name] == variant
        assert VARIANTS[variant.rate_of or variant.name].rate_of == ""
        assert Variant(**json.loads(json.dumps(vars(variant)))) == variant


def test_ablations_change_one_thing() -> None:
    """But for budgets, which need the cap away, and where tokens are dropped, which is tried at two rates."""
    for question in set(ABLATIONS) - {"score", "inputs marked", "learning rate"}:
        for variant in ABLATIONS[question]:
            settings = {k: v for k, v in variant.options.items() if k in SETTINGS and v != SETTINGS[k]}
            changed = [*settings, *variant.scoring, *([] if variant.probed_head else ["head"])]
            assert len(changed) <= 1 or set(changed) in (
                {"keep_rate", "token_placement"},
                {"keep_rate", "token_layers"},
                {"budget", "max_connections"},
            )


def test_scores_differ_in_the_score_alone() -> None:
    for variant in [*ABLATIONS["score"], *ABLATIONS["inputs marked"]]:
        assert variant.rate_of == ""
        if variant.method == "trpts":
            expected = {**SETTINGS, "min_connections": 2, "max_connections": 2, "token_layers": 0}
            assert {**variant.options, "importance": "fisher"} == expected
    scoring = {"varying-2": {"varying": True}, "shared-2": {"shared": 1 / 16}}
    assert {v.name: v.scoring for v in ABLATIONS["inputs marked"] if v.scoring} == scoring


def test_learning_rates_are_a_step_from_the_best_and_change_nothing_else() -> None:
    steps = {"trpts-fast": 3.0, "lora-fast": 3.0, "fisher-2-fast": 3.0, "random-2-slow": 1 / 3}
    assert {v.name: v.rate_times for v in VARIANTS.values() if v.rate_times != 1} == steps
    for name in steps:
        other = VARIANTS[name.rpartition("-")[0]]
        changed = {"name": name, "rate_of": other.name, "rate_times": steps[name]}
        assert vars(VARIANTS[name]) == {**vars(other), **changed}


def test_a_keep_rate_is_in_the_options_or_another_variant_s_cost() -> None:
    equal = {variant.name: variant.macs_of for variant in VARIANTS.values() if variant.macs_of}
    assert equal == {"dense-equal": "sparse-0.8", "random-equal": "sparse-0.8"}
    for name in equal:
        placement = name.partition("-")[0]
        options = {**VARIANTS[name].options, "keep_rate": SETTINGS["keep_rate"]}
        assert options == {**SETTINGS, "token_placement": placement}


def test_what_is_drawn_is_drawn_by_the_seed_of_the_cell() -> None:
    drawing = {variant.name for variant in VARIANTS.values() if variant.draws}
    assert drawing == {"shira", "random-2", "random-2-slow", "random-0.95", "random-0.8", "random-equal"}
