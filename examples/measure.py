"""What the demo measures besides accuracy: time relative to a reference, memory kept for backward, size of a file."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from digits import Batch


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """Percentage of the images whose label has the largest logit, in eval mode."""
    logits: Tensor = model.eval()(pixel_values=batch["pixel_values"]).logits
    return 100 * (logits.argmax(dim=-1) == batch["labels"]).double().mean().item()


def training_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Forward, backward and Adam update on one batch, ready to be called again and again."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)  # changes no weight

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """The logits of one batch, ready to be called again and again."""

    def predict() -> None:
        with torch.inference_mode():
            model.eval()(pixel_values=batch["pixel_values"])

    return predict


def relative_times(actions: Mapping[str, Callable[[], None]], reference: str, repeats: int = 11) -> dict[str, float]:
    """Processor time of each action over that of `actions[reference]`: the median over rounds that run each once.

    Ratios within a round, so that a machine that slows down for a while slows both sides. For one thread: threads that
    wait for each other use processor time too.
    """
    ratios: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()  # the first call allocates
    for _ in range(repeats):
        seconds = {name: _processor_seconds(action) for name, action in actions.items()}
        for name in actions:
            ratios[name].append(seconds[name] / seconds[reference])
    return {name: statistics.median(values) for name, values in ratios.items()}


def _processor_seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def saved_activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that a training forward keeps for backward: each storage once, parameters and buffers not counted."""
    resident = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**batch).loss  # holds the graph, so that no storage is freed and its address used again
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
