"""Several processes, started by `accelerate launch`, decide, train and save what one does.

They compute on CPUs and talk by gloo. FSDP is accelerate's own, which wants GPUs: it is told that there are some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from conftest import LabelledImages, build_vit
from trpts_peft import TRPTSConfig, calibrate, data, estimate_fisher
from trpts_peft.data import of_first_process, sum_of_processes

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "launch"
COUNTS = (13, 3)  # batches of 4, 4, 4, 1; with 3 samples the second process has none at all
TOLERANCE = 1e-5
STEPS, BATCH_SIZE = 4, 8

DDP_SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from test_processes import COUNTS, SPARING, calibrated, scored, trained, trained_tensors

results = {count: calibrated(count) for count in COUNTS}  # before there is any Accelerator
drawn = scored()
accelerator = Accelerator()
assert accelerator.num_processes == 2
folder, rank = sys.argv[1], accelerator.process_index
for count, result in results.items():
    torch.save(result, f"{folder}/{rank}-{count}.pt")
torch.save(drawn, f"{folder}/{rank}-drawn.pt")
for name, options in {"default": {}, "sparing": SPARING}.items():
    trainer = trained(f"{folder}/{name}-{rank}", processes=2, **options)  # a folder each: who writes shows
    torch.save(trained_tensors(trainer.model), f"{folder}/{name}-{rank}.pt")
accelerator.end_training()
"""

FSDP_SCRIPT = """
import json, os, sys
from accelerate import PartialState
from accelerate.utils import DistributedType

stock = PartialState._prepare_backend
PartialState._prepare_backend = lambda self, cpu=False, *args: (
    stock(self, cpu, *args) if cpu else ("gloo", DistributedType.MULTI_GPU)
)
from test_processes import refusals, trained

folder = sys.argv[1]
trainer = trained(f"{folder}/full", processes=2, use_cpu=False)
assert trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2
refused = refusals(trainer.model)
trained(f"{folder}/full-resumed", f"{folder}/full/checkpoint-2", processes=2, use_cpu=False)
os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"  # where the launcher puts what the config says
trained(f"{folder}/sharded", max_steps=2, processes=2, use_cpu=False)
trained(f"{folder}/sharded-resumed", f"{folder}/sharded/checkpoint-2", processes=2, use_cpu=False)
if trainer.args.process_index == 0:
    with open(f"{folder}/refused.json", "w") as file:
        json.dump(refused, file)
trainer.accelerator.end_training()
"""

# What the page on several machines recommends: neither needs to be looked at in each step.
SPARING = {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}


def adapted(images: Any) -> Any:
    """A fresh adapter, its Selection, and how many samples this process has seen to make it."""
    torch.manual_seed(0)
    model = get_peft_model(build_vit(), TRPTSConfig(modules_to_save=["classifier"], keep_rate=0.5, top_percent=5))
    seen: list[int] = []
    hook = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    selection = calibrate(model, images, batch_size=4, progress=False)
    hook.remove()
    return model, selection, sum(seen)


def calibrated(count: int) -> dict[str, Any]:
    """Selection, probed head and columns of a fresh adapter, calibrated on `count` samples in batches of four."""
    model, selection, seen = adapted(LabelledImages(count))
    return {
        "importance": selection.importance,
        "connections": selection.connections,
        "token_layers": selection.token_layers,
        "columns": selection.columns,
        "head": model.base_model.model.classifier.modules_to_save["default"].state_dict(),
        "installed": {n: t for n, t in model.state_dict().items() if "trpts_columns" in n},
        "seen": seen,
    }


