"""What TR-PTS costs beside other methods on ViT-B/16: time, memory, multiplications, bytes.

Run in examples/, as `python -m benchmarks.cost`; `make bench` runs the short form. Every ratio comes from actions that
take turns in one process. Writes cost.json and cost.png beside the tables that it prints.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.calibrating import fisher_rows
from benchmarks.figure import draw
from benchmarks.methods import KEEP_RATES, methods, methods_by_share, trpts
from benchmarks.mixed_batches import mixed_batch_rows
from benchmarks.report import Bar, bars_of, print_report
from benchmarks.switching import disk_rows, switch_rows
from measure import (
    Batch,
    inference,
    interleaved_seconds,
    median_ratio,
    peak_bytes,
    resident_bytes,
    saved_activation_bytes,
    training_step,
)
from trpts_peft import estimate_cost

SECTIONS = (
    "training",
    "mixed",
    "compiled",
    "fisher",
    "inference",
    "forward",
    "mixed_batches",
    "switching",
    "switching_bfloat16",
    "disk",
)
REFERENCES = {"frozen": "frozen", "lora": "LoRA r=8"}  # of training steps
COMPARED = ("frozen", "LoRA r=8", "TR-PTS", "TR-PTS, keep rate 0.8")  # by the bars of training steps
COMPILED = ("frozen", "LoRA r=8", "TR-PTS", "TR-PTS, keep rate 0.8", "full")  # to compile a step takes a minute each
OUTPUT = Path(__file__).resolve().parents[2] / "runs" / "bench"


@dataclass(frozen=True)
class Settings:
    """How much is measured, and where.

    Attributes:
        device: "cpu" or "cuda".
        train_batch: images of a timed training step.
        memory_batch: images of a training step whose memory is counted.
        inference_batches: images of a timed prediction, one table row each.
        rounds: rounds of timed training steps.
        bar_rounds: further rounds of those in 32 bits that bars compare, which alone take turns then.
        inference_rounds: rounds of timed predictions of the largest batch; smaller ones, which vary more and take less
            time, four times as many.
        fisher_images: images of one measurement of the Fisher information, in batches of 8.
        fisher_rounds: rounds of those.
        shares: U/in for the table of used columns.
        compiled: whether predictions and training steps are also timed under `torch.compile`.
    """

    device: str = "cpu"
    train_batch: int = 4
    memory_batch: int = 8
    inference_batches: tuple[int, ...] = (8, 1)
    rounds: int = 31
    bar_rounds: int = 70
    inference_rounds: int = 31
    fisher_images: int = 40
    fisher_rounds: int = 6
    shares: tuple[float, ...] = (0.02, 0.05, 0.1, 0.3, 1.0)
    compiled: bool = True


CPU = Settings()
SHORT = Settings(
    rounds=3, bar_rounds=0, inference_rounds=5, fisher_images=16, fisher_rounds=3, shares=(0.1,), compiled=False
)
# The paper's setting for figure 4: predictions of 32 images, the mean of 500 passes, memory of one.
CUDA = Settings(device="cuda", train_batch=32, memory_batch=32, inference_batches=(32, 1), inference_rounds=500)


def drawn_batch(images: int, device: str) -> Batch:
    """Noise at 224 pixels, with labels: what the pixels show changes no cost."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 224, 224, generator=generator)
    return {"pixel_values": pixels.to(device), "labels": (torch.arange(images) % 100).to(device)}


