"""Read a saved adapter: what it trains in each block, which tokens it keeps, what it costs, which base it is for."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig

from .checkpoint import check_columns, check_floats, check_values, unpack_columns
from .config import TRPTSConfig
from .cost import geometry_of, image_size_of, macs
from .families import block_index, find_family, unit_order
from .folders import first_line, printable
from .selection import Selection, unit_of
from .tuner_layer import MODEL_PREFIX

__all__ = [
    "FILE",
    "base_config",
    "base_on_meta",
    "describe_file",
    "find_adapter",
    "read_config",
    "read_selection",
    "read_tensors",
    "table",
]

FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FILES = [FILE, _CONFIG, "config.json", "preprocessor_config.json"]
_WORDS = {"weights": "weights", "biases": "biases", "modules_to_save": "parameters of the head"}
_WIDTH = 12  # of the digest of the base, in hexadecimal digits
_LONGEST_NAME = 256
_LARGEST = {"num_hidden_layers": 1024, "num_labels": 10**6, "image_size": 2**14, "hidden_size": 2**16}
_WIDEST = 2**31  # columns that a file can hold; how many inputs its linears have, the base model knows


def find_adapter(adapter: str) -> Path:
    """The folder of a saved adapter.

    Args:
        adapter: a folder, or the id of a repository on the Hub, whose files are then downloaded.

    Raises:
        ValueError: there is no such folder or repository, or it holds no adapter in safetensors.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(adapter, allow_patterns=_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(
                f"`adapter` must be a folder or a repository on the Hub, got {adapter!r}: {first_line(error)}"
            ) from error
    missing = [name for name in (_CONFIG, FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"`adapter` must hold {_CONFIG} and {FILE}, got {adapter!r} without {missing[0]}.")
    return folder


def read_config(folder: Path) -> TRPTSConfig:
    """The config of the adapter in `folder`; a ValueError where it is of another method or cannot be read."""
    try:
        kind = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"`adapter` must have a readable {_CONFIG}, got {error} in {str(folder)!r}.") from error
    if kind != "TRPTS":
        raise ValueError(f"`adapter` must be of TR-PTS, got one of {kind!r} in {str(folder)!r}.")
    return cast(TRPTSConfig, PeftConfig.from_pretrained(str(folder)))


def read_tensors(folder: Path, config: TRPTSConfig) -> dict[str, Tensor]:
    """The tensors of the file in `folder`, by their names in the base model.

    Raises:
        ValueError: they are not what an adapter of this config can hold, whatever its base.
    """
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            tensors = {key.removeprefix(MODEL_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"`adapter` must be a whole safetensors file, got {error} in {str(folder)!r}.") from error
    _check_tensors(tensors, config)
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor], config: TRPTSConfig) -> None:
    columns = {key.removesuffix(".trpts_columns"): t for key, t in tensors.items() if key.endswith(".trpts_columns")}
    if not columns or (config.connections is not None and set(columns) != set(config.connections)):
        raise ValueError(
            f"`adapter` must hold the linears that its config names, got {len(columns)} other or none: it is damaged."
        )
    long = next((key for key in tensors if len(key) > _LONGEST_NAME), None)
    if long is not None:  # tables and figures are as wide as the longest
        raise ValueError(
            f"`adapter` must name tensors in up to {_LONGEST_NAME} letters, got {long[:40]!r}… of {len(long)}: it is "
            "damaged."
        )
    empty = next((key for key, tensor in tensors.items() if tensor.numel() == 0), None)
    if empty is not None:  # such a tensor can claim any number of rows
        raise ValueError(f"`adapter` must hold entries in each tensor, got none in {empty}: it is damaged.")
    if surplus := set(config.unit_importance or {}) - {unit_of(name, config.allocation_unit) for name in columns}:
        raise ValueError(
            f"`adapter` must name units of its linears in `unit_importance`, got {len(surplus)} other: it is damaged."
        )
    stray = {key for key in tensors if key.endswith((".trpts_values", ".trpts_bias", ".trpts_fingerprint"))}
    stray -= {f"{name}.trpts_{part}" for name in columns for part in ("values", "bias", "fingerprint")}
    if stray:
        raise ValueError(f"`adapter` must hold the columns of each linear, got none for {min(stray)}: it is damaged.")
    for name, indices in columns.items():
        values = tensors.get(f"{name}.trpts_values")
        whole = indices.dim() == 2 and not indices.is_floating_point() and values is not None
        if not whole or values is None or values.shape != indices.shape:
            raise ValueError(
                f"`adapter` must hold columns and values (out_features, C) of {name}, got {tuple(indices.shape)} of "
                f"{indices.dtype} and {None if values is None else tuple(values.shape)}: it is damaged."
            )
        check_columns(f"{name}.trpts_columns", indices, _WIDEST)
        for key in (f"{name}.trpts_values", f"{name}.trpts_bias"):
            if key in tensors:
                check_values(key, tensors[key], tensors[key].dtype)
        if (key := f"{name}.trpts_fingerprint") in tensors:
            check_floats(key, tensors[key])


