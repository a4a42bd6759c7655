"""Small models and data that all tests share. Nothing here or in the tests reaches the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before all else
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import trpts_peft  # noqa: F401  (registers the method)

torch.set_num_threads(1)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "vit": (ViTConfig, ViTForImageClassification),
    "deit": (DeiTConfig, DeiTForImageClassification),
    "vit_msn": (ViTMSNConfig, ViTMSNForImageClassification),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification),
}
# CLS, distillation, four registers.
PREFIX = {"vit": 1, "deit": 2, "vit_msn": 1, "dinov2": 1, "dinov2_with_registers": 5}


def small_config(family: str = "vit", **options: Any) -> PreTrainedConfig:
    """Four blocks, two heads, width 32, 64 patches, three classes; `options` of the transformers config override.

    The initial weights are some eight times those of transformers' default: else blocks hardly change their input,
    and neither adapters nor tokens would show in the logits.
    """
    defaults = {
        "hidden_size": 32,
        **({"mlp_ratio": 2} if family.startswith("dinov2") else {"intermediate_size": 64}),
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "num_labels": 3,
        "initializer_range": 0.16,
    }
    return FAMILIES[family][0](**{**defaults, **options})


def build_vit(family: str = "vit", *, seed: int = 0, model_class: type[nn.Module] | None = None, **options: Any) -> Any:
    """A small model in eval mode, the same for the same seed; biases and scales are random: to forget one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (model_class or FAMILIES[family][1])(small_config(family, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif name.endswith("lambda1"):
                    parameter.uniform_(0.5, 1.5)
    return model.eval()


def naive_attend(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of a stock block in eval mode, by hand: (B, S, D) with the residual, and the attention weights."""
    if hasattr(block, "norm1"):
        attended, weights = block.attention(block.norm1(hidden))
        return hidden + block.layer_scale1.lambda1 * attended, weights
    attended, weights = block.attention(block.layernorm_before(hidden))
    return hidden + attended, weights


def naive_transform(block: Any, hidden: Tensor) -> Tensor:
    """The second half of a stock block in eval mode, by hand."""
    if hasattr(block, "norm2"):
        return hidden + block.layer_scale2.lambda1 * block.mlp(block.norm2(hidden))
    return hidden + block.mlp(block.layernorm_after(hidden))


def build_images(count: int = 2, *, image_size: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, 3, image_size, image_size) of unit variance."""
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(seed)).to(dtype)


class LabelledImages(Dataset[dict[str, Tensor]]):
    """`count` random images whose labels can be told from their mean color, though not without errors."""

    def __init__(self, count: int, *, num_labels: int = 3, image_size: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % num_labels
        tint = torch.randn(num_labels, 3, 1, 1, generator=generator)
        self.pixel_values = build_images(count, image_size=image_size, seed=seed + 1) + 0.3 * tint[self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def batch(self) -> dict[str, Tensor]:
        """All samples in one batch."""
        return {"pixel_values": self.pixel_values, "labels": self.labels}


def has_adapter_methods() -> bool:
    """Whether `vit.add_adapter` and the like take this peft; those of transformers 5.24 want one that is not out."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


needs_adapter_methods = pytest.mark.skipif(not has_adapter_methods(), reason="transformers' want a later peft")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    """Programs among the examples set the package's; what they say is theirs, not that of the tests that follow."""
    logger = logging.getLogger("trpts_peft")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def tiny_vit() -> Callable[..., Any]:
    """`tiny_vit(family, seed=0, model_class=None, **config)`: see `build_vit`."""
    return build_vit


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """`images(count=2, image_size=32, seed=0)`: random pixel values."""
    return build_images


@pytest.fixture
def labelled_images() -> type[LabelledImages]:
    """`labelled_images(count, num_labels=3, image_size=32, seed=0)`: a Dataset for `calibrate`."""
    return LabelledImages


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two small tasks and a base model: `tasks.Given`."""
    from tasks import write_given  # reads images, which few tests do

    return write_given(tmp_path, monkeypatch)
