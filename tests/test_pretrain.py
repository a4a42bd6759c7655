"""The pretraining script: what it saves can be fine-tuned, and a run broken off ends as if it were whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, Trainer, ViTForImageClassification

import pretrain
from pictures import picture, write_folder
from trpts_peft.finetuning import FinetuneSettings, prepare
from trpts_peft.image_data import load_image_data, with_pixel_values

SIZES, SMALL = pretrain.SIZES, {"xs": (16, 2, 2)}
STEPS = 3  # in an epoch


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of images, one of them gray; a cache of its own, and a ViT of two blocks."""
    folder = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(pretrain, "SIZES", SMALL)
        write_folder(folder / "set", splits={"train": 4, "test": 3})
        picture(2, seed=0, mode="L").save(folder / "set" / "train" / "blue" / "0.png")
        yield folder / "set"


def options(data: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--size=xs", "--epochs=2", "--batch-size=4", "--image-size=16", "--patch-size=8"]
    return [f"--data={data}", f"--output={output}", *sizes, *more]


def run(data: Path, output: Path, *more: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain", *options(data, output, *more)])
        pretrain.main()
    return json.loads((output / "results.json").read_text())


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("runs") / "vit"
    run(data, output)
    return output


# ---- what it leaves ----


def test_the_accuracy_is_that_of_the_saved_model(data: Path, done: Path) -> None:
    results, model = json.loads((done / "results.json").read_text()), ViTForImageClassification.from_pretrained(done)
    processor = AutoImageProcessor.from_pretrained(done)
    batch = with_pixel_values(load_image_data(str(data), progress=False).test, processor)[:]
    with torch.no_grad():
        logits = model(torch.stack(batch["pixel_values"])).logits
    right = (logits.argmax(-1) == batch["labels"]).double()
    assert results["accuracy"] == pytest.approx(100 * right.mean().item())
    assert results["loss"] == pytest.approx(cross_entropy(logits, batch["labels"], label_smoothing=0.1).item())
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert tuple(processor.image_mean) == tuple(processor.image_std) == (0.5, 0.5, 0.5)
    assert {path.name for path in done.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "results.json", "settings.json",
    }  # fmt: skip


def test_results_say_what_was_done(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    expected = {"epochs": 2, "batch_size": 4, "learning_rate": 1.5e-3, "weight_decay": 0.05, "least_area": 0.4}
    assert expected.items() <= results["settings"].items()
    assert results["data"] == {"classes": ["blue", "green", "red"], "train": 12, "test": 9, "test_split": "test"}
    assert len(results["training_loss"]) == 2 and all(0.9 < loss < 1.2 for loss in results["training_loss"])  # log 3
    assert results["parameters"] == sum(tensor.numel() for tensor in load_file(done / "model.safetensors").values())


def test_it_can_be_fine_tuned(data: Path, done: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(model=str(done), dataset=str(data), output=tmp_path / "run", method="linear", epochs=1)
    assert prepare(settings).train()["data"]["train"] == 12


def test_a_finished_run_is_read_and_not_run_again(
    data: Path, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "pretrain", None)
    accuracy = run(data, done, "--resume")["accuracy"]
    assert capsys.readouterr().out == f"top-1 on the 9 test images: {accuracy:.2f} %\n"


# ---- broken off ----

KILLED = """
import os, signal, sys
from transformers import Trainer
import pretrain, test_pretrain

save = Trainer._save_checkpoint

def save_and_die(self, *arguments):
    save(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)

Trainer._save_checkpoint, pretrain.SIZES = save_and_die, test_pretrain.SMALL
pretrain.main()
"""


def test_a_killed_run_ends_as_if_it_were_whole(data: Path, done: Path, tmp_path: Path) -> None:
    """A real second process is killed after its first epoch; the rest is run here."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(data.parent / "cache")}
    command = [sys.executable, "-c", KILLED, *options(data, tmp_path / "run")]
    killed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"checkpoint-{STEPS}"]
    results, whole = run(data, tmp_path / "run", "--resume"), json.loads((done / "results.json").read_text())
    assert weights(tmp_path / "run") == weights(done)
    assert (results["accuracy"], results["training_loss"]) == (whole["accuracy"], whole["training_loss"])


# Python 3.12 and later, of processes that load images.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("workers", "epochs"), [(0, 2), (2, 1)])
def test_it_goes_on_from_any_epoch(data: Path, tmp_path: Path, monkeypatch: Any, workers: int, epochs: int) -> None:
    """Also with nothing left to train, and where other processes crop the images."""
    device, save, steps = pretrain.device_options(), Trainer._save_checkpoint, []

    def save_and_stop(self: Trainer, *arguments: Any) -> None:
        save(self, *arguments)
        if self.state.global_step == epochs * STEPS:
            raise KeyboardInterrupt

    def count(self: Trainer, *arguments: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        return step(self, *arguments)

    monkeypatch.setattr(pretrain, "device_options", lambda: {**device, "dataloader_num_workers": workers})
    run(data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save_checkpoint", save_and_stop)
        run(data, tmp_path / "run")
    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", count)
    run(data, tmp_path / "run", "--resume")
    assert steps == list(range(epochs * STEPS, 2 * STEPS))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_training_that_diverges_is_no_model(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="`learning_rate` must let the training converge"):
        run(data, tmp_path / "run", "--learning-rate=1e30", "--epochs=3")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "settings.json"}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-9"}


# ---- what is refused, with nothing written ----


def test_another_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for more, message in (((), "must be empty or not there"), (("--resume",), "must hold a run to resume")):
        with pytest.raises(ValueError, match=f"`output` {message}"):
            run(Path("no such"), tmp_path, *more)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_resumed_run_is_of_the_same_settings_and_data(data: Path, done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`epochs` must be as in the run to resume, 2, got 3"):
        run(data, done, "--resume", "--epochs=3")
    settings = json.loads((done / "settings.json").read_text())
    settings["data"]["train"] = 13
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="`dataset` must be as in the run to resume"):
        run(data, tmp_path, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epochs=0", "`epochs` must be above 0, got 0"),
        ("--batch-size=-1", "`batch_size` must be above 0, got -1"),
        ("--learning-rate=nan", "`learning_rate` must be above 0, got nan"),
        ("--image-size=0", "`image_size` must be above 0, got 0"),
        ("--patch-size=0", "`patch_size` must be above 0, got 0"),
        ("--patch-size=7", "`image_size` must be a multiple of `patch_size`, got 16"),
        ("--size=huge", "invalid choice: 'huge'"),
    ],
)
def test_bad_options(data: Path, tmp_path: Path, capsys: Any, option: str, message: str) -> None:
    with pytest.raises(SystemExit):
        run(data, tmp_path / "run", option)
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- what reaches the Trainer ----


@pytest.mark.parametrize(("cuda", "size", "epochs"), [(True, "tiny", 100), (False, "xs", 14)])
def test_the_machine_decides_where_the_command_does_not(monkeypatch: Any, cuda: bool, size: str, epochs: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda)
    monkeypatch.setattr(pretrain, "SIZES", {"xs": (), "tiny": ()})
    monkeypatch.setattr(sys, "argv", ["pretrain", "--data=a", "--output=b"])
    settings, device = pretrain.parse_arguments(), pretrain.device_options()
    assert (settings["size"], settings["epochs"]) == (size, epochs)
    assert (device["use_cpu"], device["bf16"], device["dataloader_pin_memory"]) == (not cuda, cuda, cuda)
    assert bool(device["dataloader_num_workers"]) == cuda


def test_the_recipe(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *options(data, tmp_path, "--learning-rate=0.5", "--epochs=7")])
    trainer = pretrain.new_trainer(pretrain.parse_arguments(), load_image_data(str(data), progress=False))
    expected = {
        "learning_rate": 0.5, "num_train_epochs": 7, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05, "weight_decay": 0.05, "label_smoothing_factor": 0.1, "optim": "adamw_torch_fused",
        "per_device_eval_batch_size": 4, "report_to": [],
    }  # fmt: skip
    assert {name: getattr(trainer.args, name) for name in expected} == expected
    one, other = (trainer.train_dataset[:2]["pixel_values"] for _ in range(2))
    assert one.shape == (2, 3, 16, 16) and not torch.equal(one, other)
    assert torch.equal(*(torch.stack(trainer.eval_dataset[:2]["pixel_values"]) for _ in range(2)))


@pytest.mark.parametrize(("size", "millions", "head"), [("xs", 2.4, 32), ("tiny", 5.4, 64), ("small", 21.4, 64)])
def test_sizes(monkeypatch: Any, size: str, millions: float, head: int) -> None:
    monkeypatch.setattr(pretrain, "SIZES", SIZES)
    with torch.device("meta"):
        vit = pretrain.new_vit({"size": size, "image_size": 64, "patch_size": 8}, ["a", "b"])
    assert vit.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    assert vit.config.hidden_size / vit.config.num_attention_heads == head


def test_a_crop_is_a_part_of_the_image_and_half_of_them_are_mirrored() -> None:
    """The image tells for each pixel where it was: red counts the columns, green the rows."""
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    image = Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8))
    crops = np.stack([np.asarray(pretrain.random_crop(image, (100, 50))) for _ in range(400)]).astype(float)
    left, right = crops[:, 0, 0, 0], crops[:, 0, -1, 0]
    widths, heights = abs(right - left) / 198, (crops[:, -1, 0, 1] - crops[:, 0, 0, 1]) / 98
    assert 0.38 < (widths * heights).min() < 0.45 and 0.9 < (widths * heights).max() < 1.02
    assert 0.7 < (widths / heights).min() < 0.8 and 1.25 < (widths / heights).max() < 1.4
    for first in (np.minimum(left, right) / 199, crops[:, 0, 0, 1] / 99):
        assert first.min() < 0.02 and first.max() > 0.3
    assert 160 < (left > right).sum() < 240
