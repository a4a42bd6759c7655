"""Make PEFT know TR-PTS."""

from __future__ import annotations

from functools import wraps
from typing import Any, cast

from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from torch import nn

from .card import drop_local_base, update_card
from .config import TRPTSConfig
from .model import TRPTSModel
from .peft_type import TRPTS
from .withdrawal import trainable_names, withdraw

__all__ = ["register"]


def register() -> None:
    """Register the method, or, where the package is loaded anew, put the new classes in the place of the old."""
    if TRPTS in PEFT_TYPE_TO_CONFIG_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[TRPTS] = TRPTSConfig
        PEFT_TYPE_TO_TUNER_MAPPING[TRPTS] = TRPTSModel
        PEFT_TYPE_TO_PREFIX_MAPPING[TRPTS] = TRPTSModel.prefix
    else:
        register_peft_method(name="trpts", config_cls=TRPTSConfig, model_cls=TRPTSModel)
        _send_own_card()
        _load_whole_or_not_at_all()


def _load_whole_or_not_at_all() -> None:
    """Have a refused file of a TR-PTS adapter leave the model as it was; PEFT leaves the adapter in, without values.

    Only what this very call has put in is taken out: an adapter that was there before stays, for another try.
    """
    loaded, made = PeftModel.load_adapter, cast(Any, PeftModel.from_pretrained).__func__

    @wraps(loaded)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        before = set(self.peft_config)
        try:
            return loaded(self, model_id, adapter_name, *args, **kwargs)
        except Exception:
            _withdraw_new(self, before)
            raise

    @wraps(made)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before, trainable = set(getattr(model, "peft_config", {})), trainable_names(model)
        try:
            return made(cls, model, *args, **kwargs)
        except Exception:
            _withdraw_new(model, before, trainable)
            raise

    patched: Any = PeftModel
    patched.load_adapter, patched.from_pretrained = load_adapter, classmethod(from_pretrained)


def _withdraw_new(model: nn.Module, before: set[str], trainable: frozenset[str] | None = None) -> None:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    for name in [name for name, config in configs.items() if name not in before and config.peft_type == TRPTS]:
        withdraw(model, name, trainable=trainable)


def _send_own_card() -> None:
    """Have a push to the Hub send the card of a TR-PTS adapter; other methods' pushes stay as they are.

    transformers writes a template over the card that `save_pretrained` wrote: `push_to_hub` of the model a template for
    its own models, that of Trainer one to which PEFT adds its part only. Without the import line that stands in the
    card, nobody can load the adapter.
    """
    described, uploaded = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @wraps(described)
    def describe(self: PeftModel, output_dir: str) -> None:
        described(self, output_dir)
        config = self.peft_config.get(self.active_adapter) if isinstance(self.active_adapter, str) else None
        if config is not None and config.peft_type == TRPTS:
            update_card(output_dir, config, type(self.get_base_model()).__name__)

    @wraps(uploaded)
    def upload(self: PeftModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type == TRPTS for config in self.peft_config.values()):
            self.create_or_update_model_card(str(working_dir))
            drop_local_base(working_dir)
        return uploaded(self, working_dir, *args, **kwargs)

    patched: Any = PeftModel
    patched.create_or_update_model_card, patched._upload_modified_files = describe, upload
