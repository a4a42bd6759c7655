"""What a model costs: multiply-accumulates, tokens, trainable and stored parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import count_vits, find_blocks, find_family, num_prefix_tokens
from .functional import kept_tokens
from .tuner_layer import MODEL_PREFIX
from .vit import keep_rates_in_force

__all__ = [
    "Cost",
    "Geometry",
    "estimate_cost",
    "geometry_of",
    "image_size_of",
    "macs",
    "patch_grid",
    "patch_size_of",
    "predicted_speedup",
    "tokens_per_block",
]

ImageSize = int | tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a ViT that its cost depends on.

    Attributes:
        tokens: patch tokens of one image.
        prefix: tokens before them (CLS, distillation, registers).
        hidden: width of a token.
        intermediate: width inside the MLP; of a gated MLP, whose gate is a third product, one and a half times that.
        blocks: number of transformer blocks.
        patch_inputs: values in one patch (patch height x patch width x channels).
        head: weights of the head's linears, 0 without a head.
    """

    tokens: int
    prefix: int
    hidden: int
    intermediate: int
    blocks: int
    patch_inputs: int
    head: int


def tokens_per_block(geometry: Geometry, keep_rates: Mapping[int, float]) -> tuple[int, ...]:
    """Tokens that leave each block, prefix included.

    Args:
        geometry: sizes of the model.
        keep_rates: {block index: keep rate}; a block that is not named keeps all tokens.

    Raises:
        ValueError: a block index is outside the model.
    """
    unknown = sorted(index for index in keep_rates if not 0 <= index < geometry.blocks)
    if unknown:
        raise ValueError(
            f"`keep_rates` must name blocks from 0 to {geometry.blocks - 1}, got {unknown}. Correct these indices."
        )
    tokens, counts = geometry.tokens, []
    for index in range(geometry.blocks):
        kept = kept_tokens(tokens, keep_rates.get(index, 1.0))
        tokens = tokens if kept == tokens else kept + 1  # the merged token
        counts.append(tokens + geometry.prefix)
    return tuple(counts)


def macs(geometry: Geometry, keep_rates: Mapping[int, float]) -> int:
    """Multiply-accumulates of one image: all matrix products; norms, softmax and biases are left out.

    Tokens drop after a block's attention and before its MLP (section 3.3 of the paper). Where they do, the CLS row of
    the attention and the mean of the merged tokens count as well.

    Args:
        geometry: sizes of the model.
        keep_rates: {block index: keep rate}, as for `tokens_per_block`.
    """
    after = tokens_per_block(geometry, keep_rates)
    before = (geometry.tokens + geometry.prefix, *after)
    hidden = geometry.hidden
    total = geometry.tokens * geometry.patch_inputs * hidden + geometry.head
    for entering, leaving in zip(before, after, strict=False):
        total += 4 * entering * hidden**2 + 2 * entering**2 * hidden
        total += 2 * leaving * hidden * geometry.intermediate
        if leaving < entering:  # the CLS row against every key, and a mean over all image tokens with kept weights zero
            total += (2 * entering - geometry.prefix) * hidden
    return total


def predicted_speedup(geometry: Geometry, keep_rates: Mapping[int, float]) -> float:
    """Multiply-accumulates of the dense model over those with `keep_rates`: the ideal speed-up, 1.0 or more."""
    return macs(geometry, {}) / macs(geometry, keep_rates)


def geometry_of(model: nn.Module, image_size: ImageSize | None = None) -> Geometry:
    """Sizes of a supported ViT, plain or wrapped by PEFT.

    Args:
        model: a ViT of the family table.
        image_size: height and width in pixels (one int for a square), by default the model's own.

    Raises:
        ValueError: the model is not in the family table or holds several ViTs, or an image holds no patch.
    """
    base = _base_of(model)
    if find_family(base) is None:
        raise ValueError(
            f"`model` must be a ViT of a supported family, got {type(base).__name__}. "
            "Costs are known for the models that token selection supports, such as ViT and DINOv2."
        )
    if (count := count_vits(base)) > 1:
        raise ValueError(
            f"`model` must hold one ViT, got {type(base).__name__} with {count}, of which nothing tells how often each "
            "runs. Pass one of them."
        )
    config = _config_of(base)
    rows, columns = patch_grid(base, image_size)
    patch = patch_size_of(base)
    adapters = _adapter_parameters(base)
    blocks = find_blocks(base)
    mlp = cast(nn.Module, blocks[0][1].mlp)
    head, inner = (
        _count(p for p in parameters if p.ndim == 2 and id(p) not in adapters)
        for parameters in (_head_parameters(base), mlp.parameters())
    )
    return Geometry(
        tokens=rows * columns,
        prefix=num_prefix_tokens(base),
        hidden=config.hidden_size,
        intermediate=inner // (2 * config.hidden_size),
        blocks=len(blocks),
        patch_inputs=patch[0] * patch[1] * config.num_channels,
        head=head,
    )


