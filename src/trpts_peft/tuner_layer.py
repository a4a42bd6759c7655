"""What PEFT finds when it looks for the modules of a TR-PTS adapter."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["MODEL_PREFIX", "PREFIX", "TRPTSLayer"]

PREFIX = "trpts_"  # transformers' `delete_adapter` derives it from the name of the method
MODEL_PREFIX = "base_model.model."  # of names in a PeftModel and in files; none where an adapter was injected directly


class TRPTSLayer(BaseTunerLayer):
    """Common base of the adapted linears and of the token selection in a block.

    Both follow the adapter that is active, disabled, merged or deleted, and PEFT and transformers reach both by this
    class.
    """

    adapter_layer_names: tuple[str, ...] = ("trpts_values", "trpts_bias")
