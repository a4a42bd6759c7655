"""The linear probe against scikit-learn's logistic regression, and what the Fisher scores ask of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from trpts_peft import probe as probes
from trpts_peft.probe import STRENGTHS, fit_linear_probe


def clusters(count=90, features=8, classes=3, separation=0.5, seed=0):
    """Features of unit variance around class means, the classes in random order."""
    generator = torch.Generator().manual_seed(seed)
    means = separation * torch.randn(classes, features, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return means[labels] + torch.randn(count, features, generator=generator), labels


def loss_of(probe, features, labels):
    return float(F.cross_entropy(F.linear(features.double(), probe.weight, probe.bias), labels))


def test_the_gradient_vanishes_at_the_solution():
    features, labels = clusters()
    probe = fit_linear_probe(features, labels, 3)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = F.cross_entropy(F.linear(features.double(), weight, bias), labels)
    loss = loss + probe.strength / 2 * (weight.square().sum() + bias.square().sum())
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-6


def test_it_equals_scikit_learn_at_the_same_strength():
    features, labels = clusters()
    probe = fit_linear_probe(features, labels, 3)
    extended = torch.cat([features.double(), torch.ones(len(features), 1)], dim=1).numpy()
    regression = LogisticRegression(C=1 / (len(labels) * probe.strength), fit_intercept=False, tol=1e-10, max_iter=9999)
    coefficients = torch.from_numpy(regression.fit(extended, labels.numpy()).coef_)
    torch.testing.assert_close(
        torch.cat([probe.weight, probe.bias[:, None]], dim=1), coefficients, rtol=1e-4, atol=1e-5
    )


def test_it_is_in_float64_and_of_the_heads_shape():
    features, labels = clusters(features=8)
    probe = fit_linear_probe(features.half(), labels, 5)
    assert probe.weight.shape == (5, 8)
    assert probe.bias.shape == (5,)
    assert probe.weight.dtype == probe.bias.dtype == torch.float64


def test_it_does_not_depend_on_the_order_of_the_samples(monkeypatch):
    monkeypatch.setattr(probes, "STRENGTHS", (0.01,))  # folds, and so the strength, do depend on it
    features, labels = clusters()
    probe = fit_linear_probe(features, labels, 3)
    for _ in range(3):
        order = torch.randperm(90)
        other = fit_linear_probe(features[order], labels[order], 3)
        torch.testing.assert_close(other.weight, probe.weight, rtol=1e-4, atol=1e-5)


def test_it_is_the_same_each_time():
    features, labels = clusters()
    first, second = fit_linear_probe(features, labels, 3), fit_linear_probe(features, labels, 3)
    assert torch.equal(first.weight, second.weight)


def test_it_leaves_gradients_and_random_numbers_alone():
    features, labels = clusters()
    features.requires_grad_()
    state = torch.get_rng_state()
    with torch.no_grad():
        probe = fit_linear_probe(features.detach(), labels, 3)
    assert not probe.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_fitted_where_the_features_lie():
    features, labels = clusters()
    with torch.device("meta"):  # the default device
        probe = fit_linear_probe(features, labels, 3)
    assert torch.equal(probe.weight, fit_linear_probe(features, labels, 3).weight)


def test_train_accuracy_is_counted():
    features, labels = clusters()
    probe = fit_linear_probe(features, labels, 3)
    predicted = F.linear(features.double(), probe.weight, probe.bias).argmax(dim=1)
    assert probe.train_accuracy == pytest.approx(sum(map(int, predicted == labels)) / 90)


@pytest.mark.parametrize("features", [8, 64])
@pytest.mark.parametrize("separation", [1.0, 3.0])
def test_separable_features_leave_errors_to_measure(features, separation):
    x, labels = clusters(count=120, features=features, separation=separation)
    probe = fit_linear_probe(x, labels, 3)
    assert probe.train_accuracy > 0.9
    assert loss_of(probe, x, labels) > 1e-4


def test_features_that_say_nothing_get_a_strong_penalty():
    features, labels = clusters(separation=0.0)
    probe = fit_linear_probe(features, labels, 3)
    assert probe.strength >= 0.1
    assert probe.strength in STRENGTHS
    assert probe.held_out_accuracy < 0.6 < 1.2 * probe.held_out_loss


def test_features_that_say_much_get_a_weaker_penalty():
    features, labels = clusters(separation=1.0, count=300)
    probe = fit_linear_probe(features, labels, 3)
    assert probe.strength < 1
    assert probe.held_out_accuracy > 0.8


@pytest.mark.parametrize("classes", [3, 6])
def test_labels_in_turn_do_not_empty_a_fold_of_a_class(classes):
    labels = torch.arange(90) % classes
    features = 3.0 * torch.eye(classes)[labels] + torch.randn(90, classes)
    assert fit_linear_probe(features, labels, classes).held_out_accuracy > 0.8


def test_sorted_labels_do_not_empty_a_fold_of_a_class():
    features, labels = clusters(separation=2.0)
    order = labels.argsort(stable=True)
    assert fit_linear_probe(features[order], labels[order], 3).held_out_accuracy > 0.8


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_samples_is_fitted(count):
    features, labels = clusters(count=count)
    probe = fit_linear_probe(features, labels, 3)
    assert probe.weight.isfinite().all()
    assert loss_of(probe, features, labels) < 1.1


def test_a_class_without_samples_is_least_likely(monkeypatch):
    monkeypatch.setattr(probes, "STRENGTHS", (0.1, 0.01))
    features, labels = clusters(separation=0.0)
    probe = fit_linear_probe(features, labels % 2, 3)
    logits = F.linear(features.double(), probe.weight, probe.bias)
    assert not (logits.argmax(dim=1) == 2).any()


@pytest.mark.parametrize("each", [1, 2])
def test_one_or_two_samples_a_class_still_leave_errors(each):
    labels = torch.arange(12).repeat(each)
    probe = fit_linear_probe(torch.eye(12)[labels] * 5, labels, 12)
    assert probe.strength > min(STRENGTHS) and probe.held_out_loss == probe.held_out_loss


def test_a_head_without_bias_is_fitted_without():
    features, labels = clusters()
    probe = fit_linear_probe(features + 1, labels, 3, fit_bias=False)
    weight = probe.weight.clone().requires_grad_()
    loss = F.cross_entropy(features.double().add(1) @ weight.t(), labels)
    (loss + probe.strength / 2 * weight.square().sum()).backward()
    assert not probe.bias.any() and float(weight.grad.abs().max()) < 1e-6
