"""Every option is checked once, at construction, by a message that names option, rule and value."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields

import numpy as np
import pytest
from peft import PeftConfig, PeftType

from trpts_peft import TRPTSConfig

NAN = float("nan")
FRACTION, COUNT = r"in \(0, 1\]", "a whole number of at least"
SHARES = "a dictionary {unit: share from 0 to 1}"
INDICES = "a list of distinct block indices, none below 0"


@pytest.mark.parametrize(
    "name, value, rule",
    [
        *(("top_percent", v, r"in \(0, 100\]") for v in (0, -1, 100.5, NAN, "1", None, True)),
        *(("min_connections", v, f"{COUNT} 1") for v in (0, -1, 1.5, "1", None, True)),
        *(("max_connections", v, f"{COUNT} 1") for v in (0, -1, 4.0, "4", True)),
        *(("budget", v, FRACTION) for v in (0, -0.1, 1.01, NAN, "0.1", True)),
        *(("allocation_unit", v, "one of 'block', 'module'") for v in ("layer", "", None, ["block"])),
        *(("importance", v, "one of 'fisher', 'gradient', 'magnitude', 'random'") for v in ("hessian", None)),
        *(("train_bias", v, "True or False") for v in (1, 0, "all", None)),
        *(("init_weights", v, "True or False") for v in (1, "random", None)),
        *(("keep_rate", v, FRACTION) for v in (0, 1.5, -0.5, NAN, "0.9", None, True)),
        *(("token_layers", v, f"{COUNT} 0") for v in (-1, 1.5, "3", None, True)),
        *(("token_layers", v, INDICES) for v in ([-1], [1, 1], [1.0], ["1"], [True])),
        *(("token_placement", v, "one of 'sparse', 'dense', 'random'") for v in ("late", None)),
        *(("seed", v, f"{COUNT} 0") for v in (-1, 0.5, None, True)),
        ("seed", 2**63, r"below 2\*\*63"),
        *(("unit_importance", v, SHARES) for v in ({"a": -0.1}, {"a": 1.5}, {"a": True}, {"a": "1"}, [0.5])),
        *(("selected_token_layers", v, INDICES) for v in ([-1], [2, 2], 3, "1", [None])),
        *(("connections", v, "a dictionary") for v in ({}, [1], 3, {"a": 0}, {"a": 1.5}, {"a": True}, {1: 1})),
    ],
)
def test_a_bad_value_is_refused(name, value, rule):
    with pytest.raises(ValueError, match=f"^`{name}` must be .*{rule}.*, got ") as caught:
        TRPTSConfig(**{name: value})
    shown = {"a": value["a"]} if name == "connections" and isinstance(value, dict) and "a" in value else value
    assert str(caught.value).endswith(f", got {shown!r}.")


@pytest.mark.parametrize(
    "name, value",
    [
        ("target_modules", 5),
        ("target_modules", [1]),
        ("exclude_modules", 5),
        ("modules_to_save", "classifier"),  # else each of its letters is taken for a name
        ("modules_to_save", [1]),
        ("layers_to_transform", 1.5),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", [1.5]),
        ("layers_to_transform", "1"),
        ("auto_mapping", "ViTModel"),
    ],
)
def test_names_and_indices_of_the_wrong_kind_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be .*, got ") as caught:
        TRPTSConfig(**{name: value})
    assert str(caught.value).endswith(f", got {value!r}.")


def test_the_message_of_the_design():
    with pytest.raises(ValueError) as caught:
        TRPTSConfig(keep_rate=1.5)
    assert str(caught.value) == "`keep_rate` must be in (0, 1], got 1.5."


def test_least_and_greatest_connections_must_fit():
    with pytest.raises(
        ValueError, match=r"`max_connections` must be at least `min_connections` \(3\) or None, got 2\."
    ):
        TRPTSConfig(min_connections=3, max_connections=2)
    assert TRPTSConfig(min_connections=3, max_connections=3).max_connections == 3
    assert TRPTSConfig(min_connections=9, max_connections=None).min_connections == 9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": "a.*", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ({"target_modules": "a.*", "layers_pattern": "layers"}, "`layers_pattern` cannot be used"),
        ({"target_modules": ["a"], "layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_layer_patterns_must_make_sense(options, message):
    with pytest.raises(ValueError, match=message):
        TRPTSConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"top_percent": 100, "keep_rate": 1, "budget": 1, "min_connections": 1, "max_connections": 1},
        {"top_percent": 1e-6, "keep_rate": 1e-6, "budget": 1e-6, "max_connections": None, "token_layers": 0},
        {"unit_importance": {"a": 0, "b": 1.0}},
        {"token_layers": [], "selected_token_layers": [], "connections": {"fc1": 1}},
        {"seed": 2**63 - 1, "layers_to_transform": 0, "modules_to_save": ["head"]},
        {"target_modules": {"a"}, "layers_to_transform": [0, 3], "layers_pattern": "layers"},
    ],
)
def test_values_at_the_edges_are_taken(options):
    config = TRPTSConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_numbers_of_numpy_become_pythons(tmp_path):
    options = {"keep_rate": 0.5, "seed": 3, "token_layers": [1, 2], "layers_to_transform": [0, 1], "train_bias": False}
    made = {
        name: np.asarray(value) if type(value) is list else np.asarray(value)[()] for name, value in options.items()
    }
    config = TRPTSConfig(**{**made, "layers_to_transform": list(made["layers_to_transform"])})
    assert {name: getattr(config, name) for name in options} == options
    config.save_pretrained(tmp_path)
    assert TRPTSConfig.from_pretrained(tmp_path).token_layers == [1, 2]


def test_defaults_are_those_of_the_design():
    config = TRPTSConfig()
    expected = {
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
        "seed": 0,
        "init_weights": True,
        "connections": None,
        "selected_token_layers": None,
        "unit_importance": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peft_type is PeftType["TRPTS"]


def test_token_layers_may_be_any_collection_of_indices():
    assert TRPTSConfig(token_layers=(9, 3)).token_layers == [3, 9]
    assert TRPTSConfig(token_layers=range(2)).token_layers == [0, 1]
    with pytest.raises(ValueError, match="`token_layers`"):
        TRPTSConfig(token_layers=(1, "a"))


def test_fixed_token_layers_are_those_of_calibration_else_a_list():
    assert TRPTSConfig(token_layers=2).fixed_token_layers == []
    assert TRPTSConfig(token_layers=[1, 2]).fixed_token_layers == [1, 2]
    assert TRPTSConfig(token_layers=2, selected_token_layers=[0, 3]).fixed_token_layers == [0, 3]
    assert TRPTSConfig(token_layers=[1, 2], selected_token_layers=[]).fixed_token_layers == []


def test_before_calibration_each_neuron_trains_as_many_inputs_as_the_limits_allow():
    assert TRPTSConfig(min_connections=2, max_connections=6).initial_connections == 4
    assert TRPTSConfig(min_connections=1, max_connections=4).initial_connections == 3
    assert TRPTSConfig(min_connections=5, max_connections=None).initial_connections == 5


def test_names_of_modules_are_a_set():
    config = TRPTSConfig(target_modules=["fc1", "fc2"], exclude_modules=["fc2"])
    assert (config.target_modules, config.exclude_modules) == ({"fc1", "fc2"}, {"fc2"})


def test_file_round_trip(tmp_path):
    config = TRPTSConfig(
        target_modules=["fc1"], token_layers=[1], selected_token_layers=[1], connections={"fc1": 2}, budget=0.1
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TRPTSConfig)
    assert loaded.to_dict() == {**config.to_dict(), "inference_mode": loaded.inference_mode}


def test_a_bad_file_is_refused(tmp_path):
    TRPTSConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "keep_rate": 7}))
    with pytest.raises(ValueError, match=r"`keep_rate` must be in \(0, 1\], got 7\."):
        PeftConfig.from_pretrained(tmp_path)


def test_a_file_cannot_skip_the_check_of_the_base_model(tmp_path):
    config = TRPTSConfig()
    config.allow_other_base = True
    config.save_pretrained(tmp_path)
    assert "allow_other_base" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_copies_and_pickles():
    config = TRPTSConfig(connections={"fc1": 2}, token_layers=[1])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_describe_has_a_line_for_every_option():
    own = {field.name for field in fields(TRPTSConfig)} - {field.name for field in fields(PeftConfig)}
    lines = TRPTSConfig.describe().splitlines()
    assert {line.partition(" = ")[0] for line in lines} == own
    assert any(line.startswith("keep_rate = 0.95: ") for line in lines)
