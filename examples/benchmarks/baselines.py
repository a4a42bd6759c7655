"""Every method of the paper's tables, and two sparse ones of PEFT, on a ViT or DeiT that classifies images.

`build(name, model, options)` changes the model in place and returns what trains: the method's parameters and the head,
nothing else. `options` are the arguments of the function of that name here; for full, linear and BitFit there are none,
and for TR-PTS they are those of TRPTSConfig. GPS and TR-PTS are still to be calibrated.

The paper states no setting of these methods, but its Params. % tell some, once the mean head of the tasks is taken off:
an Adapter with bottleneck 12 and VPT-shallow with 100 prompts fit both tables, AdaptFormer with bottleneck 8 and GPS
with one connection and the biases fit table 2 (VTAB-1k), LoRA of rank 16 fits table 3 (FGVC). The others come from no
setting that is usual, so from several, tuned per task: AdaptFormer would need a bottleneck of 25 in table 3, GPS 4.8
connections there, LoRA rank 20 in table 2, and VPT-deep 61 prompts in table 2 and 73 in table 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from trpts_peft.families import find_family, num_prefix_tokens
from trpts_peft.head import find_head
from trpts_peft.methods import METHODS, Method

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

# ---- what goes into the model: each in the place of a module of the model, which it holds as `base` ----


class Bottleneck(nn.Module):
    """s · up(σ(down(x))), (..., width) -> (..., width): zero at the start, as `up` is zero."""

    def __init__(self, width: int, bottleneck: int, activation: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation, self.scale = activation, scale
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.activation(self.down(x)))


class Followed(nn.Module):
    """y + adapter(y) for y = base(x)."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.adapter(y)


class Beside(nn.Module):
    """base(x) + adapter(x)."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


class ScaleShift(nn.Module):
    """scale ⊙ base(x) + shift, one of each per channel: 1 and 0 at the start."""

    def __init__(self, base: nn.Linear | nn.LayerNorm | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        channels = (len(base.weight), 1, 1) if isinstance(base, nn.Conv2d) else (len(base.weight),)
        self.scale = nn.Parameter(base.weight.new_ones(channels))
        self.shift = nn.Parameter(base.weight.new_zeros(channels))

    @property
    def weight(self) -> Tensor:
        """The base's: transformers asks the patch projection for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale + self.shift


class PromptedEmbeddings(nn.Module):
    """The embeddings (B, S, D) of `base` with `prompts` (P, D) after the leading tokens: (B, S + P, D)."""

    def __init__(self, base: nn.Module, prompts: nn.Parameter, num_prefix_tokens: int) -> None:
        super().__init__()
        self.base, self.prompts, self.num_prefix_tokens = base, prompts, num_prefix_tokens

    @property
    def patch_embeddings(self) -> nn.Module:
        """The base's: transformers asks them for their dtype."""
        return self.base.patch_embeddings

    def forward(self, *args: Any, **options: Any) -> Tensor:
        hidden = self.base(*args, **options)
        return spliced(hidden, self.prompts, self.num_prefix_tokens, self.num_prefix_tokens)


class PromptedBlock(nn.Module):
    """The block `base` on (B, S, D), in which its `prompts` (P, D) replace those that the block before left."""

    def __init__(self, base: nn.Module, prompts: nn.Parameter, num_prefix_tokens: int) -> None:
        super().__init__()
        self.base, self.prompts, self.num_prefix_tokens = base, prompts, num_prefix_tokens

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        end = self.num_prefix_tokens + len(self.prompts)
        return self.base(spliced(hidden, self.prompts, self.num_prefix_tokens, end), *args, **options)


def spliced(hidden: Tensor, prompts: Tensor, start: int, end: int) -> Tensor:
    """`hidden` (B, S, D) with `prompts` (P, D) in the place of its tokens `start` to `end`."""
    return torch.cat([hidden[:, :start], prompts.expand(len(hidden), -1, -1), hidden[:, end:]], dim=1)


# ---- the methods ----


