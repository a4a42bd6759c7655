"""Find the adapter that a call is about."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from .config import TRPTSConfig
from .layer import TRPTSLinear
from .traversal import base_of

__all__ = ["find_adapter"]


def find_adapter(model: nn.Module, adapter_name: str | None) -> tuple[nn.Module, str, TRPTSConfig]:
    """The base model, the adapter's name, and a checked copy of its config.

    Args:
        model: a PeftModel with a TR-PTS adapter, or a model that one was injected into.
        adapter_name: the adapter; None: the active one.

    Raises:
        ValueError: there is no such adapter, or none is the active one.
    """
    base = base_of(model)
    configs = getattr(model, "peft_config", None)
    inner = next((name for name, module in model.named_modules() if name and isinstance(module, PeftModel)), None)
    if configs is None and inner is not None:
        raise ValueError(
            f"`model` must be the PeftModel itself, got {type(model).__name__} around one: pass `model.{inner}`, "
            "or, to train through a head of yours, adapt the whole with `get_peft_model`."
        )
    if not isinstance(configs, dict) or not any(isinstance(config, TRPTSConfig) for config in configs.values()):
        raise ValueError(
            "`model` must hold a TR-PTS adapter, got a model without: use `get_peft_model(model, TRPTSConfig(...))` "
            "first, on a model without adapters of another method."
        )
    if adapter_name is None:
        active = [m.active_adapters for m in base.modules() if isinstance(m, TRPTSLinear)]
        if not active or len(active[0]) != 1:
            raise ValueError(
                f"`adapter_name` must be given unless one adapter is active, got None among {list(configs)}."
            )
        adapter_name = active[0][0]
    config = configs.get(adapter_name)
    if not isinstance(config, TRPTSConfig):
        raise ValueError(
            f"`adapter_name` must name a TR-PTS adapter of the model, got {adapter_name!r}: it has {list(configs)}."
        )
    return base, adapter_name, config.checked()
