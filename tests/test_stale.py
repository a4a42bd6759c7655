"""Optimizers and DDP from before a calibration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from conftest import LabelledImages, build_vit
from trpts_peft import TRPTSConfig, calibrate

DATA = LabelledImages(12)


def calibrated(model: Any, **options: Any) -> Any:
    calibrate(model, DATA, progress=False, overwrite=True, **options)
    return model


def adapter() -> Any:
    return calibrated(get_peft_model(build_vit(), TRPTSConfig(keep_rate=0.5, modules_to_save=["classifier"])))


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Train one step; whether all that the optimizer holds was changed by it."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in held]
    optimizer.zero_grad()
    model(**DATA.batch()).loss.backward()
    optimizer.step()
    return not any(torch.equal(old, now) for old, now in zip(before, held, strict=True))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimizer_with_steps_behind_it_refuses_the_next(options: dict[str, bool]) -> None:
    model = adapter()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, **options)
    step(model, optimizer)
    model.peft_config["default"].min_connections = 2
    calibrated(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="An optimizer must not have made steps before `calibrate`"):
        step(model, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    optimizer.state.clear()
    assert step(model, optimizer) and step(model, optimizer)


def test_so_it_does_where_the_shapes_are_the_same() -> None:
    model = adapter()
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW(trainable(model)))
    step(model, optimizer)
    calibrated(model)
    with pytest.raises(ValueError, match="An optimizer must not have made steps before `calibrate`"):
        step(model, optimizer)


def test_optimizers_of_something_else_or_without_steps_go_on() -> None:
    model, other = adapter(), adapter()
    fresh, elsewhere = torch.optim.AdamW(trainable(model)), torch.optim.AdamW(trainable(other))
    head = torch.optim.AdamW([p for name, p in model.named_parameters() if "classifier.modules_to_save" in name])
    step(other, elsewhere)
    step(model, head)
    calibrated(model)
    for each, optimizer in ((model, fresh), (model, fresh), (other, elsewhere), (model, head)):
        assert step(each, optimizer)


def test_a_restored_state_is_of_what_is_there_now() -> None:
    model = adapter()
    optimizer = torch.optim.AdamW(trainable(model))
    step(model, optimizer)
    calibrated(model)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(model, optimizer)


def test_gradients_of_the_old_head_are_gone() -> None:
    model = adapter()
    model(**DATA.batch()).loss.backward()
    calibrated(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def has_gradients(ddp: DistributedDataParallel) -> bool:
    """Whether a pass forward and backward leaves one in all that trains."""
    ddp.zero_grad()
    ddp(**DATA.batch()).loss.backward()
    return all(parameter.grad is not None for parameter in trainable(ddp))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_from_before_refuses_the_next_pass() -> None:
    model, other = adapter(), adapter()
    wrapped, elsewhere = DistributedDataParallel(model), DistributedDataParallel(other)
    calibrated(model)
    with pytest.raises(ValueError, match="DistributedDataParallel must be made after `calibrate`"):
        wrapped(**DATA.batch())
    for ddp in (elsewhere, DistributedDataParallel(model)):
        assert has_gradients(ddp)


@pytest.mark.usefixtures("process_group")
def test_ddp_of_another_adapter_goes_on() -> None:
    model = adapter()
    model.add_adapter("b", TRPTSConfig(keep_rate=0.5, modules_to_save=["classifier"]))
    wrapped = DistributedDataParallel(model)
    calibrated(model, adapter_name="b")
    assert has_gradients(wrapped)