def training_rows(settings: Settings, autocast: torch.dtype | None = None) -> list[dict[str, Any]]:
    """Time and memory of a training step of every method, as ratios to the frozen model's and in bytes.

    Args:
        settings: how much is measured, and where.
        autocast: what forward computes in, with weights in float32; None: in float32, and by share of used columns too.
    """
    builders = methods() if autocast else methods() | methods_by_share(settings.shares)
    models = {name: build().to(settings.device) for name, build in builders.items()}
    batch, large = (drawn_batch(size, settings.device) for size in (settings.train_batch, settings.memory_batch))
    steps = {name: training_step(model, autocast) for name, model in models.items()}
    seconds = interleaved_seconds({name: partial(step, batch) for name, step in steps.items()}, settings.rounds)
    if autocast is None and settings.bar_rounds:
        further = interleaved_seconds({name: partial(steps[name], batch) for name in COMPARED}, settings.bar_rounds)
        seconds |= {name: seconds[name] + more for name, more in further.items()}
    rows = []
    for name, model in models.items():
        cost = estimate_cost(model)
        kept, peak = training_memory(model, steps[name], large, autocast)
        rows.append(
            {
                **step_row(name, seconds),
                "kept_bytes": kept,
                "peak_bytes": peak,
                "gmacs": cost.macs / 1e9,
                "trainable_percent": cost.trainable_percent,
            }
        )
    return rows


def compiled_rows(settings: Settings) -> list[dict[str, Any]]:
    """Time and peak memory of a compiled training step of some methods, both with the images of a timed step."""
    torch.compiler.reset()
    models = {name: torch.compile(methods()[name]().to(settings.device), fullgraph=True) for name in COMPILED}
    batch = drawn_batch(settings.train_batch, settings.device)  # another size would be compiled once more
    steps = {name: partial(training_step(model), batch) for name, model in models.items()}
    seconds = interleaved_seconds(steps, settings.rounds)
    rows = []
    for name, model in models.items():
        model.zero_grad()
        peak = resting_bytes(model) + peak_bytes(steps[name])
        rows.append({**step_row(name, seconds), "peak_bytes": peak})
    return rows


def step_row(name: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """The seconds of one method's steps, and their ratios to those of the frozen model and LoRA in the same rounds."""
    mine = seconds[name]
    ratios = {f"step_to_{key}": median_ratio(mine, seconds[of][: len(mine)]) for key, of in REFERENCES.items()}
    return {"method": name, **ratios, "seconds": mine}


def training_memory(
    model: nn.Module, step: Callable[[Batch], None], batch: Batch, autocast: torch.dtype | None
) -> tuple[int, int]:
    """Bytes that a training step keeps (weights, gradients, Adam's moments, what waits for backward), and its peak.

    Args:
        model: what trains.
        step: its training step, called before, so that Adam's moments are there.
        batch: the images.
        autocast: what the step's forward computes in.
    """
    model.zero_grad()
    gradients = resident_bytes(*(p for p in model.parameters() if p.requires_grad))
    kept = resting_bytes(model) + gradients + saved_activation_bytes(model, batch, autocast)
    return kept, resting_bytes(model) + peak_bytes(lambda: step(batch))


def resting_bytes(model: nn.Module) -> int:
    """Bytes that are there between two steps of training without gradients: weights, buffers, Adam's moments."""
    trained = resident_bytes(*(p for p in model.parameters() if p.requires_grad))
    return resident_bytes(*model.parameters(), *model.buffers()) + 2 * trained


def forward_rows(settings: Settings) -> list[dict[str, Any]]:
    """Mean time and peak memory of a prediction by every method, adapters not merged: the paper's figure 4."""
    models = {name: build().to(settings.device) for name, build in methods().items() if name != "frozen"}
    size = settings.inference_batches[0]
    actions = {name: inference(model, drawn_batch(size, settings.device)) for name, model in models.items()}
    seconds = interleaved_seconds(actions, settings.inference_rounds)
    return [
        {
            "method": name,
            "batch": size,
            "mean_seconds": statistics.mean(seconds[name]),
            "to_full": median_ratio(seconds[name], seconds["full"]),
            "peak_bytes": peak_bytes(actions[name]),
            "gmacs": estimate_cost(model).macs / 1e9,
        }
        for name, model in models.items()
    ]


def inference_rows(settings: Settings, compiled: bool) -> list[dict[str, Any]]:
    """How many times faster than the plain ViT a merged model predicts, beside what its multiplications promise."""
    rates = (1.0, 0.8) if compiled else (1.0, *KEEP_RATES)  # to compile takes half a minute each
    merged = {rate: trpts(rate).merge_and_unload().to(settings.device) for rate in rates}
    plain = methods()["full"]().to(settings.device)
    promised = {f"TR-PTS, keep rate {rate:g}": estimate_cost(model).speedup for rate, model in merged.items()}
    models = {"plain": plain, **dict(zip(promised, merged.values(), strict=True))}
    rows = []
    for size in settings.inference_batches:
        batch = drawn_batch(size, settings.device)
        actions = {name: inference(_compiled(model) if compiled else model, batch) for name, model in models.items()}
        largest = size == max(settings.inference_batches)
        seconds = interleaved_seconds(actions, settings.inference_rounds * (1 if largest else 4))
        for name, ideal in promised.items():
            speedup = 1 / median_ratio(seconds[name], seconds["plain"])
            row = {"model": name, "batch": size, "compiled": compiled, "speedup": speedup, "ideal": ideal}
            rows.append(
                {**row, "of_ideal": speedup / ideal, "seconds": seconds[name], "plain_seconds": seconds["plain"]}
            )
    return rows


def _compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True)


