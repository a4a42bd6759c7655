"""Another keep rate for an adapter that is there."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .adapters import find_adapter
from .tuner_layer import TRPTSLayer
from .vit import adapter_selections, token_selections

__all__ = ["set_keep_rate"]


def set_keep_rate(model: nn.Module, keep_rate: float, adapter_name: str | None = None) -> None:
    """Let an adapter keep another share of the tokens in the blocks where it selects; its weights stay as they are.

    In force at once, in training and prediction, merged or not, and saved with the adapter. To assign
    `config.keep_rate` changes nothing before `calibrate`, which would start the adapter anew.

    Args:
        model: a PeftModel with a TR-PTS adapter, or a model that one was injected into; compiled or data parallel, too.
        keep_rate: share of the tokens that stay, in (0, 1].
        adapter_name: the adapter; None: the active one.

    Raises:
        ValueError: the rate is out of its range, the adapter selects tokens in no block, or it is in force together
            with another one, which would keep more or fewer. Nothing is changed.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)  # a compiled one follows
    if token_selections(model) and not any(isinstance(module, TRPTSLayer) for module in model.modules()):
        raise ValueError(
            "`model` must select tokens by an adapter, got one that does at fixed rates, as behind "
            "`merge_and_unload()`: call `apply_token_selection(model, {block: rate})`."
        )
    _, name, config = find_adapter(model, adapter_name)
    config.keep_rate = keep_rate
    config = config.checked()
    selections = [s for s in adapter_selections(model).values() if s.own_rate(name) is not None]
    if not selections:
        raise ValueError(
            f"`adapter_name` must be of an adapter that selects tokens, got {name!r}, which keeps all of them: "
            "`calibrate` it, or give it a list as `token_layers`."
        )
    before = [selection.own_rate(name) for selection in selections]
    with torch.inference_mode(False):  # a loader may write to the records later
        try:
            for selection in selections:
                selection.set_rate(name, config.keep_rate)
                if selection.enabled:
                    selection.rate_of(selection.merged_adapters or selection.active_adapters)
        except ValueError:
            for selection, rate in zip(selections, before, strict=True):
                selection.set_rate(name, rate)
            raise
    cast(Any, model).peft_config[name] = config
