"""Folders to write to, and errors in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from trpts_peft.folders import check_empty, check_writable, first_line, is_full, printable


def test_an_empty_folder_and_one_that_can_be_made(tmp_path: Path) -> None:
    check_empty(tmp_path)
    check_empty(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path)
    check_writable(tmp_path / "link")


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path)
    with pytest.raises(ValueError, match="`output` must be an empty folder or not there"):
        check_empty(tmp_path)


@pytest.mark.parametrize("name", ["file", "file/below", "nowhere", "nowhere/below"])
def test_what_is_no_folder_and_cannot_become_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for check in (check_empty, check_writable):
        with pytest.raises(ValueError, match="`output` must be a folder that can be written to, got"):
            check(tmp_path / name)


def test_a_name_that_is_not_in_unicode(tmp_path: Path) -> None:
    """safetensors cannot open such a path, which else shows when all is trained."""
    with pytest.raises(ValueError, match="`output` must have a name in Unicode"):
        check_writable(tmp_path / "\udcff")


def test_a_drive_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trpts_peft.folders.os.path.lexists", lambda _: False)
    with pytest.raises(ValueError, match="`output` must be a folder that can be written to"):
        check_writable(Path("Z:/runs"))


def test_errors_in_one_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(OSError()) == "OSError"


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert printable("naïve ρ 'a'") == "naïve ρ 'a'"
    assert printable("a\nb\x1b[2K\u202e") == r"a\nb\x1b[2K\u202e"


@pytest.mark.parametrize("free, full", [(2**20 - 1, True), (2**20, False)])
def test_a_disk_with_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, full: bool) -> None:
    monkeypatch.setattr("trpts_peft.folders.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert is_full(tmp_path) is full
    assert not is_full(tmp_path / "none")
