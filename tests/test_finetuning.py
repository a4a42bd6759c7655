"""A run from settings to files: what it refuses, what it writes, and that a broken-off one ends as if it were whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import datasets
import pytest
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Trainer, TrainingArguments, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pictures import picture, write_base, write_folder
from trpts_peft import TRPTSCallback, calibrate, finetuning
from trpts_peft.data import process_state
from trpts_peft.deployment import load_adapted
from trpts_peft.finetuning import FinetuneSettings, finished, load_processor, prepare
from trpts_peft.image_data import load_image_data, with_pixel_values
from trpts_peft.inspection import read_config
from trpts_peft.methods import METHODS

NAMES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base model and a data set, as settings."""
    folder = tmp_path_factory.mktemp("given")
    write_base(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base.\n")
    write_folder(folder / "set", splits={"train": 6, "test": 3})
    return {"model": str(folder / "base"), "dataset": str(folder / "set"), "epochs": 2, "batch_size": 6}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(given: dict[str, Any], output: Path, **options: Any) -> tuple[FinetuneSettings, dict[str, Any]]:
    settings = FinetuneSettings(output=output, **{"keep_rate": 0.5, "token_layers": "1,2", **given, **options})
    return settings, prepare(settings).train()


# ---- settings ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_train": 1}, "`num_train` must be at least 2, got 1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"seed": 2**32}, r"`seed` must be below 2\*\*32, got 4294967296"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite number above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number above 0, got nan"),
        ({"keep_rate": 1.5}, r"`keep_rate` must be in \(0, 1\], got 1.5"),
        ({"budget": 2.0}, r"`budget` must be in \(0, 1\], got 2.0"),
        ({"token_layers": "three"}, "`token_layers` must be a number or block indices with commas, got 'three'"),
        ({"token_layers": ","}, "`token_layers` must be a number or block indices with commas, got ','"),
        ({"method": "lora", "keep_rate": 0.5}, "`keep_rate` must be left out with `method` 'lora'"),
        ({"method": "full", "token_layers": "2"}, "`token_layers` must be left out with `method` 'full'"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(model="m", dataset="d", output=tmp_path, **options)


@pytest.mark.parametrize("text, expected", [("3", 3), ("0", 0), ("3,6, 9", [3, 6, 9]), ("5,", [5])])
def test_token_layers_are_a_number_or_a_list(tmp_path: Path, text: str, expected: Any) -> None:
    settings = FinetuneSettings(model="m", dataset="d", output=tmp_path, token_layers=text)
    assert settings.trpts_options()["token_layers"] == expected


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_usual_learning_rate(tmp_path: Path, method: Any) -> None:
    settings = FinetuneSettings(model="m", dataset="d", output=tmp_path, method=method)
    assert settings.to_dict()["learning_rate"] == METHODS[method].learning_rate
    assert replace(settings, learning_rate=0.5).peak_learning_rate == 0.5


# ---- a whole run ----


@pytest.fixture(scope="module")
def done(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneSettings, dict[str, Any]]:
    return run(given, tmp_path_factory.mktemp("runs") / "red-green-blue")


def test_it_leaves_results_adapter_and_figures(done: Any) -> None:
    settings, _ = done
    assert sorted(path.name for path in settings.output.iterdir()) == [
        "adapter", "calibrated", "figures", "results.json", "settings.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (settings.output / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "config.json", "layer_importance.png",
        "preprocessor_config.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (settings.output / "figures").iterdir()) == [
        "layer_importance.png",
        "tokens.png",
    ]


def test_results_say_what_was_done(done: Any) -> None:
    settings, results = done
    assert results == json.loads((settings.output / "results.json").read_text())
    assert results["settings"]["learning_rate"] == METHODS["trpts"].learning_rate
    assert results["versions"]["torch"] == version("torch")
    assert results["data"] == {"classes": list(NAMES), "train": 18, "test": 9, "test_split": "test"}
    assert results["preprocessing"]["size"] == {"height": 32, "width": 32}
    assert results["seconds"]["steps"] == 6 and results["seconds"]["training"] > 0
    assert results["speed"]["predicted"] > 1 and results["speed"]["measured"] > 0
    assert results["selection"]["token_layers"] == [1, 2]
    assert results["bytes"] == (settings.output / "adapter" / "adapter_model.safetensors").stat().st_size


def test_the_accuracy_is_that_of_the_saved_adapter(done: Any, given: dict[str, Any]) -> None:
    settings, results = done
    model, processor = load_adapted(settings.output / "adapter")
    test = load_image_data(given["dataset"], progress=False).test
    batch = with_pixel_values(test, processor)[:]
    with torch.no_grad():
        right = model(torch.stack(batch["pixel_values"])).logits.argmax(-1) == batch["labels"]
    assert results["accuracy"] == pytest.approx(100 * right.double().mean().item())
    assert results["parameters"]["trainable"] == sum(
        p.numel() for name, p in model.named_parameters() if "trpts_" in name or "modules_to_save" in name
    )
    assert model.config.id2label == dict(enumerate(NAMES))


def test_the_card_says_what_was_reached(done: Any) -> None:
    settings, results = done
    card = ModelCard.load(settings.output / "adapter" / "README.md")
    data = card.data
    assert (data.library_name, data.license, data.metrics) == ("peft", "apache-2.0", ["accuracy"])
    assert data.eval_results[0].metric_value == round(results["accuracy"] / 100, 4)
    assert data.eval_results[0].dataset_name == "set" and "datasets" not in data.to_dict()
    assert data.model_name == "red-green-blue"
    assert f"| accuracy | {results['accuracy']:.2f} % |" in card.text
    macs = [results["parameters"][name] / 1e9 for name in ("macs_per_image", "macs_per_image_with_all_tokens")]
    assert macs[0] < macs[1]
    assert "| cost | {:.3g} GMACs an image, {:.3g} with all tokens |".format(*macs) in card.text
    assert "![Share of the top-scoring weights in each block](layer_importance.png)" in card.text
    assert "More Information Needed" not in card.text
    assert "import trpts_peft" in card.text and str(settings.dataset) not in card.text


def test_the_snippet_of_the_card_knows_the_names_of_the_classes(done: Any) -> None:
    folder = done[0].output / "adapter"
    (code, *_) = re.findall(r"```python\n(.*?)```", ModelCard.load(folder / "README.md").text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("user/repository", str(folder)), names)
    assert names["model"].config.id2label == dict(enumerate(NAMES))


def test_rates_of_a_merged_base_are_none_of_the_runs(given: dict[str, Any], tmp_path: Path) -> None:
    base = ViTForImageClassification.from_pretrained(given["model"])
    base.config.trpts_keep_rates = {"0": 0.5}
    base.save_pretrained(tmp_path / "merged")
    load_processor(given["model"]).save_pretrained(tmp_path / "merged")
    settings, _ = run({**given, "model": str(tmp_path / "merged")}, tmp_path / "run", epochs=1)
    assert not hasattr(AutoConfig.from_pretrained(settings.output / "adapter"), "trpts_keep_rates")


def test_a_finished_run_is_read_and_not_run_again(done: Any) -> None:
    settings, results = done
    assert finished(replace(settings, resume=True)) == results
    with pytest.raises(ValueError, match="`output` must be empty or not there"):
        finished(settings)


@pytest.mark.parametrize(
    "method, folder", [("lora", "adapter"), ("linear", "model"), ("bitfit", "model"), ("full", "model")]
)
def test_other_methods(given: dict[str, Any], tmp_path: Path, method: str, folder: str) -> None:
    options = {"keep_rate": 0.95, "token_layers": "3", "epochs": 1}
    settings, results = run(given, tmp_path / "run", method=method, **options)
    assert results["speed"] is None
    assert (results["figures"], "selection" in results) == ([], False)
    saved = settings.output / folder
    assert AutoConfig.from_pretrained(saved).id2label == dict(enumerate(NAMES))
    if folder == "model":
        model = ViTForImageClassification.from_pretrained(saved)
        base = ViTForImageClassification.from_pretrained(given["model"])
        changed = {n for n, p in model.vit.named_parameters() if not torch.equal(p, base.vit.get_parameter(n))}
        biases = {name for name, _ in model.vit.named_parameters() if name.endswith("bias")}
        assert bool(changed) == (method != "linear")
        assert changed <= biases or method == "full"
        assert ModelCard.load(saved / "README.md").data.library_name == "transformers"
        assert ModelCard.load(saved / "README.md").data.to_dict().get("base_model") is None  # it lies in a folder
    else:
        assert isinstance(PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(
            given["model"], num_labels=3, ignore_mismatched_sizes=True), saved), PeftModel)  # fmt: skip


# ---- what is refused, with nothing written ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "no/such"}, "`model` must be an image classifier, .* got 'no/such'"),
        ({"dataset": "/no/such"}, "`dataset` must be an id"),
        ({"label_column": "kind"}, "`label_column` must be one of"),
        ({"budget": 0.99}, "`budget` must be from"),
        ({"token_layers": "1,9"}, "`token_layers` must be block indices below 4"),
        ({"token_layers": "5"}, "`token_layers` must be at most 4"),
        ({"push_to_hub": "a/b"}, "`push_to_hub` must be a repository that you may write to"),
        ({"push_to_hub": "a/b/c"}, "`push_to_hub` must be user/name, got 'a/b/c'"),
    ],
)
def test_what_does_not_fit_leaves_nothing(given: dict[str, Any], tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run({**given, **options}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def other_processor(folder: Path) -> None:
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def rename_weights(folder: Path) -> None:
    """As they are called in the state dict of a compiled model."""
    file = folder / "model.safetensors"
    save_file({f"_orig_mod.{key}": tensor for key, tensor in load_file(file).items()}, file)


def another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def keep_no_size(folder: Path) -> None:
    ViTImageProcessorPil(do_resize=False).save_pretrained(folder)


def unknown_activation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "none such"}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (other_processor, "`model` must take what its image processor makes"),
        (cut_weights, "`model` must be an image"),
        (rename_weights, r"`model` must be an image .*lacks \d+ of its weights.*; vit\."),
        (another_size, r"`model` must be an image .*lacks 12 of its weights.*; vit\..*mlp\.fc1"),
        (unknown_activation, "`model` must be an image .*none such"),
    ],
)
@pytest.mark.parametrize("method", ["trpts", "linear"])
def test_a_damaged_model_leaves_nothing(
    given: dict[str, Any], tmp_path: Path, damage: Any, message: str, method: str
) -> None:
    options = {**given, "model": str(write_base(tmp_path / "base"))}
    damage(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        prepare(FinetuneSettings(output=tmp_path / "run", method=method, **options))
    assert not (tmp_path / "run").exists()


def test_images_that_make_no_batch_are_found_out_first(given: dict[str, Any], tmp_path: Path) -> None:
    keep_no_size(write_base(tmp_path / "base"))
    data = write_folder(tmp_path / "set", splits={"train": 3, "test": 1})
    picture(0, 0, size=(40, 36)).save(data / "test" / "red" / "0.png")
    options = {**given, "model": str(tmp_path / "base"), "dataset": str(data)}
    with pytest.raises(ValueError, match="`dataset` must hold images of one size"):
        prepare(FinetuneSettings(output=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_loss_is_that_of_classes_whatever_the_base_was_trained_for(tmp_path: Path, problem: str) -> None:
    write_base(tmp_path / "base", problem_type=problem)
    model = finetuning.load_classifier(str(tmp_path / "base"), NAMES)
    labels = torch.tensor([2, 0])
    outputs = model(torch.randn(2, 3, 32, 32), labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_trains_in_32(tmp_path: Path, dtype: torch.dtype) -> None:
    write_base(tmp_path / "base")
    ViTForImageClassification.from_pretrained(tmp_path / "base").to(dtype).save_pretrained(tmp_path / "base")
    assert AutoConfig.from_pretrained(tmp_path / "base").dtype == dtype
    model = finetuning.load_classifier(str(tmp_path / "base"), NAMES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_results_are_written_without_the_figures_that_fail(given: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("trpts_peft.report.plot_tokens", Mock(side_effect=RuntimeError("no such font")))
    settings, results = run({**given, "epochs": 1}, tmp_path / "run")
    assert results["figures"] == ["layer_importance.png"] == [p.name for p in (tmp_path / "run/figures").iterdir()]
    assert finished(replace(settings, resume=True)) == results


def test_results_that_are_not_whole_are_named(done: Any, tmp_path: Path) -> None:
    settings = replace(done[0], output=tmp_path / "run", resume=True)
    shutil.copytree(done[0].output, settings.output)
    (settings.output / "results.json").write_text('{"accuracy": 50.0}')
    with pytest.raises(ValueError, match=r"`output` must hold a whole results\.json, got one without"):
        finished(settings)


@pytest.mark.parametrize("reporter", ["nonsense", "comet_ml", "mlflow,nonsense"])
def test_a_reporter_that_is_not_there_is_found_out_first(given: Any, tmp_path: Path, reporter: str) -> None:
    with pytest.raises(ValueError, match="`report_to` must name reporters that are installed, got"):
        run({**given, "dataset": "/no/such"}, tmp_path / "run", report_to=reporter)


def test_a_training_that_diverges_is_no_result(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"`learning_rate` must let the training converge, got 1e\+30"):
        run(given, tmp_path / "run", learning_rate=1e30)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"calibrated", "checkpoints", "settings.json"}


# ---- what reaches the Trainer ----


def test_the_recipe_reaches_the_trainer(given: dict[str, Any], tmp_path: Path) -> None:
    options = {"seed": 7, "num_workers": 1, "bf16": True, "learning_rate": 0.5, "num_train": 12, "epochs": 3}
    prepared = prepare(FinetuneSettings(output=tmp_path / "run", method="linear", **{**given, **options}))
    arguments = prepared._trainer().args
    expected = {
        "seed": 7, "dataloader_num_workers": 1, "bf16": True, "learning_rate": 0.5, "num_train_epochs": 3,
        "per_device_train_batch_size": 6, "weight_decay": 0.0, "warmup_steps": 0.1, "lr_scheduler_type": "cosine",
        "report_to": [], "save_strategy": "epoch",
    }  # fmt: skip
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert len(prepared.data.train) == 12


@pytest.mark.parametrize("method, reporters, logged", [("trpts", ["x"], 1), ("trpts", [], 0), ("linear", ["x"], 0)])
def test_reporters_get_the_adapters_norms(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, reporters: list[str], logged: int
) -> None:
    prepared = prepare(FinetuneSettings(output=tmp_path / "run", method=method, **given))
    monkeypatch.setattr(FinetuneSettings, "reporters", reporters)
    monkeypatch.setattr(
        finetuning, "TrainingArguments", lambda **options: TrainingArguments(**{**options, "report_to": "none"})
    )
    callbacks = prepared._trainer().callback_handler.callbacks
    assert len([callback for callback in callbacks if isinstance(callback, TRPTSCallback)]) == logged


def test_workers_load_for_calibration_too(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = []
    monkeypatch.setattr(finetuning, "calibrate", lambda _model, data, **_: loaders.append(data))
    prepare(FinetuneSettings(output=tmp_path / "run", **{**given, "num_workers": 2}))
    assert [loader.num_workers for loader in loaders] == [2]


def test_a_process_trains_on_one_gpu(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = vars(TrainingArguments)["_setup_devices"]

    def two_gpus(arguments: Any) -> torch.device:
        device: torch.device = found.func(arguments)
        arguments._n_gpu = 2
        return device

    devices: Any = cached_property(two_gpus)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    prepared = prepare(FinetuneSettings(output=tmp_path / "run", method="linear", **given))
    assert prepared._trainer().args.train_batch_size == given["batch_size"]


def test_images_are_shared_out_among_processes(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = process_state()
    state = SimpleNamespace(
        num_processes=4, is_main_process=True, device=alone.device, wait_for_everyone=lambda: None, process_index=0
    )
    monkeypatch.setattr(finetuning, "process_state", lambda: state)
    settings = FinetuneSettings(output=tmp_path / "run", method="linear", **given)
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of the number of processes, 4, got 6"):
        prepare(settings)
    assert prepare(replace(settings, batch_size=8))._trainer().args.per_device_train_batch_size == 2


# ---- the output folder ----


def test_another_folder_is_not_touched(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for resume, message in ((False, "empty or not there"), (True, "must hold a run to resume")):
        with pytest.raises(ValueError, match=f"`output` .*{message}"):
            run(given, tmp_path, resume=resume)
    for output in (tmp_path / "notes", tmp_path / "notes" / "run"):
        with pytest.raises(ValueError, match="`output` must be a folder that can be written to"):
            run(given, output)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["notes"]


def test_of_two_runs_started_into_one_folder_one_is_refused(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FinetuneSettings(output=tmp_path / "run", **given)

    def overtaken(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(finetuning, "calibrate", calibrate)
        prepare(replace(settings, seed=1))
        calibrate(*arguments, **options)

    monkeypatch.setattr(finetuning, "calibrate", overtaken)
    with pytest.raises(ValueError, match="`output` must be empty or not there"):
        prepare(settings)
    assert json.loads((settings.output / "settings.json").read_text())["seed"] == 1
    assert not (settings.output / ".lock").exists()


def test_of_two_runs_that_go_on_in_one_folder_one_is_refused(stopped: FinetuneSettings) -> None:
    first = prepare(stopped)
    with pytest.raises(ValueError, match="`output` must be a folder that no other run writes to"):
        prepare(stopped)
    results = first.train()
    assert finished(stopped) == results
    assert not (stopped.output / ".lock").exists()


@pytest.mark.parametrize("stage", ["set up", "train"])
def test_a_run_that_fails_leaves_the_folder_to_the_next(stopped: Any, monkeypatch: Any, stage: str) -> None:
    stop = Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as interrupted:
        patch.setattr(*((finetuning, "write_json") if stage == "set up" else (Trainer, "train")), stop)
        prepare(stopped).train()
    second = prepare(stopped)  # while what was raised, and with it the first run, is held
    assert interrupted.value is not None
    assert second.lock is not None


def test_a_run_trains_once(stopped: FinetuneSettings) -> None:
    first = prepare(stopped)
    first.train()
    with pytest.raises(RuntimeError, match="`train` must be called once"):
        first.train()


def test_a_run_that_has_ended_meanwhile_is_not_trained_again(stopped: Any, monkeypatch: Any) -> None:
    load = finetuning.load_image_data

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(finetuning, "load_image_data", load)
        prepare(stopped).train()
        return load(*arguments, **options)

    monkeypatch.setattr(finetuning, "load_image_data", overtaken)
    with pytest.raises(ValueError, match="has come to its end meanwhile"):
        prepare(stopped)
    assert finished(stopped) is not None


def test_every_process_hears_that_the_folder_is_taken(given: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def hear(words: list[str]) -> None:
        words[0] = "`output` is taken"

    monkeypatch.setattr(finetuning, "broadcast_object_list", hear)
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    with pytest.raises(ValueError, match="`output` is taken"):
        prepare(FinetuneSettings(output=tmp_path / "run", method="linear", **given))
    assert not (tmp_path / "run").exists()


def test_every_process_is_told_of_what_failed(stopped: FinetuneSettings, monkeypatch: Any) -> None:
    told: list[str] = []
    monkeypatch.setattr(finetuning, "broadcast_object_list", told.extend)
    monkeypatch.setattr(finetuning, "write_json", Mock(side_effect=SafetensorError("the disk is gone")))
    with pytest.raises(SafetensorError):
        prepare(stopped)
    assert told == ["the disk is gone"]


def test_a_resumed_run_has_the_same_settings(done: Any) -> None:
    settings, _ = done
    with pytest.raises(ValueError, match="`seed` must be as in the run to resume, 0, got 1"):
        prepare(replace(settings, resume=True, seed=1))


def test_a_resumed_run_may_report_load_and_lie_elsewhere(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, results = done
    monkeypatch.chdir(settings.output.parent)
    moved = replace(settings, output=Path(settings.output.name), resume=True, num_workers=3)
    relative = os.path.relpath(settings.model, settings.output.parent)
    assert finished(replace(moved, model=relative)) == results


@pytest.fixture
def stopped(given: dict[str, Any], tmp_path: Path) -> FinetuneSettings:
    """A run that was set up, and no more; to be resumed. Its data set is its own."""
    data = write_folder(tmp_path / "set", splits={"train": 3, "test": 1})
    options = {**given, "dataset": str(data), "epochs": 1, "token_layers": "1,"}
    prepare(FinetuneSettings(output=tmp_path / "run", **options))
    return FinetuneSettings(output=tmp_path / "run", resume=True, **options)


def test_it_is_not_calibrated_again(stopped: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "calibrate", None)
    resumed = prepare(stopped).model.peft_config["default"]
    assert resumed.connections == read_config(stopped.output / "calibrated").connections is not None


def test_its_calibration_must_be_whole(stopped: FinetuneSettings) -> None:
    file = stopped.output / "calibrated" / "adapter_model.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:100]), file.unlink):
        damage()
        with pytest.raises(ValueError, match="`output` must hold a whole 'calibrated'"):
            prepare(stopped)


def test_its_data_must_be_the_same(stopped: FinetuneSettings, tmp_path: Path) -> None:
    (tmp_path / "set" / "train" / "red").rename(tmp_path / "set" / "train" / "azure")
    (tmp_path / "set" / "test" / "red").rename(tmp_path / "set" / "test" / "azure")
    with pytest.raises(ValueError, match="`dataset` must be as in the run to resume"):
        prepare(stopped)


# ---- broken off ----


STOPPED = """
import os, signal, sys
from transformers import Trainer
import test_finetuning, trpts_peft.cli

how, stage = getattr(signal, sys.argv.pop(1)), sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may be born deaf to it
save = Trainer._save_checkpoint

def save_and_stop(self, *arguments):
    save(self, *arguments)
    os.kill(os.getpid(), how)

def stop(*arguments, **options):
    os.kill(os.getpid(), how)

Trainer._save_checkpoint, Trainer.train = (save_and_stop, Trainer.train) if stage == "epoch" else (save, stop)
trpts_peft.cli.main()
"""


@pytest.mark.parametrize(
    "how, stage, code", [("SIGKILL", "epoch", -9), ("SIGINT", "epoch", 130), ("SIGKILL", "start", -9)]
)
def test_a_run_broken_off_ends_as_if_it_were_whole(done: Any, tmp_path: Path, how: str, stage: str, code: int) -> None:
    """A real second process is killed, or gets Ctrl-C, after its first epoch or before; the rest is run here."""
    settings, results = done
    broken = replace(settings, output=tmp_path / "run")
    options = {name: value for name, value in broken.to_dict().items() if isinstance(value, (str, int, float))}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if not isinstance(value, bool)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", STOPPED, how, stage, "finetune", *flags]
    stopped = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert stopped.returncode == code, stopped.stderr
    if signal.Signals[how] is signal.SIGINT:
        assert "interrupted. The same command with --resume" in stopped.stderr
    assert not (broken.output / "results.json").exists()
    resumed = prepare(replace(broken, resume=True)).train()
    assert resumed["seconds"]["resumed_from_step"] == (3 if stage == "epoch" else 0)
    assert resumed["accuracy"] == results["accuracy"]
    ours, whole = (folder / "adapter" / "adapter_model.safetensors" for folder in (broken.output, settings.output))
    assert ours.read_bytes() == whole.read_bytes()
    assert read_config(broken.output / "adapter") == read_config(settings.output / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_bit(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    options = {**given, "method": method, "learning_rate": 1e-2, "epochs": 3}
    whole = prepare(FinetuneSettings(output=tmp_path / "whole", **options)).train()
    save = Trainer._save_checkpoint

    def save_and_stop(self: Trainer, *arguments: Any) -> None:
        save(self, *arguments)
        raise KeyboardInterrupt

    settings = FinetuneSettings(output=tmp_path / "run", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save_checkpoint", save_and_stop)
        prepare(settings).train()
    resumed = prepare(replace(settings, resume=True)).train()
    assert (resumed["seconds"]["resumed_from_step"], resumed["loss"]) == (3, whole["loss"])
    (ours,), (theirs,) = (
        [f for f in (tmp_path / n).glob("*/*model.safetensors") if f.parent.name != "calibrated"]
        for n in ("run", "whole")
    )
    assert load_file(ours).keys() == load_file(theirs).keys()
    assert all(torch.equal(tensor, load_file(theirs)[key]) for key, tensor in load_file(ours).items())
