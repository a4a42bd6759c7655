"""What transformers' Trainer can log about an adapter while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .cost import geometry_of, tokens_per_block
from .families import count_vits, find_blocks
from .layer import TRPTSLinear
from .vit import keep_rates_in_force

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["TRPTSCallback"]


class TRPTSCallback(TrainerCallback):
    """Logs how far the sparse update has grown and how many tokens stay, whenever the Trainer logs its loss.

    Used as `trainer.add_callback(TRPTSCallback(trainer))`. What it logs goes through `trainer.log`, so all reporters
    and `trainer.state.log_history` get it, as an entry of its own in front of the loss:

    - `trpts_norm/block_<i>`: Frobenius norm of the update Δ (eq. 13) over all adapted linears of block i, in the units
      of the weights; 0 at the start of training. Bias updates do not count. Of several active adapters it is the norm
      of the sum of their updates.
    - `trpts_norm/other`: the same over adapted linears outside of any block, if there are some.
    - `trpts_tokens_kept/block_<i>`: for each block that selects, the image tokens that leave it, merged ones included,
      as a share of those of the dense model, in (0, 1], for images of the size in the model's config.

    The model is only looked at, and all norms reach the host in one transfer.

    Args:
        trainer: the Trainer that it is added to.

    Raises:
        ValueError: the Trainer's model has no active TR-PTS adapter.
    """

    def __init__(self, trainer: Trainer) -> None:
        model = trainer.model
        if model is None or not any(True for _ in _updates(model)):
            raise ValueError(
                f"`trainer` must train a model with an active TR-PTS adapter, got {type(model).__name__} without one: "
                "use `get_peft_model(model, TRPTSConfig(...))`, or `set_adapter`."
            )
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log where the Trainer is about to."""
        if control.should_log:
            self.trainer.log({**_norms(kwargs["model"]), **_tokens_kept(kwargs["model"])})
            control.should_log = True  # to log resets it, and the Trainer's own turn comes now
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log where the Trainer is about to, with `logging_strategy="epoch"`."""
        return self.on_step_end(args, state, control, **kwargs)


@torch.no_grad()
def _norms(model: nn.Module) -> dict[str, float]:
    """The norm of the update in force in each block, and outside of them."""
    blocks = {id(m): f"block_{i}" for i, (_, block) in enumerate(find_blocks(model)) for m in block.modules()}
    device = next(model.parameters()).device  # a model may be spread over several
    parts: dict[str, list[Tensor]] = {}
    for layer, update in _updates(model):
        norm = torch.linalg.vector_norm(update.float())
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device)
        parts.setdefault(f"trpts_norm/{blocks.get(id(layer), 'other')}", []).append(norm)
    norms = [torch.linalg.vector_norm(torch.stack(part)) for part in parts.values()]
    return dict(zip(parts, torch.stack(norms).tolist(), strict=True))


def _updates(model: nn.Module) -> Iterator[tuple[TRPTSLinear, Tensor]]:
    """The linears with an active adapter, each with its update: dense only where several have to be added up."""
    for layer in model.modules():
        if isinstance(layer, TRPTSLinear):
            names = [name for name in layer.active_adapters if name in layer.trpts_values]
            if len(names) == 1:
                yield layer, layer.trpts_values[names[0]]
            elif names:
                yield layer, torch.stack([layer.get_delta_weight(name) for name in names]).sum(dim=0)


def _tokens_kept(model: nn.Module) -> dict[str, float]:
    """The share of the image tokens that leave each block that selects, in a model that is one ViT."""
    rates = keep_rates_in_force(model)
    if not rates or count_vits(model) != 1:
        return {}
    geometry = geometry_of(model)
    counts = tokens_per_block(geometry, rates)
    return {f"trpts_tokens_kept/block_{i}": (counts[i] - geometry.prefix) / geometry.tokens for i in sorted(rates)}
