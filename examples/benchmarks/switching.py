"""Changing between merged adapters, and what an adapter takes on disk."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import nn

from benchmarks.methods import LINEARS, USED_SHARES, drawn_scores, lora, trpts
from measure import interleaved_seconds, median_ratio
from trpts_peft import calibrate
from trpts_peft.layer import TRPTSLinear
from trpts_peft.sparse_linear import flat_places

MERGES = "unmerge and merge only"
REFERENCE = f"LoRA r=8, {MERGES}"


def switch_rows(rounds: int, device: str, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """From one merged adapter to another: unmerge, `set_adapter`, merge; parts of it; and what it cannot go below.

    Args:
        rounds: how often all is timed, in turns.
        device: "cpu" or "cuda".
        dtype: of base weights and adapters.
    """
    sparse, low_rank = trpts(), lora()
    assert isinstance(sparse, PeftModel)
    assert isinstance(low_rank, PeftModel)
    sparse.add_adapter("other", sparse.peft_config["default"])
    scores = drawn_scores(sparse.get_base_model(), USED_SHARES, seed=1)
    calibrate(sparse, None, adapter_name="other", scores=scores, probe_head=False, overwrite=True, progress=False)
    low_rank.add_adapter("other", LoraConfig(r=8, target_modules=LINEARS, modules_to_save=["classifier"]))
    models = {"TR-PTS": sparse.to(device), "LoRA r=8": low_rank.to(device)}
    actions: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        randomize(model)
        model.to(dtype).requires_grad_(False)  # serving trains nothing
        model.merge_adapter()
        actions |= {f"{name}, switch": switch(model), f"{name}, {MERGES}": partial(merge_again, model)}
    actions["TR-PTS, entries read only"] = partial(read_entries, touched_entries(sparse))
    seconds = interleaved_seconds(actions, rounds)
    return [
        {"what": name, "to_lora": median_ratio(values, seconds[REFERENCE]), "seconds": values}
        for name, values in seconds.items()
    ]


def randomize(model: nn.Module) -> None:
    """Give all adapters something to merge."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "trpts_" in name or "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.01 * noise)


def switch(model: PeftModel) -> Callable[[], None]:
    """Go to the other one of two merged adapters, whenever called."""
    names = itertools.cycle(["other", "default"])

    def act() -> None:
        model.unmerge_adapter()
        model.set_adapter(next(names), inference_mode=True)
        model.merge_adapter()

    return act


def merge_again(model: PeftModel) -> None:
    """Without the search for the other adapter."""
    model.unmerge_adapter()
    model.merge_adapter()


def touched_entries(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights, and where in them both adapters lie."""
    layers = [module for module in model.modules() if isinstance(module, TRPTSLinear)]
    return [
        (layer.base_layer.weight.flatten(), flat_places(columns, layer.in_features))
        for layer in layers
        for columns in layer.trpts_columns.values()
    ]


def read_entries(touched: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Read what both adapters overwrite, once: a switch cannot take less."""
    for entries, places in touched:
        entries.index_select(0, places)


def disk_rows() -> list[dict[str, Any]]:
    """Bytes of an adapter's file, and of columns and values for each weight that trains."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            trpts().to(dtype).save_pretrained(folder)
            path = Path(folder) / "adapter_model.safetensors"
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            size = path.stat().st_size
        values = sum(tensor.numel() for key, tensor in tensors.items() if key.endswith("trpts_values"))
        sparse = sum(t.nbytes for key, t in tensors.items() if key.endswith(("trpts_values", "trpts_columns")))
        row = {"dtype": str(dtype).removeprefix("torch."), "weights": values, "bytes_per_weight": sparse / values}
        rows.append({**row, "file_bytes": size})
    return rows
