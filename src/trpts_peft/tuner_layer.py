"""What PEFT finds when it looks for the modules of a TR-PTS adapter."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["PREFIX", "TRPTSLayer"]

PREFIX = "trpts_"  # transformers' `delete_adapter` derives it from the name of the method


class TRPTSLayer(BaseTunerLayer):
    """Common base of the adapted linears and of the token selection in a block.

    Both follow the adapter that is active, disabled, merged or deleted, and PEFT and transformers reach both by this
    class.
    """

    adapter_layer_names: tuple[str, ...] = ("trpts_values", "trpts_bias")
