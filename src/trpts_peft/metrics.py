"""Accuracy and mean accuracy per class, as a metric of `evaluate` that needs no download."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

__all__ = ["ClassificationAccuracy", "accuracy_of"]


class ClassificationAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of samples predicted right, and the mean of that share over the classes that occur.

    `compute(predictions=..., references=...)`, each int (n,), returns {"accuracy": ..., "accuracy_per_class": ...}, in
    percent. The second is the one to read where classes are of unequal size.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy over all samples, and averaged over classes.",
            citation="",
            inputs_description="predictions, references: class indices.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        truth = np.asarray(references)
        right = np.asarray(predictions) == truth
        per_class = [right[truth == label].mean() for label in np.unique(truth)]
        return {"accuracy": 100 * float(right.mean()), "accuracy_per_class": 100 * float(np.mean(per_class))}


def accuracy_of(evaluated: EvalPrediction) -> dict[str, float]:
    """Both accuracies in percent, as Trainer's `compute_metrics`; of logits (n, classes) or of classes (n,)."""
    predictions, metric = np.asarray(evaluated.predictions), ClassificationAccuracy(keep_in_memory=True)
    classes = predictions.argmax(-1) if predictions.ndim > 1 else predictions
    found: dict[str, float] = metric.compute(predictions=classes, references=evaluated.label_ids)
    return found
