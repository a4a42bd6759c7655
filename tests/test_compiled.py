"""Blocks with a compiler around them, and without for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from trpts_peft.compiled import COMPILER, force_eager, has_compilers, without_compilers


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def model() -> nn.Module:
    inner = nn.Sequential(nn.ReLU(), compiled(nn.Sequential(nn.Linear(2, 2))))
    return nn.Sequential(compiled(inner), compiled(nn.Linear(2, 2)), None)


def test_names_within_are_those_of_the_model_itself() -> None:
    both = model()
    names, blocks = list(both.state_dict()), list(both)
    with without_compilers(both):
        inside = list(both.state_dict())
        assert inside == ["0.1.0.weight", "0.1.0.bias", "1._orig_mod.weight", "1._orig_mod.bias"]  # a linear stays
    assert list(both) == blocks
    assert list(both.state_dict()) == names
    assert [name.replace(COMPILER, "") for name in names[:2]] == inside[:2]


def test_a_linear_that_is_trained_whole_has_the_models_own_names_too() -> None:
    head = nn.Sequential(ModulesToSaveWrapper(compiled(nn.Linear(2, 2)), "default"))
    names = list(head.state_dict())
    with without_compilers(head):
        assert list(head.state_dict()) == [name.replace(COMPILER, "") for name in names]
    assert list(head.state_dict()) == names


def test_whether_there_is_a_compiler() -> None:
    assert has_compilers(model())
    assert not has_compilers(nn.Sequential(nn.Linear(2, 2)))


def test_compilers_are_back_where_what_runs_within_fails() -> None:
    both = model()
    blocks = list(both)
    with pytest.raises(RuntimeError, match="within"), without_compilers(both):
        raise RuntimeError("within")
    assert list(both) == blocks


def test_what_was_put_around_a_block_within_stays() -> None:
    both = model()
    with without_compilers(both):
        both[0] = wrapper = nn.Sequential(both[0])
    assert both[0] is wrapper
    assert COMPILER in next(iter(both.state_dict()))  # deeper ones are back


def counted(calls: list[int]) -> Callable[[Tensor], Tensor]:
    """Compiled code that notes that it was called."""

    def backend(graph: Any, _inputs: Any) -> Any:
        def run(*args: Tensor) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    return torch.compile(lambda x: x + 1, backend=backend)


def test_compiled_code_stands_aside_until_the_last_who_asked_is_done() -> None:
    calls: list[int] = []
    add, x = counted(calls), torch.zeros(1)
    first, second = force_eager(), force_eager()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as of two threads
    add(x)
    assert not calls
    second.__exit__(None, None, None)
    add(x)
    assert calls
    with torch.compiler.set_stance("force_eager"):  # what was before is what comes back
        with force_eager():
            calls.clear()
        add(x)
        assert not calls


def test_a_context_that_was_left_open_may_end_while_another_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is collected: then it ends in whichever thread and line."""
    calls: list[int] = []
    add, x, left_open, set_stance = counted(calls), torch.zeros(1), force_eager(), torch.compiler.set_stance
    left_open.__enter__()

    def set_and_collect(stance: str) -> Any:
        new = set_stance(stance)
        left_open.__exit__(None, None, None)
        return new

    def predict() -> None:
        with force_eager():
            add(x)
        inside.append(len(calls))

    inside: list[int] = []
    monkeypatch.setattr(torch.compiler, "set_stance", set_and_collect)
    thread = threading.Thread(target=predict, daemon=True)  # it would wait for itself for good
    thread.start()
    thread.join(60)
    assert inside == [0]
    add(x)
    assert calls


def test_compiled_code_is_back_after_an_error() -> None:
    calls: list[int] = []
    with pytest.raises(KeyError), force_eager():
        raise KeyError
    counted(calls)(torch.zeros(1))
    assert calls


def test_compiled_code_cannot_be_left_aside_from_within() -> None:
    def inner(x: Tensor) -> Tensor:
        with force_eager():
            return x + 1

    with pytest.raises(RuntimeError, match="compile"):
        torch.compile(inner, backend="eager")(torch.zeros(1))
