"""What demo and benchmarks measure besides accuracy: relative time, memory, size of a file."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

Batch = Mapping[str, Tensor]


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """Percentage of the images whose label has the largest logit, in eval mode."""
    logits: Tensor = model.eval()(pixel_values=batch["pixel_values"]).logits
    return 100 * (logits.argmax(dim=-1) == batch["labels"]).double().mean().item()


def training_step(model: nn.Module, autocast: torch.dtype | None = None) -> Callable[[Batch], None]:
    """Forward, backward and Adam update on a batch, ready to be called again and again; `model` is put to training.

    Args:
        model: what trains.
        autocast: what forward computes in, as the Trainer's `bf16=True` does; None: the dtype of the weights.
    """
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)  # changes no weight

    model.train()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        _loss(model, batch, autocast).backward()
        optimizer.step()

    return step


def _loss(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    with torch.autocast(batch["pixel_values"].device.type, autocast, enabled=autocast is not None):
        loss: Tensor = model(**batch).loss
    return loss


def inference(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """The logits of one batch, ready to be called again and again; `model` is put to evaluation."""
    model.eval()

    def predict() -> None:
        with torch.inference_mode():
            model(pixel_values=batch["pixel_values"])

    return predict


def relative_times(actions: Mapping[str, Callable[[], object]], reference: str, repeats: int = 11) -> dict[str, float]:
    """Processor time of each action over that of `actions[reference]`: medians of the ratios within a round."""
    seconds = interleaved_seconds(actions, repeats)
    return {name: median_ratio(values, seconds[reference]) for name, values in seconds.items()}


def interleaved_seconds(actions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action, in rounds that run each once, so that a machine that slows down slows all of them.

    Processor time on a CPU, for one thread: threads that wait for each other use processor time too. On a GPU, time
    until it has finished.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()  # the first call allocates
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(_seconds(action))
    return seconds


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(mine / its for mine, its in zip(seconds, reference, strict=True))


def ratio_interval(seconds: list[float], reference: list[float]) -> tuple[float, float] | None:
    """Two of the rounds' ratios between which their true median lies with 95 % confidence; None for under six rounds.

    By the sign test: of rounds that do not depend on each other each is as likely above the true median as below it, so
    the k-th smallest and the k-th largest ratio enclose it, unless fewer than k of as many fair coins show one side.
    """
    ratios = sorted(mine / its for mine, its in zip(seconds, reference, strict=True))
    rounds, below, k = len(ratios), 0, 0
    while 40 * (below + math.comb(rounds, k)) <= 2**rounds:  # 2.5 % at either end
        below += math.comb(rounds, k)
        k += 1
    return (ratios[k - 1], ratios[-k]) if k else None


def _seconds(action: Callable[[], object]) -> float:
    clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # what came before is none of this action's time
    start = clock()
    action()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory that the tensors which the action makes take at a time, temporary ones included.

    What was there before does not count; what the action frees of it is subtracted from then on.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resident_bytes(*tensors: Tensor) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def saved_activation_bytes(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> int:
    """Bytes that wait for backward after a training forward: each storage once, parameters and buffers not counted.

    Copies of weights that autocast has converted do count: they are there until backward has used them.
    """
    resident = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: list[tuple[StorageWeakRef, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in resident:
                saved.append((StorageWeakRef(storage), storage.nbytes()))
        return tensor.detach()  # the tensor itself may hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model.train(), batch, autocast)  # holds what it was computed from; what led nowhere is gone
    sizes = {storage.cdata: size for storage, size in saved if not storage.expired()}
    del loss
    return sum(sizes.values())


def file_bytes(model: nn.Module) -> int:
    """Size of what must be saved to use the model again: an adapter's file, or else the parameters that train."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder)
        else:
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, Path(folder) / "model.safetensors")
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