class Drawing:
    """A sampler of one's own that hands out other samples in each process."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(int(os.environ.get("RANK", "0")), 13, 2))

    def __len__(self) -> int:
        return 7


def scored() -> dict[str, Tensor]:
    """The Fisher information of samples that such a sampler hands out."""
    images = DataLoader(LabelledImages(13), sampler=cast(Any, Drawing()))
    return dict(estimate_fisher(build_vit(), images, batch_size=4, progress=False))


def trained(
    folder: str | Path,
    resume: str | None = None,
    *,
    processes: int = 1,
    max_steps: int = STEPS,
    **options: Any,
) -> Trainer:
    """A Trainer that has run on batches that are the same however many processes share them, and has saved."""
    images = LabelledImages(STEPS * BATCH_SIZE)
    images.labels = images.labels[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    arguments: dict[str, Any] = {
        "max_steps": max_steps,
        "per_device_train_batch_size": BATCH_SIZE // processes,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-3,  # else Adam blows the smallest differences up
        "save_steps": 2,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": [],
    }
    model, *_ = adapted(images)
    trainer = Trainer(model, TrainingArguments(str(folder), **{**arguments, **options}), train_dataset=images)
    assert trainer.accelerator.num_processes == processes
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return trainer


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """What a run trains, and the columns; detached copies."""
    parts = ("trpts_values", "trpts_bias", "trpts_columns", "classifier.modules_to_save")
    return {key: value.clone() for key, value in model.state_dict().items() if any(part in key for part in parts)}


def refusals(model: Any) -> dict[str, str]:
    """What a sharded model answers to that which takes a whole one."""
    asked = {
        "calibrate": lambda: calibrate(model, LabelledImages(4), overwrite=True, progress=False),
        "estimate_fisher": lambda: estimate_fisher(model, LabelledImages(4), progress=False),
        "merge_adapter": lambda: model.merge_adapter(),
        "merge_and_unload": lambda: model.merge_and_unload(),
    }
    answers = {}
    for name, ask in asked.items():
        with pytest.raises(ValueError) as error:
            ask()
        answers[name] = str(error.value)
    return answers


def launch(folder: Path, config: str, script: str, **environment: str) -> Path:
    """Run a script in two processes of this machine, by a config that is made for two machines."""
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--num_machines", "1", "--num_processes", "2", "--main_process_port", "0", str(path), str(folder)]
    python_path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    hidden = {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe, variables = subprocess.PIPE, {**os.environ, **hidden, **environment}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables) as process:
        try:
            _, errors = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends the two; killed, it would leave them behind
            raise
    assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes that each hold the whole model have left their results."""
    return launch(tmp_path_factory.mktemp("ddp"), "ddp.yaml", DDP_SCRIPT, ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes that each hold half of every parameter have left their results."""
    return launch(tmp_path_factory.mktemp("fsdp"), "fsdp.yaml", FSDP_SCRIPT, ACCELERATE_TORCH_DEVICE="cpu")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one process has trained."""
    return trained_tensors(trained(tmp_path_factory.mktemp("alone")).model)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert max(float(value.abs().max()) for name, value in expected.items() if "trpts_values" in name) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---- calibration ----


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("count", COUNTS)
def test_two_processes_decide_what_one_decides(ddp: Path, count: int, rank: int) -> None:
    alone, other = calibrated(count), torch.load(ddp / f"{rank}-{count}.pt")
    for key in ("importance", "connections", "token_layers"):
        assert other[key] == alone[key]
    for key in ("columns", "head", "installed"):
        assert other[key].keys() == alone[key].keys()
        assert [name for name, tensor in alone[key].items() if not torch.equal(other[key][name], tensor)] == []


@pytest.mark.parametrize(("count", "seen"), [(13, (8, 5)), (3, (3, 0))])
def test_two_processes_share_the_samples(ddp: Path, count: int, seen: tuple[int, int]) -> None:
    # Once for the head's features, once for the scores; of its own first batch, of four, twice to look at the head.
    for rank in (0, 1):
        assert torch.load(ddp / f"{rank}-{count}.pt")["seen"] == 2 * seen[rank] + 2 * min(4, seen[rank])


def test_a_sampler_that_draws_is_asked_in_the_first_process(ddp: Path) -> None:
    alone = scored()
    for rank in (0, 1):
        drawn = torch.load(ddp / f"{rank}-drawn.pt")
        assert drawn.keys() == alone.keys() and all(torch.equal(drawn[name], alone[name]) for name in alone)


@pytest.mark.parametrize(("flag", "gpus", "cpu"), [("true", 1, True), ("false", 0, True), ("false", 1, False)])
def test_processes_find_one_another_on_cpus(monkeypatch: pytest.MonkeyPatch, flag: str, gpus: int, cpu: bool) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(data, "PartialState", lambda cpu: SimpleNamespace(process_index=cpu, num_processes=2))
    assert data.processes(None) == (cpu, 2)


@pytest.mark.parametrize("share", [sum_of_processes, of_first_process])
def test_what_is_shared_leaves_from_the_device_of_the_process(
    monkeypatch: pytest.MonkeyPatch, share: Callable[[Tensor], Tensor]
) -> None:
    monkeypatch.setattr(data, "PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    for operation in ("reduce", "broadcast"):
        monkeypatch.setattr(data, operation, lambda tensor, *_: tensor)
    assert share(torch.ones(2)).is_meta


# ---- training ----


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["default", "sparing"])
def test_ddp_trains_what_one_process_trains(ddp: Path, alone: dict[str, Tensor], name: str, rank: int) -> None:
    assert_same(torch.load(ddp / f"{name}-{rank}.pt"), alone)


def test_only_the_first_process_writes(ddp: Path) -> None:
    assert files(ddp / "default-1") == ["checkpoint-2/rng_state_1.pth", "checkpoint-4/rng_state_1.pth"]
    adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"]
    assert [name for name in files(ddp / "default-0") if "/" not in name] == adapter
    assert "TR-PTS adapter" in (ddp / "default-0" / "README.md").read_text(encoding="utf-8")


def test_what_ddp_saves_loads_in_one_process(ddp: Path, alone: dict[str, Tensor]) -> None:
    assert_same(trained_tensors(PeftModel.from_pretrained(build_vit(), ddp / "default-0")), alone)


# ---- sharded parameters ----


@pytest.mark.parametrize("name", ["full", "full-resumed", "sharded-resumed"])
def test_fsdp_trains_resumes_and_saves_what_one_process_does(fsdp: Path, alone: dict[str, Tensor], name: str) -> None:
    assert_same(trained_tensors(PeftModel.from_pretrained(build_vit(), fsdp / name)), alone)


def test_fsdp_checkpoints_hold_adapters_unless_sharded(fsdp: Path) -> None:
    assert "adapter_model.safetensors" in files(fsdp / "full" / "checkpoint-2")
    assert "adapter_model.safetensors" not in files(fsdp / "sharded" / "checkpoint-2")


def test_a_sharded_model_is_refused_where_a_whole_one_is_needed(fsdp: Path) -> None:
    answers = json.loads((fsdp / "refused.json").read_text())
    assert len(answers) == 4
    assert all("`model` must be whole in every process" in answer for answer in answers.values())


def test_fsdps_way_of_loading_by_the_first_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = build_vit(), TRPTSConfig(modules_to_save=["classifier"])
    model = get_peft_model(build_vit(), config)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # to be put back afterwards
    enable_fsdp_ram_efficient_loading()
    before = {name: type(module) for name, module in base.named_modules()}
    for ask in (
        lambda: get_peft_model(base, config),
        lambda: calibrate(model, LabelledImages(4), progress=False),
        lambda: estimate_fisher(base, LabelledImages(4), progress=False),
    ):
        with pytest.raises(ValueError, match="`fsdp_cpu_ram_efficient_loading` must be false"):
            ask()
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_an_adapter_that_a_wrapper_hides_is_not_saved_without_its_weights(tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), TRPTSConfig())
    layers = model.get_base_model().vit.layers
    layers[0] = checkpoint_wrapper(layers[0])  # as FSDP's activation checkpointing does
    with pytest.raises(ValueError, match=r"must hold .*q_proj.trpts_columns\.default, got none"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_processes_that_do_not_save_may_pass_an_empty_state(tmp_path: Path) -> None:
    model = get_peft_model(build_vit(), TRPTSConfig())
    model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)
    assert files(tmp_path) == []
