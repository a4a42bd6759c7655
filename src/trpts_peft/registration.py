"""Make PEFT know TR-PTS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from transformers.integrations.peft import PeftAdapterMixin

from .card import drop_local_base, update_card
from .config import TRPTSConfig
from .model import TRPTSModel
from .peft_type import TRPTS

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
        _undo_failed_loading()
        _leave_compilers_out_of_files()


def _undo_failed_loading() -> None:
    """Have a TR-PTS adapter that cannot be added or loaded leave the model as it was; PEFT leaves it in by half.

    What the very call has put in is taken out, also where it took the place of an adapter of the same name on a base
    that was used before. An adapter that was only to receive the file stays, for another try.
    """
    added, loaded, made = PeftModel.add_adapter, PeftModel.load_adapter, cast(Any, PeftModel.from_pretrained).__func__

    @wraps(added)
    def add_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        with _undone(self):
            return added(self, *args, **kwargs)

    @wraps(loaded)
    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        from .checkpoint import sizes_ignored  # anew in each call, as in `_undone`

        if len(args) < 5 and _is_kept_in_16_bits(self, args[1] if len(args) > 1 else kwargs.get("adapter_name", "")):
            # PEFT would put parameters of 32 bits in the place of those that an optimizer may have.
            kwargs.setdefault("autocast_adapter_dtype", False)
        with _undone(self), sizes_ignored(bool(kwargs.get("ignore_mismatched_sizes", False))):
            return loaded(self, *args, **kwargs)

    @wraps(made)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _undone(model):
            return made(cls, model, *args, **kwargs)

    patched: Any = PeftModel
    patched.add_adapter, patched.load_adapter = add_adapter, load_adapter
    patched.from_pretrained = classmethod(from_pretrained)


def _is_kept_in_16_bits(model: PeftModel, adapter_name: str) -> bool:
    from .checkpoint import trained_parameters  # anew in each call, as in `_undone`

    return any(parameter.dtype.itemsize < 4 for parameter in trained_parameters(model, adapter_name))


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    # Looked up in each call: the package may have been loaded anew since PEFT was wrapped.
    from .compiled import without_compilers
    from .model import TRPTSModel
    from .withdrawal import withdrawn_on_failure

    # Other methods' files have the names of what a compiler has wrapped.
    is_ours = isinstance(getattr(model, "base_model", None), TRPTSModel)
    with without_compilers(model) if is_ours else nullcontext(), withdrawn_on_failure(model):
        yield


def _leave_compilers_out_of_files() -> None:
    """Have the file of a TR-PTS adapter name tensors as the model itself does, with or without compilers in it.

    What PEFT's `get_peft_model_state_dict` returns otherwise is named as the model is, for it to be put back.
    """
    saved, got = PeftModel.save_pretrained, PeftAdapterMixin.get_adapter_state_dict

    @wraps(saved)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        from .compiled import COMPILER, compilers_unnamed  # anew in each call, as in `_undone`

        is_ours = any(config.peft_type == TRPTS for config in self.peft_config.values())
        if is_ours and kwargs.get("state_dict") is not None:  # as of the whole of it compiled, which this is within
            kwargs["state_dict"] = {name.removeprefix(COMPILER): t for name, t in kwargs["state_dict"].items()}
        with compilers_unnamed():
            return saved(self, *args, **kwargs)

    @wraps(got)
    def get_adapter_state_dict(self: PeftAdapterMixin, *args: Any, **kwargs: Any) -> Any:  # for its `save_pretrained`
        from .compiled import compilers_unnamed

        with compilers_unnamed():
            return got(self, *args, **kwargs)

    cast(Any, PeftModel).save_pretrained = save_pretrained
    cast(Any, PeftAdapterMixin).get_adapter_state_dict = get_adapter_state_dict


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
        for name, config in self.peft_config.items():
            if config.peft_type == TRPTS:
                folder = output_dir if name == "default" else os.path.join(output_dir, name)
                update_card(folder, config, type(self.get_base_model()).__name__)

    @wraps(uploaded)
    def upload(self: PeftModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type == TRPTS for config in self.peft_config.values()):
            self.create_or_update_model_card(str(working_dir))
            drop_local_base(working_dir)
        return uploaded(self, working_dir, *args, **kwargs)

    patched: Any = PeftModel
    patched.create_or_update_model_card, patched._upload_modified_files = describe, upload
