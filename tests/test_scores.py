"""Scores for comparison, against what they say of themselves."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

from benchmarks.scores import batch_fisher, constant_parts, without_constant_parts
from tasks import Given, inputs_of
from trpts_peft import FisherScores


def test_batch_fisher_squares_the_gradient_of_each_batch(given: Given) -> None:
    """Batches are drawn: rows come sorted by class."""
    start = given.start()
    base, pixels = start.base().eval(), start.pixels
    scores, linear = batch_fisher(base, pixels, 8), base.vit.layers[1].attention.q_proj
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0)).tolist()
    expected = torch.zeros_like(linear.weight)
    for places in (order[:8], order[8:]):
        batch = default_collate([pixels[place] for place in places])
        assert len(set(batch["labels"].tolist())) > 1
        loss = F.cross_entropy(base(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        expected += torch.autograd.grad(loss, linear.weight)[0].square() / 2
    assert torch.allclose(scores["vit.layers.1.attention.q_proj"], expected, rtol=1e-4, atol=1e-10)
    assert set(scores) == set(start.scores("fisher", {}))


def test_constant_parts_over_batches_are_those_of_all_tokens_at_once(given: Given) -> None:
    start = given.start()
    base, names = start.base(), list(start.scores("fisher", {}))[:6]
    images = torch.stack([image["pixel_values"] for image in start.pixels])
    parts = constant_parts(base, names, [{"pixel_values": some} for some in images.split(4)])
    assert list(parts) == names
    for name, part in parts.items():
        x = inputs_of(base, name, start.pixels)
        torch.testing.assert_close(part, x.mean(0) ** 2 / (x**2).mean(0))
    assert not any(module._forward_hooks for module in base.modules())


def test_an_input_that_is_always_zero_is_constant(given: Given) -> None:
    base, images = given.start().base(), torch.zeros(2, 3, 32, 32)
    (name,) = [name for name in given.start().scores("fisher", {}) if name.endswith("0.attention.q_proj")]
    layer = base.get_submodule(name.rpartition(".attention")[0]).layernorm_before
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    assert constant_parts(base, [name], [{"pixel_values": images}])[name].eq(1).all()


def test_what_is_constant_counts_for_nothing() -> None:
    scores = FisherScores({"a": torch.tensor([[4.0, 8.0, 1.0, 1.0]])}, num_samples=3)
    found = without_constant_parts(scores, {"a": torch.tensor([0.0, 0.75, 1.0, 1 + 1e-15], dtype=torch.float64)})
    assert found["a"].tolist() == [[4.0, 2.0, 0.0, 0.0]] and found.num_samples == 3