def patch_size_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch of a supported ViT, in pixels."""
    return _pair("patch_size", _config_of(_base_of(model)).patch_size)


def image_size_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a supported ViT is configured for, in pixels."""
    return _pair("image_size", _config_of(_base_of(model)).image_size)


def patch_grid(model: nn.Module, image_size: ImageSize | None = None) -> tuple[int, int]:
    """Rows and columns of the patches that a supported ViT cuts an image into; arguments as for `geometry_of`."""
    patch = patch_size_of(model)
    height, width = image_size_of(model) if image_size is None else _pair("image_size", image_size)
    if height < patch[0] or width < patch[1]:
        raise ValueError(
            f"`image_size` must hold at least one patch of {patch[0]} x {patch[1]} pixels, got {height} x {width}. "
            "Pass the height and width in pixels."
        )
    return height // patch[0], width // patch[1]


@dataclass(frozen=True)
class Cost:
    """The cost of one image, and the size of what is trained and stored.

    "The head" is all that lies outside the backbone (`classifier` in an image classifier). Only the head in use counts:
    the adapter's own copy, where there is one.

    Attributes:
        macs: multiply-accumulates of one image with the tokens in force now; adapters count as merged.
        dense_macs: the same with all tokens.
        tokens: tokens that leave each block, prefix included.
        total_parameters: parameters of the base model, adapters not counted.
        total_parameters_without_head: the same without the head.
        trainable_parameters: parameters with `requires_grad`.
        trainable_parameters_without_head: the same without the head.
        stored_parameters: weights that the files of the active adapters hold (the whole model, if it has none); neither
            the positions of sparse weights nor the fingerprint of the base model count.
        stored_parameters_without_head: the same without the head.
        stored_bytes: bytes of all tensors in those files, positions and fingerprint included; a file adds its header.
    """

    macs: int
    dense_macs: int
    tokens: tuple[int, ...]
    total_parameters: int
    total_parameters_without_head: int
    trainable_parameters: int
    trainable_parameters_without_head: int
    stored_parameters: int
    stored_parameters_without_head: int
    stored_bytes: int

    @property
    def speedup(self) -> float:
        """Ideal speed-up by token selection: `dense_macs / macs`."""
        return self.dense_macs / self.macs

    @property
    def trainable_percent(self) -> float:
        """Trainable parameters in percent of the base model's."""
        return 100 * self.trainable_parameters / self.total_parameters

    @property
    def trainable_percent_without_head(self) -> float:
        """The same with the head left out on both sides."""
        return 100 * self.trainable_parameters_without_head / self.total_parameters_without_head

    def summary(self) -> str:
        """A readable table."""
        trainable = f"{self.trainable_parameters:,} ({self.trainable_percent:.3f} %)"
        without = f"{self.trainable_parameters_without_head:,} ({self.trainable_percent_without_head:.3f} %)"
        rows = (
            ("computation", f"{_scaled(self.macs, 'MACs')} per image (dense {_scaled(self.dense_macs, 'MACs')})"),
            ("ideal speed-up", f"{self.speedup:.3f}"),
            ("tokens per block", " ".join(map(str, self.tokens))),
            ("base parameters", f"{self.total_parameters:,} (without head {self.total_parameters_without_head:,})"),
            ("trainable parameters", trainable),
            ("  without head", without),
            ("stored parameters", f"{self.stored_parameters:,} ({_scaled(self.stored_bytes, 'B')})"),
            ("  without head", f"{self.stored_parameters_without_head:,}"),
        )
        return "\n".join(f"{name:<22}{value}" for name, value in rows)

    def __str__(self) -> str:
        return self.summary()