def adapter(base: PreTrainedModel, bottleneck: int = 8, after: Collection[str] = ("fc2",)) -> nn.Module:
    """Adapters: y + W_up GELU(W_down y) in place of the output y of a sublayer, before its residual.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, have one after the attention and one
    after the MLP: `after=("o_proj", "fc2")`. The default is the sequential form of Pfeiffer et al., "AdapterFusion",
    EACL 2021, after the MLP alone: as in the code of VPT, whose tables hand these numbers on. W_up starts at zero.

    Args:
        base: a ViT or DeiT with a head.
        bottleneck: rows of W_down.
        after: the linears of a block that an adapter follows.
    """
    _check_positive("bottleneck", bottleneck)
    if set(after) - set(LINEARS):
        raise ValueError(f"`after` must be names among {', '.join(LINEARS)}, got {after!r}.")

    def followed(linear: nn.Linear) -> nn.Module:
        return Followed(linear, Bottleneck(linear.out_features, bottleneck, nn.GELU()).to(linear.weight))

    return _replaced(_frozen(base), _named(after), followed)


def adaptformer(base: PreTrainedModel, bottleneck: int = 64, scale: float = 0.1) -> nn.Module:
    """AdaptFormer: x' + MLP(LN(x')) + s · W_up ReLU(W_down LN(x')) in place of x' + MLP(LN(x')).

    Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022.

    Args:
        base: a ViT or DeiT with a head.
        bottleneck: rows of W_down.
        scale: s.
    """
    _check_positive("bottleneck", bottleneck)

    def beside(mlp: nn.Module) -> nn.Module:
        return Beside(mlp, Bottleneck(mlp.fc1.in_features, bottleneck, nn.ReLU(), scale).to(mlp.fc1.weight))

    return _replaced(_frozen(base), _named(["mlp"]), beside)


def ssf(base: PreTrainedModel) -> nn.Module:
    """SSF: scale ⊙ x + shift for the output x of every linear, every LayerNorm and the patch embedding.

    Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022. They start
    at 1 and 0; the authors' code draws both around these, with a deviation of 0.02.

    Args:
        base: a ViT or DeiT with a head.
    """
    kinds, model = (nn.Linear, nn.LayerNorm, nn.Conv2d), _frozen(base)
    head = find_head(model, "default").name
    return _replaced(model, lambda name, module: isinstance(module, kinds) and name != head, ScaleShift)


def vpt_shallow(base: PreTrainedModel, num_prompts: int = 100) -> nn.Module:
    """VPT-shallow: the first block reads [CLS, P, patches], P trained, and P goes through all blocks.

    Jia et al., "Visual Prompt Tuning", ECCV 2022. The head reads CLS. No dropout on the prompts.

    Args:
        base: a ViT or DeiT with a head; a DeiT's distillation token stays before the prompts.
        num_prompts: rows of P.
    """
    return _prompted(base, num_prompts, deep=False)


def vpt_deep(base: PreTrainedModel, num_prompts: int = 50) -> nn.Module:
    """VPT-deep: block i reads [CLS, P_i, patches]; what becomes of P_i in it is dropped.

    Jia et al., "Visual Prompt Tuning", ECCV 2022. The head reads CLS. No dropout on the prompts.

    Args:
        base: a ViT or DeiT with a head; a DeiT's distillation token stays before the prompts.
        num_prompts: rows of each P_i.
    """
    return _prompted(base, num_prompts, deep=True)


def lora(base: PreTrainedModel, rank: int = 8, targets: Collection[str] = ("q_proj", "v_proj")) -> nn.Module:
    """LoRA: W + B A, B zero at the start, on queries and values (PEFT's implementation).

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. alpha = rank: B A is not scaled.

    Args:
        base: a model with a head.
        rank: rows of A.
        targets: the adapted linears; `LINEARS` are the six that TR-PTS trains.
    """
    return _by_peft(base, partial(LoraConfig, r=rank, lora_alpha=rank), targets)


def shira(base: PreTrainedModel, rank: int = 8, targets: Collection[str] = LINEARS, seed: int = 0) -> nn.Module:
    """SHiRA: W + S, S sparse with rank · (in + out) entries at random places (PEFT's implementation).

    Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024. With one seed, linears of one shape share their places.

    Args:
        base: a model with a head.
        rank: the rank of the LoRA with as many parameters.
        targets: the adapted linears.
        seed: of the places.
    """
    return _by_peft(base, partial(ShiraConfig, r=rank, random_seed=seed), targets)


def super_tuning(base: PreTrainedModel, sparsity: float = 0.99, targets: Collection[str] = LINEARS) -> nn.Module:
    """Super-Tuning: W + S, S sparse at the places where |W| is largest (PEFT's implementation; arXiv:2607.09287, 2026).

    Args:
        base: a model with a head.
        sparsity: share of the entries of each linear that stay as they are.
        targets: the adapted linears.
    """
    return _by_peft(base, partial(SupertuningConfig, sparsity=sparsity), targets)


