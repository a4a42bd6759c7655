"""Load a pretrained image classifier, and see that its file held all of it but the head."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import AutoModelForImageClassification

from .head import head_names

__all__ = ["load_whole"]


def load_whole(source: str, **options: Any) -> nn.Module:
    """A classifier from a folder or the Hub; its head, and nothing else, may start anew.

    transformers gives what a file lacks, or has in another shape, a random start.

    Args:
        source: a folder, or an id on the Hub.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: the file does not hold all weights of the model that its config describes.
        Exception: what transformers raises where there is no such model.
    """
    model, report = AutoModelForImageClassification.from_pretrained(
        source, **options, ignore_mismatched_sizes=True, output_loading_info=True
    )
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    backbone, heads = f"{model.base_model_prefix}.", head_names(model)
    lacking = sorted(key for key in absent if key.startswith(backbone) and not key.startswith(heads))
    if lacking:
        raise ValueError(
            f"its file lacks {len(lacking)} of its weights, or has them in another shape; {lacking[0]} is the first"
        )
    return cast(nn.Module, model)
