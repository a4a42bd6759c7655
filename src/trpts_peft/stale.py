"""What was made for an adapter's parameters before calibration gave them another shape, and cannot go on with them."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = ["retire_users_of"]

_REMEDY = "make a new one, or a new Trainer, after `calibrate`"


def retire_users_of(parameters: Iterable[nn.Parameter]) -> None:
    """Let optimizers that have made steps with these parameters, and DDP around them, refuse the next one.

    A fused optimizer would read past the end of a state of the old shape, others would go on with the moments of other
    weights, and DDP would no longer average the gradients: all of them without a word. An optimizer that has made no
    step yet goes on.
    """
    exchanged = {id(parameter): parameter for parameter in parameters}
    averaged = {key for key, parameter in exchanged.items() if parameter.requires_grad}
    for user in gc.get_objects():  # no parameter knows its users
        kind = type(user)
        if issubclass(kind, Optimizer) and "_optimizer_step_pre_hooks" in vars(user):  # wrappers have none of their own
            state = [(parameter, kept) for parameter, kept in user.state.items() if id(parameter) in exchanged and kept]
            if state:
                user.register_step_pre_hook(partial(_refuse_step, state))
        elif issubclass(kind, DistributedDataParallel) and averaged & set(map(id, user.parameters())):
            user.register_forward_pre_hook(_refuse_pass)


def _refuse_step(state: list[tuple[nn.Parameter, Any]], optimizer: Optimizer, *_: Any) -> None:
    if any(optimizer.state.get(parameter) is kept for parameter, kept in state):
        raise ValueError(f"An optimizer must not have made steps before `calibrate`, got one that has: {_REMEDY}.")


def _refuse_pass(_module: nn.Module, _args: Any) -> None:
    raise ValueError(f"DistributedDataParallel must be made after `calibrate`, got one from before: {_REMEDY}.")