def gps(base: PreTrainedModel, connections: int = 2, train_bias: bool = True) -> nn.Module:
    """GPS: every neuron trains its `connections` inputs of largest |mean gradient|; to be calibrated.

    Zhang et al., "Gradient-based Parameter Selection for Efficient Fine-Tuning", CVPR 2024. Ours: the loss is the
    cross-entropy under a linear probe in eval mode, where GPS takes a supervised contrastive loss on the features in
    train mode; the six linears of a block, where GPS also takes the patch embedding; and no LayerNorm's bias.

    Args:
        base: a ViT or DeiT with a head.
        connections: inputs per neuron. GPS tunes them per data set, from 1 (VTAB-1k) to 20.
        train_bias: whether the biases of these linears train.
    """
    options = {"min_connections": connections, "max_connections": connections, "train_bias": train_bias}
    return METHODS["trpts"].apply(base, {"importance": "gradient", "token_layers": 0, **options})


def _method(learning_rate: float, function: Callable[..., nn.Module]) -> Method:
    return Method(learning_rate, lambda base, options: function(base, **options))


# In the order of the tables. The rates are where a search starts, for Adam.
BASELINES = {
    "full": METHODS["full"],
    "linear": METHODS["linear"],
    "bitfit": METHODS["bitfit"],
    "adapter": _method(3e-3, adapter),
    "adaptformer": _method(3e-3, adaptformer),
    "lora": _method(3e-3, lora),
    "vpt-shallow": _method(1e-2, vpt_shallow),
    "vpt-deep": _method(1e-2, vpt_deep),
    "ssf": _method(3e-3, ssf),
    "gps": _method(1e-2, gps),
    "trpts": METHODS["trpts"],
    "shira": _method(1e-2, shira),
    "super-tuning": _method(1e-2, super_tuning),
}


def build(name: str, base: PreTrainedModel, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that trains under a method; GPS and TR-PTS are still to be calibrated.

    Args:
        name: of the method in `BASELINES`.
        base: a ViT or DeiT with a head. It is changed.
        options: of the method.

    Raises:
        ValueError: there is no such method, or an option is out of its range.
    """
    if name not in BASELINES:
        raise ValueError(f"`name` must be one of {', '.join(BASELINES)}, got {name!r}.")
    return BASELINES[name].apply(base, dict(options or {}))


# ---- how they go in ----


def _frozen(base: PreTrainedModel) -> PreTrainedModel:
    """The base with only its head training, to be saved under the names that its parameters have."""
    _check_family(base)
    # Trainer saves a ViT under the names of older releases and looks for today's when it resumes: it would find none.
    base._weight_conversions = []
    return METHODS["linear"].apply(base, {})


def _check_family(base: nn.Module) -> None:
    family = find_family(base)
    if family is None or family.model_type not in ("vit", "deit"):
        raise ValueError(f"`base` must be a ViT or DeiT of transformers, got {type(base).__name__}.")


def _named(kinds: Collection[str]) -> Callable[[str, nn.Module], bool]:
    kinds = set(kinds)
    return lambda name, _module: name.rpartition(".")[2] in kinds


def _replaced(
    model: PreTrainedModel, chosen: Callable[[str, nn.Module], bool], wrapper: Callable[[Any], nn.Module]
) -> nn.Module:
    """The model with `wrapper(module)` in the place of each chosen module."""
    for name, module in [(name, module) for name, module in model.named_modules() if chosen(name, module)]:
        model.set_submodule(name, wrapper(module))
    return model


def _prompted(base: PreTrainedModel, num_prompts: int, deep: bool) -> nn.Module:
    _check_positive("num_prompts", num_prompts)
    backbone = _frozen(base).base_model
    prefix = num_prefix_tokens(base)
    projection = backbone.embeddings.patch_embeddings.projection.weight
    bound = math.sqrt(6 / (projection[0].numel() + len(projection)))  # Xavier's, for patches -> width

    def prompts() -> nn.Parameter:
        return nn.Parameter(projection.new_empty(num_prompts, len(projection)).uniform_(-bound, bound))

    backbone.embeddings = PromptedEmbeddings(backbone.embeddings, prompts(), prefix)
    for index, block in enumerate(backbone.layers):
        if deep and index > 0:
            backbone.layers[index] = PromptedBlock(block, prompts(), prefix)
    return base


def _by_peft(base: PreTrainedModel, config: Callable[..., Any], targets: Collection[str]) -> nn.Module:
    head = find_head(base, "default").name
    return get_peft_model(base, config(target_modules=list(targets), modules_to_save=[head]))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