def measure_all(
    settings: Settings, only: str | None = None, on_section: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Every section, or `only` one of them, as the content of the JSON file; `on_section` gets what is there of it."""
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "training": lambda: training_rows(settings),
        "mixed": lambda: training_rows(settings, torch.bfloat16),
        "compiled": lambda: compiled_rows(settings),
        "fisher": lambda: fisher_rows(settings.fisher_images, settings.fisher_rounds, settings.device),
        "inference": lambda: [
            row for compiled in (False, True)[: 1 + settings.compiled] for row in inference_rows(settings, compiled)
        ],
        "forward": lambda: forward_rows(settings),
        "mixed_batches": lambda: mixed_batch_rows(drawn_batch(8, settings.device), settings.inference_rounds),
        "switching": lambda: switch_rows(settings.rounds, settings.device),
        "switching_bfloat16": lambda: switch_rows(settings.rounds, settings.device, torch.bfloat16),
        "disk": disk_rows,
    }
    results: dict[str, Any] = {"settings": asdict(settings), "machine": machine(settings.device)}
    for name, section in sections.items():
        if only not in (None, name) or (name == "compiled" and not settings.compiled):
            continue
        print(f"measuring: {name}", flush=True)
        results[name] = section()
        on_section(results)
    return results


def machine(device: str) -> dict[str, str]:
    """What the figures depend on besides the code."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trpts-peft")}
    return {"processor": processor(device), "python": platform.python_version(), **packages}


def processor(device: str) -> str:
    """The name of the processor, with the number of threads used of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--short", action="store_true", help="fewer rounds, nothing compiled")
    parser.add_argument("--only", choices=SECTIONS, help="measure this section anew, keep the rest of cost.json")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for cost.json and cost.png")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a CUDA device, got none: leave it out.")
    # peft 0.21 asks for the old name of a property of transformers 5.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # processor time of several counts their waiting
    settings = CUDA if arguments.device == "cuda" else SHORT if arguments.short else CPU
    path = arguments.output / "cost.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if arguments.only and path.is_file() else {}
    arguments.output.mkdir(parents=True, exist_ok=True)

    part = arguments.output / "cost.part.json"  # what there is of a run that ends before all is measured

    def write(results: dict[str, Any]) -> None:
        part.write_text(json.dumps({**earlier, **results}, indent=1) + "\n", encoding="utf-8")

    results = {**earlier, **measure_all(settings, arguments.only, write)}
    bars: list[Bar] = bars_of(results)
    write({**results, "bars": [asdict(bar) for bar in bars]})
    part.replace(path)
    print_report(results, bars)
    if {"training", "forward"} <= set(results):
        draw(results, arguments.output / "cost.png")


if __name__ == "__main__":
    main()
