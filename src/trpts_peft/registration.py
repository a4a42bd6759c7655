"""Make PEFT know TR-PTS."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method

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
