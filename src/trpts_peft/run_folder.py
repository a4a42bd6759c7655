"""The output folder of a run: whether it may be written to, what a run to resume was set to, its last checkpoint."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from .folders import check_writable, first_line

__all__ = [
    "SETTINGS",
    "check_data",
    "check_output",
    "hold",
    "last_checkpoint",
    "let_go",
    "read_json",
    "step_of",
    "write_json",
]

SETTINGS = "settings.json"
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What a run leaves that was refused, or killed while it wrote its first file.
_LEFT_OVER = (_LOCK, f"{SETTINGS}.part")
# Settings that a resumed run may change: they decide nothing of what is trained.
_FREE = ("output", "resume", "push_to_hub", "report_to", "num_workers")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_json(path: Path, *, remedy: str = "delete it") -> dict[str, Any]:
    """What `write_json` wrote; a ValueError, which ends in the remedy, where it is not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`output` must hold a whole {path.name}, got {first_line(error)}: {remedy}.") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"`output` must hold a whole {path.name}, got {content!r}: {remedy}.")
    return content


def check_output(output: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError where `output` is neither empty nor, with `settings["resume"]`, a run of the same settings."""
    check_writable(output)
    if not output.is_dir() or all(path.name in _LEFT_OVER for path in output.iterdir()):
        return
    if not settings["resume"]:
        raise ValueError(
            f"`output` must be empty or not there, got {str(output)!r} with files in it: name another folder, or go on "
            "with the run in it by `--resume`."
        )
    if not (output / SETTINGS).is_file():
        raise ValueError(f"`output` must hold a run to resume, got {str(output)!r} without {SETTINGS}.")
    before, now = _settings_in(output), json.loads(json.dumps(settings))
    same = [name for name in ("model", "dataset") if _is_same_place(before.get(name), now[name])]
    changed = [name for name in now if name not in (*_FREE, *same) and now[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"`{name}` must be as in the run to resume, {before.get(name)!r}, got {now[name]!r}: name another `output`."
        )


def hold(output: Path) -> FileLock:
    """Make the folder, and take it for this process, until `let_go` or its end, whatever ends it.

    On a file system that knows no locks nothing is taken, and nothing is refused.

    Raises:
        ValueError: another run writes to it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK, fallback_to_soft=False)  # a file in its place would outlive a run that is killed
    try:
        lock.acquire(timeout=0)
    except Timeout as error:  # an OSError, too
        raise ValueError(
            f"`output` must be a folder that no other run writes to, got {str(output)!r}, which one does: wait for its "
            "end, or name another."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


def let_go(lock: FileLock) -> None:
    """Give up a folder. The lock's file goes first: once let go it may be another run's."""
    if lock.is_locked:
        with suppress(OSError):  # where an open file cannot be deleted it stays, and harms nobody
            os.unlink(lock.lock_file)
        lock.release()


def _settings_in(output: Path) -> dict[str, Any]:
    return read_json(output / SETTINGS, remedy="start anew in another folder")


def _is_same_place(one: Any, other: str) -> bool:
    return isinstance(one, str) and Path(one).is_dir() and Path(one).resolve() == Path(other).resolve()


def check_data(output: Path, data: Mapping[str, Any]) -> None:
    """Raise a ValueError where the run in `output` was of other data: other classes, in name or order, or counts."""
    before = _settings_in(output).get("data") if (output / SETTINGS).is_file() else None
    if before not in (None, data):
        raise ValueError(f"`dataset` must be as in the run to resume, {before}, got {data}: restore it, or start anew.")


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a folder of Trainer's; it writes `trainer_state.json` last.

    After a power cut files may be there, but empty or cut off: none is taken for whole by its name.
    """
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return next((path for path in sorted(numbered, key=step_of, reverse=True) if _is_whole(path)), None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = read_json(checkpoint / "trainer_state.json")
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt"):
                pass  # to open it compares what its header says with its length
    except (OSError, ValueError, SafetensorError):
        return False
    archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return bool(weights) and state.get("global_step") == step_of(checkpoint) and all(map(_is_sound, archives))


def _is_sound(archive: Path) -> bool:
    """Whether a file of torch's is there, whole, and has the checksums that stand in it."""
    try:
        with zipfile.ZipFile(archive) as parts:
            return parts.testzip() is None
    except Exception:  # of all the kinds that zipfile raises over a damaged directory
        return False
