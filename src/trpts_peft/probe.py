"""The linear probe that gives the Fisher information a head to differentiate through."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LinearProbe", "fit_linear_probe"]

logger = logging.getLogger(__name__)

# Strengths of the L2 penalty to choose from, strongest first; relative to the mean loss, whatever the data's size.
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
TOLERANCE = 1e-7
FOLDS = 3
LEAST_GAIN = 0.01
_MAX_STEPS = 1000


@dataclass(frozen=True)
class LinearProbe:
    """A fitted head.

    Attributes:
        weight: float64 (num_labels, features).
        bias: float64 (num_labels,).
        strength: the L2 strength λ that was chosen.
        train_accuracy: on the data that the head was fitted on.
        held_out_accuracy: mean over the folds, each predicted by a head fitted on the others.
        held_out_loss: mean cross-entropy over the folds.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    train_accuracy: float
    held_out_accuracy: float
    held_out_loss: float

    def summary(self) -> str:
        """What training starts from, in one line."""
        held_out = "" if math.isnan(self.held_out_accuracy) else f", {100 * self.held_out_accuracy:.1f} % held out"
        return f"fitted head: accuracy {100 * self.train_accuracy:.1f} % on its data{held_out}"


def _fit(features: Tensor, labels: Tensor, strength: float, start: Tensor) -> Tensor:
    """Minimise mean cross-entropy + λ/2 ‖W‖² over W (features + 1, num_labels); a strictly convex problem."""
    weight = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight], max_iter=_MAX_STEPS, tolerance_grad=TOLERANCE, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight, labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    steepest = float(weight.grad.abs().max()) if weight.grad is not None else 0.0
    if steepest > 1e-3:
        logger.warning("The linear probe stopped at a gradient of %.1e: its features differ much in scale.", steepest)
    return weight.detach()


def _accuracy(features: Tensor, labels: Tensor, weight: Tensor) -> float:
    return float(((features @ weight).argmax(dim=1) == labels).double().mean())


def _folds(labels: Tensor) -> Tensor:
    """The fold of each sample, int64 (n,): the samples of each class take turns, in their order."""
    folds = torch.empty_like(labels)
    folds[labels.argsort(stable=True)] = torch.arange(len(labels), device=labels.device) % FOLDS
    return folds


def _held_out(features: Tensor, labels: Tensor, strength: float, starts: list[Tensor]) -> tuple[float, float]:
    """Mean held-out loss and accuracy over the folds; `starts` holds each fold's last solution."""
    losses, accuracies = [], []
    fold_of = _folds(labels)
    for fold in range(FOLDS):
        train, test = fold_of != fold, fold_of == fold
        starts[fold] = _fit(features[train], labels[train], strength, starts[fold])
        losses.append(float(F.cross_entropy(features[test] @ starts[fold], labels[test])))
        accuracies.append(_accuracy(features[test], labels[test], starts[fold]))
    return sum(losses) / FOLDS, sum(accuracies) / FOLDS


def fit_linear_probe(features: Tensor, labels: Tensor, num_labels: int, *, fit_bias: bool = True) -> LinearProbe:
    """Multinomial logistic regression of `labels` on `features`, L2-regularised, bias included.

    Minimises mean cross-entropy + λ/2 (‖W‖² + ‖b‖²) by L-BFGS in float64, until no entry of the gradient exceeds 1e-7
    (or after 1000 steps). λ is chosen among 1, 0.3, 0.1, …, 0.001 on three held-out folds, to which the samples of each
    class take turns: from strong to weak, as long as each step lowers the held-out loss by 0.01 at least. A head that
    fits its data perfectly would leave no gradient to measure. With fewer than six samples λ is 0.01.

    Args:
        features: (n, d), the inputs of the head.
        labels: int64 (n,), below `num_labels`.
        num_labels: rows of the head.
        fit_bias: whether the head has a bias; without, the one returned is zero.
    """
    features = features.double()
    features = torch.cat([features, features.new_full((len(features), 1), float(fit_bias))], dim=1)
    zero = features.new_zeros(features.shape[1], num_labels)
    strength, loss, accuracy = 1e-2, float("nan"), float("nan")
    if len(labels) >= 2 * FOLDS:
        starts, best = [zero] * FOLDS, float("inf")
        for candidate in STRENGTHS:
            loss_there, accuracy_there = _held_out(features, labels, candidate, starts)
            if not loss_there <= best - LEAST_GAIN:
                break
            best = loss_there
            strength, loss, accuracy = candidate, loss_there, accuracy_there
    weight = _fit(features, labels, strength, zero)
    return LinearProbe(
        weight=weight[:-1].t().contiguous(),
        bias=weight[-1].clone(),
        strength=strength,
        train_accuracy=_accuracy(features, labels, weight),
        held_out_accuracy=accuracy,
        held_out_loss=loss,
    )
