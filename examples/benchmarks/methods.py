"""ViT-B/16 under every method that the benchmark compares, with the same linears adapted and the same head trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.baselines import LINEARS, build
from trpts_peft import FisherScores, TRPTSConfig, calibrate

TOKEN_LAYERS = [3, 6, 9]
KEEP_RATES = [0.95, 0.8, 0.5]
CONNECTIONS = 3
# The share of its inputs that a kind of linear uses after calibration: means over the twelve blocks of a small ViT
# calibrated on photographs of 17 flowers, the widest of three tasks (used_columns.py; docs/benchmarks.md).
USED_SHARES = {"q_proj": 0.068, "k_proj": 0.111, "v_proj": 0.053, "o_proj": 0.099, "fc1": 0.163, "fc2": 0.021}

Shares = Mapping[str, float]


def new_vit(num_labels: int = 100) -> ViTForImageClassification:
    """ViT-B/16 at 224 pixels; weights drawn at random, which cost what trained ones cost."""
    torch.manual_seed(0)
    # The first labels would set the kind of problem, after which a compiled model is compiled once more.
    return ViTForImageClassification(ViTConfig(num_labels=num_labels, problem_type="single_label_classification"))


def peer(name: str, **options: Any) -> nn.Module:
    """It under a method of `benchmarks.baselines`."""
    return build(name, new_vit(), options)


full = partial(peer, "full")
lora = partial(peer, "lora", targets=LINEARS)


def frozen() -> nn.Module:
    """No weight of a block trains, but gradients flow through all of them: the floor for adapters inside the blocks."""
    vit = peer("linear")
    vit.vit.embeddings.cls_token.requires_grad_(True)
    return vit


def trpts(keep_rate: float = 1.0, shares: Shares = USED_SHARES, token_layers: list[int] | None = None) -> nn.Module:
    """TR-PTS with three inputs a neuron, out of the given share of the inputs of each linear.

    Args:
        keep_rate: of the blocks `token_layers`.
        shares: {kind of linear: U / in_features}.
        token_layers: the blocks that select tokens; None: 3, 6 and 9.
    """
    logging.getLogger("trpts_peft").setLevel(logging.ERROR)  # "not calibrated" until the last line but one
    layers = TOKEN_LAYERS if token_layers is None else token_layers
    config = TRPTSConfig(
        min_connections=CONNECTIONS,
        max_connections=CONNECTIONS,
        keep_rate=keep_rate,
        token_layers=layers,
        modules_to_save=["classifier"],
    )
    model = get_peft_model(new_vit(), config)
    calibrate(model, None, scores=drawn_scores(model.get_base_model(), shares), probe_head=False, progress=False)
    return model


def drawn_scores(vit: nn.Module, shares: Shares, seed: int = 0) -> FisherScores:
    """Scores under which every neuron picks its inputs among the same few columns of its linear, drawn by `seed`."""
    generator, scores = torch.Generator().manual_seed(seed), {}
    for name, module in vit.named_modules():
        kind = name.rpartition(".")[2]
        if kind in shares:
            used = max(CONNECTIONS, round(shares[kind] * module.in_features))
            scores[name] = torch.rand(module.out_features, module.in_features, generator=generator)
            scores[name][:, torch.randperm(module.in_features, generator=generator)[:used]] += 1
    return FisherScores(scores, num_samples=1)


def everywhere(share: float) -> Shares:
    """The same share in all linears."""
    return dict.fromkeys(LINEARS, share)


def methods() -> dict[str, Callable[[], nn.Module]]:
    """{name: builder} of what trains; the first is what all are compared with."""
    sparse: dict[str, Callable[[], nn.Module]] = {"TR-PTS": trpts}
    sparse |= {f"TR-PTS, keep rate {rate}": partial(trpts, rate) for rate in KEEP_RATES}
    peers = {
        "linear": partial(peer, "linear"),
        "BitFit": partial(peer, "bitfit"),
        "LoRA r=8": lora,
        "SHiRA r=8": partial(peer, "shira"),
        "Super-Tuning": partial(peer, "super-tuning"),
    }
    return {"frozen": frozen, **peers, **sparse, "full": full}


def methods_by_share(shares: tuple[float, ...]) -> dict[str, Callable[[], nn.Module]]:
    """TR-PTS at keep rate 1 with all linears using the same share of their inputs."""
    return {f"TR-PTS, U/in {share:g}": partial(trpts, shares=everywhere(share)) for share in shares}
