"""The command as it is typed: exit codes, one line for what was refused, and what is printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
from PIL import Image
from transformers import ViTForImageClassification
from typer.testing import CliRunner, Result

from pictures import picture, write_base, write_folder
from trpts_peft.cli import app
from trpts_peft.finetuning import FinetuneSettings

OPTIONS = ("--epochs", "1", "--batch-size", "3", "--token-layers", "1,", "--keep-rate", "0.5")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a data set, an image, and two finished runs."""
    home = tmp_path_factory.mktemp("home")
    write_base(home / "base")
    write_folder(home / "set", splits={"train": 3, "test": 2})
    picture(0, 0).save(home / "picture.png")
    for name, seed in (("one", "0"), ("two", "1")):
        result = finetune(home, "--output", name, *OPTIONS, "--seed", seed)
        assert result.exit_code == 0, result.output
    return home


def trpts(home: Path, *arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        return CliRunner().invoke(app, arguments)


def finetune(home: Path, *arguments: str) -> Result:
    return trpts(home, "finetune", "--model", "base", "--dataset", "set", *arguments)


def refused(result: Result) -> str:
    """The one line, in the last of what went to stderr; progress bars are wiped from the screen."""
    assert result.exit_code == 2, result.output
    line = result.stderr.rstrip("\n").replace("\r", "\n").splitlines()[-1]
    assert line.startswith("trpts: `")
    return line


def test_help_describes_every_setting() -> None:
    text = "".join(CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "400"}).stdout.split())
    for name, setting in FinetuneSettings.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in text
        assert "".join(setting.metadata["help"].split()) in text, name


def test_the_end_says_what_was_reached(home: Path) -> None:
    results = json.loads((home / "one" / "results.json").read_text())
    shown = finetune(home, "--output", "one", *OPTIONS, "--resume")
    assert shown.exit_code == 0
    assert f"accuracy  {results['accuracy']:.2f} %" in shown.stdout
    assert f"{results['bytes']:,} bytes on disk" in shown.stdout
    assert "saved     one/adapter" in shown.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--keep-rate", "2"), "`keep_rate` must be in (0, 1], got 2.0."),
        (("--label-column", "kind"), "`label_column` must be one of ['image', 'label'], got 'kind'."),
        (("--budget", "0.9"), "`budget` must be from"),
        (("--output", "picture.png/new"), "`output` must be a folder that can be written to"),
        (("--report-to", "nonsense"), "`report_to` must name reporters that are installed, got 'nonsense'"),
        (("--output", "set"), "`output` must be empty or not there, got 'set' with files in it"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(home: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(finetune(home, "--output", "new", *arguments))
    assert not (home / "new").exists()


def test_an_upload_of_a_finished_run_that_fails_is_one_line(home: Path) -> None:
    options = ("--output", "one", *OPTIONS)
    for name in ("a/b/c", "someone/offline"):
        assert "`push_to_hub` must be" in refused(finetune(home, *options, "--resume", "--push-to-hub", name))


def test_a_training_that_diverges_is_one_line(home: Path, tmp_path: Path) -> None:
    options = ["--epochs", "1", "--batch-size", "3", "--learning-rate", "1e30"]
    line = refused(finetune(home, "--output", str(tmp_path / "diverged"), *options))
    assert line.startswith("trpts: `learning_rate` must let the training converge")


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device")])
def test_a_full_disk_is_one_line(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("trpts_peft.finetuning.FinetuneRun.train", Mock(side_effect=error))
    result = finetune(home, "--output", str(tmp_path / "a"), *OPTIONS)
    assert result.exception is error  # there is space: it was another
    monkeypatch.setattr("trpts_peft.cli.is_full", lambda _: True)
    result = finetune(home, "--output", str(tmp_path / "b"), *OPTIONS)
    assert result.exit_code == 2
    assert result.stderr.rstrip().endswith("The same command with --resume goes on from the last checkpoint.")
    assert "trpts: no space is left for" in result.stderr


def test_help_is_printed_in_the_encodings_of_old_terminals() -> None:
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "trpts_peft", "finetune", "--help"]
    shown = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert b"--keep-rate" in shown.stdout


def test_names_that_a_console_has_no_letters_for_end_no_command(home: Path) -> None:
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    output = home / "\u82b1"
    command = [sys.executable, "-m", "trpts_peft", "merge", "one/adapter", "--output", str(output)]
    command += ["--token-selection", "drop"]
    shown = subprocess.run(command, capture_output=True, env=environment, timeout=300, cwd=home)
    assert (shown.returncode, shown.stdout.split()[0]) == (0, b"wrote"), shown.stderr
    assert shown.stdout.rstrip().endswith(rb"\u82b1")


@pytest.mark.parametrize("arguments", [("finetune",), ("finetune", "--method", "magic"), ("inspect",), ("nothing",)])
def test_what_cannot_be_parsed_is_exit_code_2(home: Path, arguments: tuple[str, ...]) -> None:
    assert trpts(home, *arguments).exit_code == 2


def test_inspect(home: Path) -> None:
    text, data = (trpts(home, "inspect", "one/adapter", *flags) for flags in ((), ("--json",)))
    assert text.exit_code == data.exit_code == 0
    assert json.loads(data.stdout)["token_layers"] == [1]
    assert "token layers  1 at keep rate 0.5" in text.stdout
    assert "`adapter` must hold adapter_config.json" in refused(trpts(home, "inspect", "set"))


def test_merge(home: Path) -> None:
    assert "`token_selection` must be 'keep' or 'drop'" in refused(trpts(home, "merge", "one/adapter", "--output", "m"))
    result = trpts(home, "merge", "one/adapter", "--output", "merged", "--token-selection", "keep")
    assert result.exit_code == 0
    assert re.fullmatch(r"wrote merged\n.*apply_token_selection\(model\).*\n", result.stdout)
    assert ViTForImageClassification.from_pretrained(home / "merged").config.trpts_keep_rates == {"1": 0.5}
    assert "`output` must be an empty folder" in refused(trpts(home, "merge", "one/adapter", "--output", "merged"))


def test_plot(home: Path) -> None:
    result = trpts(home, "plot", "one/adapter", "two/adapter", "--output", "figures", "--image", "picture.png")
    assert result.exit_code == 0, result.output
    names = ["layer_importance.png", "overlap.png", "tokens-one.png", "tokens-two.png"]
    assert sorted(path.name for path in (home / "figures").iterdir()) == names
    assert result.stdout.split() == [word for name in names for word in ("wrote", f"figures/{name}")]
    Image.new("I;16", (32, 32)).save(home / "deep.png")
    content = (home / "picture.png").read_bytes()
    (home / "damaged.png").write_bytes(content.replace(b"IDAT", b"\0DAT"))  # over which Pillow raises a SyntaxError
    for arguments in (
        ("--output", "f", "--image", "deep.png"),
        ("--output", "f", "--image", "damaged.png"),
        ("--output", "figures"),
        ("--output", "f", "--image", "none.png"),
        ("--output", "f", "--image", "set"),
    ):
        refused(trpts(home, "plot", "one/adapter", *arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        line = trpts(home, "plot", "one/adapter", "--output", "f")
    assert (line.exit_code, line.stderr.startswith("trpts: Figures need matplotlib")) == (2, True)
    assert not (home / "f").exists()


def test_the_console_script_and_the_module_are_the_command() -> None:
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "trpts_peft", "inspect", "no/such"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("trpts: `adapter` must be a folder") and result.stderr.count("\n") == 1
