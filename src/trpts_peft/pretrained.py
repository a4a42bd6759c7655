"""Load a pretrained image classifier, and see that its file held all of it but the head."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, DeiTForImageClassification

from .head import head_names

__all__ = ["load_whole"]

# Of the backbone, what prepares its output for a head: models that were pretrained without one have none.
_BEHIND_THE_BLOCKS = ("pooler", "layernorm", "norm")


# A distilled DeiT averages two heads, and takes no labels; the class with one head reads the same file.
_LOADED_AS = {"DeiTForImageClassificationWithTeacher": DeiTForImageClassification}


def load_whole(source: str, **options: Any) -> nn.Module:
    """A classifier from a folder or the Hub; its head, with the norm before it, may start anew, and nothing else.

    transformers gives what a file lacks, or has in another shape, a random start. Code that comes with it is not run.

    Args:
        source: a folder, or an id on the Hub.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: the file does not hold all weights of the model that its config describes.
        Exception: what transformers raises where there is no such model.
    """
    config = options.get("config") or AutoConfig.from_pretrained(source, trust_remote_code=False)
    loader: Any = _LOADED_AS.get(next(iter(config.architectures or ()), ""), AutoModelForImageClassification)
    model, report = loader.from_pretrained(
        source, **options, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
    )
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    anew = head_names(model) + tuple(f"{prefix}{name}." for name in _BEHIND_THE_BLOCKS)
    lacking = sorted(key for key in absent if key.startswith(prefix) and not key.startswith(anew))
    if lacking:
        raise ValueError(
            f"its file lacks {len(lacking)} of its weights, or has them in another shape; {lacking[0]} is the first"
        )
    return cast(nn.Module, model)