def read_selection(folder: Path) -> Selection:
    """What a saved adapter trains, as `calibrate` returned it; `shapes` are known only where the base model is.

    Raises:
        ValueError: the file is damaged, or the adapter was never calibrated.
    """
    config = read_config(folder)
    if config.connections is None:
        raise ValueError(f"`adapter` must be calibrated, got one that is not in {str(folder)!r}.")
    columns = {
        key.removesuffix(".trpts_columns"): unpack_columns(tensor)
        for key, tensor in read_tensors(folder, config).items()
        if key.endswith(".trpts_columns")
    }
    base = base_on_meta(folder, config)
    modules = dict(base.named_modules()) if isinstance(base, nn.Module) else {}
    linears = {name: modules[name] for name in columns if name in modules}
    return Selection(
        importance=config.unit_importance or {},
        connections={name: indices.shape[1] for name, indices in columns.items()},
        columns=columns,
        token_layers=tuple(config.fixed_token_layers),
        keep_rate=config.keep_rate,
        shapes={name: (m.out_features, m.in_features) for name, m in linears.items() if isinstance(m, nn.Linear)},
        units={name: unit_of(name, config.allocation_unit) for name in columns},
    )


def base_on_meta(folder: Path, config: TRPTSConfig) -> nn.Module | str:
    """The base model without its weights, or one line that says why it cannot be had."""
    try:
        with torch.device("meta"):
            return cast(nn.Module, AutoModelForImageClassification.from_config(base_config(folder, config)))
    except Exception as error:  # a config of somebody else's, and packages that it may need
        return f"the base model {config.base_model_name_or_path!r} cannot be read ({first_line(error)})"


def base_config(folder: Path, config: TRPTSConfig) -> Any:
    """The config of the base model, with the classes of the adapter where a `config.json` beside it names them.

    Nothing else is taken from that file: an adapter does not say how its base computes, nor which code it runs.
    """
    source = str(config.base_model_name_or_path)
    _check_sizes(PreTrainedConfig.get_config_dict(source)[0])
    own = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if (folder / "config.json").is_file():
        beside = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = beside.get("id2label") if isinstance(beside, dict) else None
        if isinstance(names, dict):
            own.id2label = {int(index): str(name) for index, name in names.items()}
            own.label2id = {name: index for index, name in own.id2label.items()}
    return own


def _check_sizes(base: Mapping[str, Any]) -> None:
    """Refuse what would take any time and memory to build, though it is a few letters in a file."""
    for name, most in _LARGEST.items():
        value = base.get(name)
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, (int, float))]
        if any(number > most for number in numbers):
            raise ValueError(f"its config must have a `{name}` of up to {most:,}, got {value}")


def describe_file(folder: Path) -> dict[str, Any]:
    """All that can be said of the adapter in `folder`, ready for JSON.

    Returns:
        `base_model`, `base_fingerprint` (a digest of the sampled weights of the base that the file holds),
        `calibrated`, `keep_rate`, `token_layers`, `blocks` (a list of: unit, importance, connections, weights, biases,
        keep_rate), `trainable` (weights, biases, modules_to_save), `bytes` (file, per_weight), and `cost` (macs,
        dense_macs, speedup of one image of image_size, which is the base's own, base_parameters, trainable_percent with
        modules_to_save), or in its place `cost_unknown`, the reason.

    Raises:
        ValueError: the file is damaged, or not of TR-PTS.
    """
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    counts = _counts(tensors)
    indices = [tensor for key, tensor in tensors.items() if key.endswith(".trpts_columns")]
    index_bytes = sum(tensor.numel() * tensor.element_size() for tensor in indices)
    value_bytes = sum(t.numel() * t.element_size() for key, t in tensors.items() if key.endswith(".trpts_values"))
    return {
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": _digest(tensors),
        "calibrated": config.connections is not None,
        "keep_rate": config.keep_rate,
        "token_layers": config.fixed_token_layers,
        "blocks": _blocks(tensors, config),
        "trainable": counts,
        "bytes": {
            "file": (folder / FILE).stat().st_size,
            "per_weight": (index_bytes + value_bytes) / max(1, counts["weights"]),
        },
        **_cost(folder, config, sum(counts.values())),
    }


