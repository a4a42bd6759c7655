"""What lies in the output folder of a run."""

from __future__ import annotations

import errno
import struct
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from trpts_peft.run_folder import check_output, hold, last_checkpoint, let_go, read_json, write_json


def test_a_json_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})


@pytest.mark.parametrize("text", ["{", "[]", "{}", "1", "[" * 100_000])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"`output` must hold a whole settings.json, got .*: delete it"):
        read_json(tmp_path / "settings.json")


def test_a_draft_is_no_run(tmp_path: Path) -> None:
    """It is what a run leaves that was killed while it wrote its first file."""
    (tmp_path / "settings.json.part").write_text("{")
    check_output(tmp_path, {"resume": False})


def test_a_folder_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "new"
    lock = hold(output)
    with pytest.raises(ValueError, match=r"`output` must be a folder that no other run writes to, got .*new"):
        hold(output)
    check_output(output, {"resume": False})  # the lock alone is no run
    let_go(lock)
    assert list(output.iterdir()) == []
    let_go(hold(output))


@pytest.mark.skipif(sys.platform == "win32", reason="locks otherwise")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_no_run(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, "no locks here")))
    locks = hold(tmp_path), hold(tmp_path)
    assert not any(lock.is_locked for lock in locks)
    for lock in locks:
        let_go(lock)
    check_output(tmp_path, {"resume": False})


def test_a_folder_whose_lock_may_not_be_opened_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=PermissionError("somebody else's")))
    with pytest.raises(PermissionError):
        hold(tmp_path)


def test_the_lock_of_another_is_left(tmp_path: Path) -> None:
    first = hold(tmp_path)
    let_go(first)
    second = hold(tmp_path)
    let_go(first)
    with pytest.raises(ValueError, match="no other run writes to"):
        hold(tmp_path)
    let_go(second)


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    write_json(checkpoint / "trainer_state.json", {"global_step": step})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        torch.save({"state": torch.full((9,), 3.0)}, checkpoint / name)
    save_file({"a": torch.zeros(9)}, checkpoint / "adapter_model.safetensors")
    return checkpoint


FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_the_last_checkpoint_is_the_last_whole_one(tmp_path: Path, name: str, damage: str) -> None:
    assert last_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 9)
    whole, broken = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 11) / name
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == broken.parent
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(b"" if damage == "empty" else broken.read_bytes()[:-5])
    assert last_checkpoint(tmp_path) == whole


@pytest.mark.parametrize("damage", [b"", b"PK", None])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pth"])
def test_a_damaged_archive_is_noticed(tmp_path: Path, name: str, damage: bytes | None) -> None:
    whole, broken = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 11) / name
    content = broken.read_bytes()
    at = content.index(struct.pack("9f", *[3.0] * 9))  # entries of a tensor
    broken.write_bytes(content[:at] + b"\1" + content[at + 1 :] if damage is None else damage)
    assert last_checkpoint(tmp_path) == whole


def test_a_damaged_directory_of_an_archive_is_noticed(tmp_path: Path) -> None:
    whole, broken = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 11) / "rng_state_0.pth"
    content = broken.read_bytes()
    for field in (6, 8, 10):  # version, flags and method of the first entry
        at = content.index(b"PK\1\2") + field
        broken.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        assert last_checkpoint(tmp_path) == whole


@pytest.mark.parametrize("state", ["[]", "1", '{"global_step": -5}', '{"global_step": 10}'])
def test_a_checkpoint_of_another_step_is_none(tmp_path: Path, state: str) -> None:
    (write_checkpoint(tmp_path, 11) / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) is None
