"""Where a command may write, and what it says in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["check_empty", "check_writable", "first_line", "is_full", "printable"]


def check_empty(output: Path) -> None:
    """Raise a ValueError where something lies in the folder, it is none, or it cannot be made."""
    check_writable(output)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"`output` must be an empty folder or not there, got {str(output)!r}: name another.")


def check_writable(output: Path) -> None:
    """Raise a ValueError where `output` is no folder and cannot become one."""
    try:
        str(output.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`output` must have a name in Unicode, got {str(output.absolute())!r}: name another."
        ) from error
    nearest = next((path for path in (output, *output.absolute().parents) if os.path.lexists(path)), output)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"`output` must be a folder that can be written to, got {str(output)!r}: {str(nearest)!r} is none."
        )


def is_full(folder: Path) -> bool:
    """Whether less than a mebibyte is left where the folder lies: what is written there ends in whatever error."""
    return folder.is_dir() and shutil.disk_usage(folder).free < 2**20


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def printable(line: str) -> str:
    """A line as a terminal may show it: names from files can hold line breaks, and codes that move its cursor."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
