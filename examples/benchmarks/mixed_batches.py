"""Predictions whose images belong to different adapters, beside the plain model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from benchmarks.methods import LINEARS, USED_SHARES, drawn_scores, lora, methods, trpts
from benchmarks.switching import randomize
from measure import Batch, inference, interleaved_seconds, median_ratio
from trpts_peft import calibrate

COUNTS = (1, 2, 4, 8)


def mixed_batch_rows(batch: Batch, rounds: int) -> list[dict[str, Any]]:
    """A prediction of one batch by 1 to 8 adapters that are not merged, its images dealt out among them in turn.

    Args:
        batch: the images, at least as many as adapters.
        rounds: how often all is timed, in turns.

    Returns:
        {"method", "adapters", "to_plain", "seconds"} of each method and number of adapters.
    """
    pixels = batch["pixel_values"]
    actions = {("plain", 0): inference(methods()["full"]().to(pixels.device), batch)}
    for name, model in (("LoRA r=8", _low_rank()), ("TR-PTS", _sparse())):
        randomize(model)
        model.to(pixels.device).eval()
        names = list(model.peft_config)
        for count in COUNTS:
            dealt = [names[image % count] for image in range(len(pixels))]
            actions[name, count] = partial(_predict, model, pixels, dealt)
    seconds = interleaved_seconds({f"{name}, {count}": action for (name, count), action in actions.items()}, rounds)
    rows = []
    for (method, count), mine in zip(actions, seconds.values(), strict=True):
        ratio = median_ratio(mine, seconds["plain, 0"])
        rows.append({"method": method, "adapters": count, "to_plain": ratio, "seconds": mine})
    return rows[1:]


def _predict(model: Callable[..., object], pixels: torch.Tensor, adapter_names: list[str]) -> None:
    with torch.inference_mode():
        model(pixel_values=pixels, adapter_names=adapter_names)


def _low_rank() -> PeftModel:
    model = lora()
    assert isinstance(model, PeftModel)
    for name in _others():
        model.add_adapter(name, LoraConfig(r=8, target_modules=LINEARS, modules_to_save=["classifier"]))
    return model


def _sparse() -> PeftModel:
    """Every adapter with used columns of its own, as those of different tasks are."""
    model = trpts()
    assert isinstance(model, PeftModel)
    for seed, name in enumerate(_others(), start=1):
        model.add_adapter(name, model.peft_config["default"])
        scores = drawn_scores(model.get_base_model(), USED_SHARES, seed=seed)
        calibrate(model, None, adapter_name=name, scores=scores, probe_head=False, overwrite=True, progress=False)
    return model


def _others() -> list[str]:
    return [f"other {number}" for number in range(1, max(COUNTS))]
