"""What lies in the output folder of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from trpts_peft.run_folder import check_output, last_checkpoint, read_json, write_json


def test_a_json_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})


@pytest.mark.parametrize("text", ["{", "[]", "{}", "1"])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"`output` must hold a whole settings.json, got .*: delete it"):
        read_json(tmp_path / "settings.json")


def test_a_draft_is_no_run(tmp_path: Path) -> None:
    """It is what a run leaves that was killed while it wrote its first file."""
    (tmp_path / "settings.json.part").write_text("{")
    check_output(tmp_path, {"resume": False})


CHECKPOINT = {"trainer_state.json": "{}", "optimizer.pt": "", "scheduler.pt": "", "adapter_model.safetensors": ""}


def test_the_last_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, changes in enumerate(
        [{}, {}, {"trainer_state.json": '{"half'}, *({name: None} for name in CHECKPOINT)], 9
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name, content in {**CHECKPOINT, **changes}.items():
            if content is not None:
                (tmp_path / f"checkpoint-{step}" / name).write_text(content)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
