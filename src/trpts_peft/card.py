"""The part of a model card that says what an adapter is and how to load it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from .families import block_index, block_of, unit_order
from .tuner_layer import MODEL_PREFIX

__all__ = ["describe_adapter", "drop_local_base", "plain", "update_card"]

_BEGIN, _END = "<!-- TR-PTS: written whenever the adapter{} is saved -->", "<!-- TR-PTS: end -->"
_TAGS = ("sparse", "token-reduction", "trpts")
_COLUMNS = ".trpts_columns"

Shapes = Mapping[str, tuple[int, ...]]


def update_card(folder: str | Path, config: Any, base_model_class: str | None) -> None:
    """Write into the model card of a saved adapter, where there is one, what a reader needs to use it.

    That is the README.md beside its file; of an adapter in a folder named after it, the one that PEFT has put above.
    What else stands there stays; what an earlier call wrote for this adapter is replaced.

    Args:
        folder: where the adapter's safetensors file lies.
        config: its TRPTSConfig.
        base_model_class: name of the class of the base model in transformers; None where it is not known.
    """
    path, file, subfolder = Path(folder) / "README.md", Path(folder) / "adapter_model.safetensors", ""
    if not path.is_file():
        path, subfolder = Path(folder).resolve().parent / "README.md", Path(folder).resolve().name
    if not path.is_file() or not file.is_file():
        return
    card = ModelCard.load(path)
    if subfolder and card.data.library_name != "peft":
        return
    card.data.tags = sorted({*(card.data.tags or ()), *_TAGS})
    if card.data.pipeline_tag is None and (base_model_class or "").endswith("ForImageClassification"):
        card.data.pipeline_tag = "image-classification"
    begin = _BEGIN.format(f" {subfolder}" if subfolder else "")
    try:
        shapes = _shapes_in(file)
    except SafetensorError:  # PEFT writes the card first: what lies there from before may be broken
        return
    names = not subfolder and (Path(folder) / "config.json").is_file()
    part = describe_adapter(config, shapes, base_model_class, subfolder=subfolder, names=names)
    section = f"{begin}\n{part}\n{_END}"
    others = re.sub(f"{re.escape(begin)}.*?{re.escape(_END)}", "", card.text, flags=re.DOTALL).lstrip()
    card.text = f"{section}\n\n{others}"
    card.save(path)


def drop_local_base(folder: str | Path) -> None:
    """Before a push: a base model that lies in a folder has no name that others know; the Hub refuses cards with it."""
    card = ModelCard.load(Path(folder) / "README.md")
    data: Any = card.data
    if data.base_model and Path(str(data.base_model)).is_dir():
        data.base_model = None
        data.tags = [tag for tag in data.tags or () if not tag.startswith("base_model:")]
        card.save(Path(folder) / "README.md")


def _shapes_in(path: Path) -> Shapes:
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def plain(name: str) -> str:
    """A name that may come from a file of somebody else's, in one line, without markup of Markdown or HTML."""
    return re.sub(r"[^\w ./:@\\-]|(?<=:)/(?=/)", "-", name)


def describe_adapter(
    config: Any, shapes: Shapes, base_model_class: str | None, *, subfolder: str = "", names: bool = False
) -> str:
    """Markdown: what the adapter changes, how to load it, and a table of its blocks.

    Args:
        config: its TRPTSConfig.
        shapes: {key in the adapter's file: shape}.
        base_model_class: name of the class of the base model in transformers; None where it is not known.
        subfolder: where the adapter lies below the folder of the card.
        names: whether a `config.json` beside the adapter has the names of the classes.
    """
    found = {key.removeprefix(MODEL_PREFIX): shape for key, shape in shapes.items() if key.endswith(_COLUMNS)}
    columns = {name.removesuffix(_COLUMNS): shape for name, shape in found.items()}
    trained = sum(neurons * count for neurons, count in columns.values())
    text = f"A sparse update of {trained:,} weights in {len(columns)} linear layers of the base model, by TR-PTS."
    if config.connections is None:
        text += " It is **not calibrated**: each neuron trains its inputs of largest weight, whatever the task."
    named = f"`{subfolder}` " if subfolder else ""
    snippet = "\n".join(_snippet(config, shapes, base_model_class, subfolder, names))
    return "\n\n".join(
        [
            f"# TR-PTS adapter {named}of {plain(config.base_model_name_or_path or 'an unnamed model')}",
            text,
            f"```python\n{snippet}\n```",
            "\n".join(_table(config, columns)),
        ]
    )


def _snippet(config: Any, shapes: Shapes, base_model_class: str | None, subfolder: str, names: bool) -> list[str]:
    """Code that loads base model and adapter."""
    known = isinstance(base_model_class, str) and base_model_class.isidentifier()
    model = str(base_model_class) if known else "AutoModelForImageClassification"
    base = json.dumps(config.base_model_name_or_path or "the/base-model")
    labels = [f"num_labels={shape[0]}" for key, shape in shapes.items() if key.endswith("classifier.weight")][:1]
    read = []
    if names and labels:
        read = ['config = AutoConfig.from_pretrained("user/repository")  # this repository, or its folder']
        labels = ["num_labels=config.num_labels", "id2label=config.id2label", "label2id=config.label2id"]
    head = "".join(f", {argument}" for argument in [*labels, "ignore_mismatched_sizes=True"]) if labels else ""
    within = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    return [
        "import trpts_peft  # registers the method with PEFT",
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted(['AutoConfig'] * len(read) + [model]))}",
        "",
        *read,
        f"base = {model}.from_pretrained({base}{head})",
        f'model = PeftModel.from_pretrained(base, "user/repository"{within}).eval()  # this repository, or its folder',
    ]


def _table(config: Any, columns: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One row a block, linears outside of any together in the last."""
    blocks: dict[str | None, list[tuple[int, ...]]] = defaultdict(list)
    for name, shape in columns.items():
        blocks[block_of(name)].append(shape)
    numbers = {block: None if block is None else block_index(block) for block in blocks}
    told_apart = len(set(numbers.values())) == len(numbers)  # by their numbers
    names = ("block", "importance", "inputs per neuron", "trainable weights", "image tokens kept")
    lines = [f"| {' | '.join(names)} |", f"|{' ---: |' * len(names)}"]
    shares = _block_shares(config.unit_importance or {}, set(blocks))
    for block in sorted(blocks, key=lambda name: unit_order(name or "")):
        counts = sorted({count for _, count in blocks[block]})
        weights = sum(neurons * count for neurons, count in blocks[block])
        kept = f"{100 * config.keep_rate:g} %" if numbers[block] in config.fixed_token_layers else "all"
        between = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        share = f"{100 * shares[block]:.1f} %" if block in shares else "-"
        cells = ["none" if block is None else f"{numbers[block]}" if told_apart else block, share, between]
        lines.append(f"| {' | '.join([*cells, f'{weights:,}', kept])} |")
    return lines


def _block_shares(importance: Mapping[str, float], blocks: set[str | None]) -> dict[str | None, float]:
    """The importance of units (eq. 3) added up by block."""
    shares: dict[str | None, float] = defaultdict(float)
    for unit, share in importance.items():
        shares[unit if unit in blocks else block_of(unit)] += share
    return shares
