"""Accuracy against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from trpts_peft.metrics import ClassificationAccuracy, accuracy_of


def test_both_accuracies_are_those_counted_by_hand() -> None:
    rng = np.random.default_rng(0)
    references = rng.choice(4, 50, p=[0.7, 0.2, 0.1, 0.0])
    predictions = np.where(rng.random(50) < 0.6, references, rng.integers(0, 5, 50))
    result = ClassificationAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    shares = []
    for label in sorted(set(references.tolist())):
        rows = [p == r for p, r in zip(predictions.tolist(), references.tolist(), strict=True) if r == label]
        shares.append(sum(rows) / len(rows))
    assert np.isclose(result["accuracy"], 100 * sum(predictions == references) / 50)
    assert np.isclose(result["accuracy_per_class"], 100 * sum(shares) / len(shares))
    assert result["accuracy"] != result["accuracy_per_class"]


def test_logits_and_classes_are_scored_alike() -> None:
    logits, truth = np.array([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]]), np.array([0, 1, 1])
    found = [accuracy_of(EvalPrediction(given, truth)) for given in (logits, logits.argmax(-1))]
    assert found[0] == found[1] == {"accuracy": pytest.approx(200 / 3), "accuracy_per_class": pytest.approx(75)}