def estimate_cost(model: nn.Module, image_size: ImageSize | None = None) -> Cost:
    """The cost of a supported ViT as it stands: plain, or with TR-PTS, LoRA or another PEFT method.

    Multiply-accumulates are counted analytically, with the keep rates that are in force now: after
    `set_token_selection(model, False)` the model is dense.

    Args:
        model: a ViT of the family table, plain or wrapped by PEFT, compiled or data parallel.
        image_size: height and width in pixels (one int for a square), by default the model's own.

    Raises:
        ValueError: the model is not in the family table or holds several ViTs, or an image holds no patch.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    geometry, rates, base = geometry_of(model, image_size), keep_rates_in_force(model), _base_of(model)
    head = {id(parameter) for parameter in _head_parameters(base)}
    adapters = _adapter_parameters(base)
    original = [parameter for parameter in base.parameters() if id(parameter) not in adapters]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    files = [_stored_tensors(model, name) for name in _active_adapters(model)] or [base.state_dict()]
    stored = [item for file in files for item in file.items()]
    weights = [(key, tensor) for key, tensor in stored if tensor.is_floating_point() and "trpts_fingerprint" not in key]
    return Cost(
        macs=macs(geometry, rates),
        dense_macs=macs(geometry, {}),
        tokens=tokens_per_block(geometry, rates),
        total_parameters=_count(original),
        total_parameters_without_head=_count(p for p in original if id(p) not in head),
        trainable_parameters=_count(trainable),
        trainable_parameters_without_head=_count(p for p in trainable if id(p) not in head),
        stored_parameters=_count(tensor for _, tensor in weights),
        stored_parameters_without_head=_count(tensor for key, tensor in weights if _in_backbone(base, key)),
        stored_bytes=sum(tensor.numel() * tensor.element_size() for _, tensor in stored),
    )


def _base_of(model: nn.Module) -> nn.Module:
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _backbone(base: nn.Module) -> tuple[str, nn.Module]:
    """The ViT without its head, with its name in `base` ("" if `base` is one)."""
    outer = next((module for module in base.modules() if isinstance(module, PreTrainedModel)), base)
    backbone = getattr(outer, "base_model", outer)
    return next((name, module) for name, module in base.named_modules() if module is backbone)


def _config_of(base: nn.Module) -> Any:
    """The config of the ViT: every attention of the supported families carries it, the model usually does."""
    return next(config for module in base.modules() if hasattr(config := getattr(module, "config", None), "patch_size"))


def _in_backbone(base: nn.Module, key: str) -> bool:
    """Whether an entry of an adapter file, or of the base model's state dict, belongs to the backbone."""
    name, _ = _backbone(base)
    return not name or key.removeprefix(MODEL_PREFIX).startswith(f"{name}.")


def _head_parameters(base: nn.Module) -> list[nn.Parameter]:
    """All that lies outside the backbone, adapters' copies included."""
    inside = {id(parameter) for parameter in _backbone(base)[1].parameters()}
    return [parameter for parameter in base.parameters() if id(parameter) not in inside]


def _adapter_parameters(base: nn.Module) -> set[int]:
    """Ids of the parameters that adapters, of whatever method, have added inside `base`."""
    containers: list[Any] = []
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            containers += [getattr(module, name, None) for name in module.adapter_layer_names]
        elif isinstance(module, ModulesToSaveWrapper):
            containers.append(module.modules_to_save)
    return {id(p) for container in containers if isinstance(container, nn.Module) for p in container.parameters()}


def _active_adapters(model: nn.Module) -> list[str]:
    if not getattr(model, "peft_config", None):
        return []
    if isinstance(model, PeftModel):
        return list(model.active_adapters)
    # Not by transformers' method of that name, which knows only what came through its own methods.
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def _stored_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What PEFT would write; no embedding layers, whose check may ask the hub for the base model's config."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    return tensors


def _pair(name: str, size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width)):
        raise ValueError(f"`{name}` must be a positive int or a pair of them, got {size!r}. Pass the size in pixels.")
    return height, width


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _scaled(number: float, unit: str) -> str:
    """Four significant digits with a decimal prefix: "17.56 GMACs"."""
    steps = 0
    while number >= 1000 and steps < 4:
        number, steps = number / 1000, steps + 1
    return f"{number:.4g} {('', 'k', 'M', 'G', 'T')[steps]}{unit}"
