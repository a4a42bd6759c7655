"""The launch configs of the examples are what accelerate takes them for; it passes over options it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "launch"
TYPES = {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP, "zero2": DistributedType.DEEPSPEED}


def loaded(name: str) -> Any:
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


def test_every_config_is_looked_at():
    assert {path.stem for path in FOLDER.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_configs_load_and_are_for_two_machines(name):
    config = loaded(name)
    assert config.distributed_type == TYPES[name]
    assert (config.num_machines, config.num_processes, config.machine_rank) == (2, 16, 0)
    assert config.main_process_ip and config.main_process_port and config.same_network


@pytest.mark.parametrize("name", TYPES)
def test_launch_knows_every_option(name):
    known = vars(launch_command_parser().parse_args(["train.py"]))
    given = {**(loaded(name).fsdp_config or {}), **(loaded(name).deepspeed_config or {})}
    assert bool(given) == (name != "ddp")
    assert set(given) <= set(known)


def test_what_would_be_refused_is_off():
    options = loaded("fsdp").fsdp_config
    assert options["fsdp_version"] == 2
    assert options["fsdp_cpu_ram_efficient_loading"] is options["fsdp_activation_checkpointing"] is False
    assert options["fsdp_state_dict_type"] == "FULL_STATE_DICT"