def _counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {"weights": 0, "biases": 0, "modules_to_save": 0}
    for key, tensor in tensors.items():
        kind = {".trpts_values": "weights", ".trpts_bias": "biases"}.get(f".{key.rpartition('.')[2]}")
        if kind is not None or ".trpts_" not in f".{key}":
            counts[kind or "modules_to_save"] += tensor.numel()
    return counts


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(key for key in tensors if key.endswith(".trpts_fingerprint")):
        total.update(key.encode() + tensors[key].float().numpy().tobytes())
    return total.hexdigest()[:_WIDTH]


def _blocks(tensors: Mapping[str, Tensor], config: TRPTSConfig) -> list[dict[str, Any]]:
    members: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        if key.endswith(".trpts_values"):
            name = key.removesuffix(".trpts_values")
            members[unit_of(name, config.allocation_unit)].append(name)
    importance = config.unit_importance or {}
    return [
        {
            "unit": unit,
            "importance": importance.get(unit),
            "connections": sorted({tensors[f"{name}.trpts_values"].shape[1] for name in members[unit]}),
            "weights": sum(tensors[f"{name}.trpts_values"].numel() for name in members[unit]),
            "biases": sum(tensors[key].numel() for n in members[unit] if (key := f"{n}.trpts_bias") in tensors),
            "keep_rate": config.keep_rate if block_index(unit) in config.fixed_token_layers else 1.0,
        }
        for unit in sorted(members, key=unit_order)
    ]


def _cost(folder: Path, config: TRPTSConfig, trainable: int) -> dict[str, Any]:
    base = base_on_meta(folder, config)
    if isinstance(base, str):
        return {"cost": None, "cost_unknown": base}
    if find_family(base) is None:
        return {"cost": None, "cost_unknown": f"{type(base).__name__} is outside the table of families"}
    geometry = geometry_of(base)
    dense = macs(geometry, {})
    reduced = macs(geometry, dict.fromkeys(config.fixed_token_layers, config.keep_rate))
    total = sum(parameter.numel() for parameter in base.parameters())
    return {
        "cost": {
            "macs": reduced,
            "dense_macs": dense,
            "speedup": dense / reduced,
            "image_size": list(image_size_of(base)),
            "base_parameters": total,
            "trainable_percent": 100 * trainable / total,
        }
    }


def table(description: Mapping[str, Any]) -> str:
    """What `describe_file` returns, to read in a terminal."""
    rows = [("unit", "w %", "C", "weights", "biases", "tokens kept")]
    for block in description["blocks"]:
        share = "-" if block["importance"] is None else f"{100 * block['importance']:.2f}"
        counts = block["connections"]
        between = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        kept = f"{100 * block['keep_rate']:g} %" if block["keep_rate"] < 1 else "all"
        rows.append((block["unit"], share, between, f"{block['weights']:,}", f"{block['biases']:,}", kept))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(map(printable, [*lines, "", *_facts(description)]))


def _facts(description: Mapping[str, Any]) -> list[str]:
    trainable, size, cost = description["trainable"], description["bytes"], description["cost"]
    layers = ", ".join(map(str, description["token_layers"]))
    facts = [
        ("base model", f"{description['base_model']} (fingerprint {description['base_fingerprint']})"),
        ("calibrated", "yes" if description["calibrated"] else "no"),
        ("trained", ", ".join(f"{count:,} {_WORDS[name]}" for name, count in trainable.items())),
        ("token layers", f"{layers} at keep rate {description['keep_rate']:g}" if layers else "none"),
        ("file", f"{size['file']:,} bytes, {size['per_weight']:.2f} per trained weight"),
    ]
    if cost is None:
        facts.append(("cost", f"unknown: {description['cost_unknown']}"))
    else:
        height, width = cost["image_size"]
        per_image = f"{cost['macs']:,} MACs an image of {height} x {width}, predicted speed-up {cost['speedup']:.3f}"
        facts.append(("cost", f"{per_image}; {cost['trainable_percent']:.3f} % of the base model trained"))
    return [f"{name:<13} {text}" for name, text in facts]
