"""The scores of a small ViT against one backward pass per image."""

from __future__ import annotations

import copy
import functools
import re
import types

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig, SwinForImageClassification

from conftest import FAMILIES, build_vit
from trpts_peft import FisherScores, TRPTSConfig, estimate_fisher, fisher
from trpts_peft.fisher import FisherCollector, _sums_device, eval_mode, per_sample_cross_entropy

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


def linears_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in TARGETS}


def build_swin():
    """Four windows an image in its first stage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2]}
        config = SwinConfig(**sizes, num_heads=[2, 2], num_labels=3, initializer_range=0.16)
        return SwinForImageClassification(config).eval()


def gradients_one_by_one(model, data):
    """For each image, {linear: ∂L/∂W} by plain autograd."""
    linears = linears_of(model)
    weights = [linear.weight for linear in linears.values()]
    for sample in data:
        loss = F.cross_entropy(model(sample["pixel_values"][None]).logits, sample["labels"][None])
        yield dict(zip(linears, torch.autograd.grad(loss, weights), strict=True))


def naive_fisher(model, data, square=True):
    total = {name: torch.zeros_like(linear.weight) for name, linear in linears_of(model).items()}
    for gradients in gradients_one_by_one(model, data):
        for name, gradient in gradients.items():
            total[name] += gradient**2 if square else gradient
    return {name: (t / len(data)).abs().detach() for name, t in total.items()}


def assert_scores(scores, expected, rtol=1e-4):
    assert set(scores) == set(expected)
    for name, score in scores.items():
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, expected[name], rtol=rtol, atol=1e-5 * float(expected[name].max()))
        assert (score - expected[name]).norm() <= rtol * expected[name].norm()


def estimate(model, data, **options):
    return estimate_fisher(model, data, **{"batch_size": 4, "progress": False, **options})


# ---- the measurement ----


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_equals_a_batch_of_one_loop(tiny_vit, labelled_images, family):
    model, data = tiny_vit(family), labelled_images(7)
    assert_scores(estimate(model, data), naive_fisher(model, data))


def test_the_collector_equals_a_batch_of_one_loop(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(5)
    collector = FisherCollector(linears_of(model), "fisher", 256)
    with collector.collecting(model):
        batch = data.batch()
        collector.add(per_sample_cross_entropy(model(batch["pixel_values"]), batch["labels"]))
    assert collector.num_samples == 5
    assert_scores(collector.result(lambda total: total), naive_fisher(model, data))


class Chain(nn.Module):
    """`depth` linears, one after the other on each token, and a gradient at some tokens only."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))

    def losses(self, x, tokens):
        return self.layers(x)[:, tokens].square().sum((1, 2))


@pytest.mark.parametrize("tokens", [[0], [3], [0, 2], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("samples", [[0, 1, 2], [1]])
def test_scores_where_only_some_tokens_have_a_gradient(tokens, samples):
    model, x = Chain(5), torch.randn(3, 5, 4)
    collector = FisherCollector(linears := dict(model.layers.named_children()), "fisher", 256, known_layout=True)
    chosen = torch.zeros(3).index_fill(0, torch.tensor(samples), 1)
    with collector.collecting(model.layers):
        collector.add(model.losses(x, tokens) * chosen)
    scores = collector.result(lambda total: total)
    expected = {name: torch.zeros(4, 4) for name in linears}
    for sample in samples:
        weights = [linear.weight for linear in linears.values()]
        gradients = torch.autograd.grad(model.losses(x[sample : sample + 1], tokens).sum(), weights)
        for name, gradient in zip(linears, gradients, strict=True):
            expected[name] += gradient**2 / 3
    assert_scores(scores, expected)


def test_behind_the_last_attention_only_the_class_token_is_multiplied(tiny_vit, labelled_images, monkeypatch):
    tokens, squares = [], fisher.squared_gradient_sum
    monkeypatch.setattr(
        fisher, "squared_gradient_sum", lambda x, g, **kw: tokens.append(x.shape[1]) or squares(x, g, **kw)
    )
    estimate(tiny_vit("vit"), labelled_images(4))
    assert sorted(tokens[:6]) == [1, 1, 1, 1, 65, 65]
    assert set(tokens[6:]) == {65}


@pytest.mark.parametrize("blocks", [2, 4])
def test_tokens_without_a_gradient_are_looked_for_until_three_linears_have_none(labelled_images, monkeypatch, blocks):
    asked, look = [], fisher.tokens_with_gradient
    monkeypatch.setattr(fisher, "tokens_with_gradient", lambda grad: asked.append(1) or look(grad))
    estimate(build_vit(num_hidden_layers=blocks), labelled_images(8))
    assert len(asked) == 2 * 7  # batches, linears of a block and one more


def test_where_there_is_one_token_none_is_looked_for(monkeypatch):
    monkeypatch.setattr(fisher, "tokens_with_gradient", lambda grad: pytest.fail("asked"))
    model = Chain(2)
    collector = FisherCollector(dict(model.layers.named_children()), "fisher", 256, known_layout=True)
    with collector.collecting(model.layers):
        collector.add(model.layers(torch.randn(3, 4)).square().sum(1))
    assert all(bool(score.any()) for score in collector.result(lambda total: total).values())


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7}, {"workspace_mb": 1e-3}])
def test_scores_do_not_depend_on_batches_or_workspace(tiny_vit, labelled_images, options):
    model, data = tiny_vit(), labelled_images(7)
    assert_scores(estimate(model, data, **options), dict(estimate(model, data)), rtol=1e-5)


def test_the_next_batch_finds_nothing_of_the_last_one(tiny_vit, labelled_images):
    vit, inputs = tiny_vit(), []

    def watch(module, arguments):
        assert all(storage.expired() for storage in inputs)

    def note(module, arguments):
        inputs.append(StorageWeakRef(arguments[0].untyped_storage()))

    handles = [vit.register_forward_pre_hook(watch)]
    handles += [block.mlp.fc1.register_forward_pre_hook(note) for block in vit.vit.layers]
    estimate(vit, labelled_images(8))
    for handle in handles:
        handle.remove()
    assert len(inputs) > len(vit.vit.layers)  # of more than one batch


def test_gradient_scores_are_the_size_of_the_mean_gradient(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(6)
    assert_scores(estimate(model, data, score="gradient"), naive_fisher(model, data, square=False))


def test_a_loss_of_ones_own_is_used(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(4)
    doubled = estimate(model, data, loss_fn=lambda out, y: 2 * F.cross_entropy(out.logits, y, reduction="none"))
    assert_scores(doubled, {name: 4 * score for name, score in naive_fisher(model, data).items()})


def test_a_loss_of_ones_own_gets_the_labels_as_they_are(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(4)
    soft = [{"pixel_values": row["pixel_values"], "labels": torch.eye(3)[row["labels"]] * 0.5} for row in data]
    scores = estimate(model, soft, loss_fn=lambda out, y: F.cross_entropy(out.logits, 2 * y, reduction="none"))
    assert_scores(scores, naive_fisher(model, data))


def test_labels_that_count_no_classes_are_refused(tiny_vit, labelled_images):
    rows = [{**row, "labels": torch.tensor(0.7)} for row in labelled_images(2)]
    with pytest.raises(ValueError, match=r"`labels` must be one whole number per sample.*got torch.float32.*`loss_fn`"):
        estimate(tiny_vit(), rows)


@pytest.mark.parametrize("lies, sums", [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_sums_lie_where_there_is_float64(lies, sums):
    assert _sums_device(torch.device(lies)) == torch.device(sums)


def test_labels_may_be_drawn_from_the_prediction(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(6)
    first, second = (estimate(model, data, labels="model") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    true = estimate(model, data)
    assert not all(torch.allclose(first[name], true[name]) for name in first)


def test_a_share_of_the_samples_is_drawn_from_the_data(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(9)
    scores = estimate(model, data, num_samples=3)
    assert scores.num_samples == 3
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:3].sort().values.tolist()
    assert_scores(scores, naive_fisher(model, [data[i] for i in drawn]))


def test_targets_may_be_named(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(3)
    scores = estimate(model, data, target_modules=["fc1"])
    assert list(scores) == [f"vit.layers.{b}.mlp.fc1" for b in range(4)]
    expected = naive_fisher(model, data)
    assert_scores(scores, {name: expected[name] for name in scores})


def test_an_adapter_has_no_part_in_the_scores(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(5)
    expected = naive_fisher(copy.deepcopy(model), data)
    adapted = get_peft_model(model, TRPTSConfig(init_weights=False, token_layers=[1, 2], keep_rate=0.5))
    assert_scores(estimate(adapted, data), expected)


def test_dropout_is_off(tiny_vit, labelled_images):
    data = labelled_images(4)
    model = tiny_vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    assert_scores(estimate(model, data), naive_fisher(copy.deepcopy(model).eval(), data))
    assert model.training


def test_the_model_is_left_as_it_was(tiny_vit, labelled_images):
    model = tiny_vit().train()
    model.vit.layers[1].eval()
    model.vit.layers[2].requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    estimate(model, labelled_images(3))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_model_is_left_as_it_was_after_an_error(tiny_vit, labelled_images):
    model = tiny_vit().train()
    with pytest.raises(ZeroDivisionError):
        estimate(model, labelled_images(3), loss_fn=lambda *_: 1 / 0)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_it_runs_within_no_grad(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(3)
    with torch.no_grad():
        scores = estimate(model, data)
    assert_scores(scores, naive_fisher(model, data))


def test_half_precision_models_are_scored(tiny_vit, labelled_images):
    model, data = tiny_vit(), labelled_images(4)
    expected = naive_fisher(model, data)
    data.pixel_values = data.pixel_values.to(torch.bfloat16)
    scores = estimate(model.to(torch.bfloat16), data)
    name = "vit.layers.2.mlp.fc1"
    assert scores[name].dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores[name].flatten(), expected[name].flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("score", ["fisher", "gradient"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_small_gradients_survive_autocast(score, tokens):
    x, grad, layer = torch.randn(4, tokens, 6), 1e-4 * torch.randn(4, tokens, 5), nn.Linear(6, 5)
    collector = FisherCollector({"0": layer}, score, 256)
    collector._batch_size = 4
    with torch.autocast("cpu", torch.float16):
        collector._accumulate("0", x, grad)
    gradients = torch.einsum("bto,bti->boi", grad.double(), x.double())
    expected = gradients.square().sum(0) if score == "fisher" else gradients.sum(0)
    torch.testing.assert_close(collector.sums["0"], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_gelu_gives_is_not_kept_but_formed_anew(approximate):
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(approximate), nn.Linear(4, 3))
    given, x = [], torch.randn(6, 5)
    model[1].register_forward_hook(
        lambda *args: given.extend([StorageWeakRef(args[2].untyped_storage()), args[2].clone()])
    )
    collector = FisherCollector({"0": model[0], "2": model[2]}, "gradient", 256)
    with collector.collecting(model):
        loss = per_sample_cross_entropy(types.SimpleNamespace(logits=model(x)), torch.arange(6) % 3)
        assert given[0].expired()
        collector.add(loss)
    grad = (given[1] @ model[2].weight.t() + model[2].bias).softmax(-1) - F.one_hot(torch.arange(6) % 3)
    torch.testing.assert_close(collector.sums["2"].float(), grad.t() @ given[1])


def test_what_gelu_gives_is_kept_where_it_was_changed_since():
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))

    @torch.no_grad()
    def steer(_module, _args, output):
        output.mul_(2)

    handle, x = model[1].register_forward_hook(steer), torch.randn(6, 5)
    collector = FisherCollector({"0": model[0], "2": model[2]}, "gradient", 256)
    with collector.collecting(model):
        collector.add(per_sample_cross_entropy(types.SimpleNamespace(logits=model(x)), torch.arange(6) % 3))
    handle.remove()
    given = 2 * model[:2](x)
    grad = model[2](given).softmax(-1) - F.one_hot(torch.arange(6) % 3)
    torch.testing.assert_close(collector.sums["2"].float(), (grad.t() @ given).detach())


def test_inputs_without_a_token_axis_are_samples():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    collector = FisherCollector({"0": model[0]}, "fisher", 256)
    with collector.collecting(model):
        collector.add(per_sample_cross_entropy(types.SimpleNamespace(logits=model(x)), torch.arange(6) % 3))
    expected = torch.zeros(4, 5)
    for i in range(6):
        loss = F.cross_entropy(model(x[i : i + 1]), torch.tensor([i % 3]))
        expected += torch.autograd.grad(loss, model[0].weight)[0] ** 2
    torch.testing.assert_close(collector.sums["0"].float(), expected, rtol=1e-4, atol=1e-9)


def test_the_windows_of_a_sample_belong_together(labelled_images):
    model, data = build_swin(), labelled_images(5)
    expected = naive_fisher(model, data)
    assert_scores(estimate(model, data, target_modules=list(TARGETS)), expected)


class TimeFirst(nn.Module):
    """Sees (B, T, C), and its linear (T, B, C)."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return types.SimpleNamespace(logits=self.head(self.body(x.transpose(0, 1)).tanh().mean(0)))


class Shared(nn.Module):
    """Adds the same to all samples, computed in as many rows as there are samples."""

    def __init__(self, rows):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(5, 3)
        self.register_buffer("rows", torch.randn(rows, 5))

    def forward(self, x):
        return types.SimpleNamespace(logits=self.head(x.mean(1)) + self.body(self.rows).mean(0)[:3])


class Padded(nn.Module):
    """Adds a row to the batch."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        rows = torch.cat([x.mean(1), torch.ones(1, 5)])
        return types.SimpleNamespace(logits=self.head(self.body(rows)[:-1].tanh()))


class Siamese(nn.Module):
    """Shows a ViT two crops of each image: first the left ones of all, then the right ones."""

    main_input_name = "pixel_values"

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values):
        logits = self.vit(torch.cat([pixel_values, pixel_values.flip(-1)])).logits
        left, right = logits.chunk(2)
        return types.SimpleNamespace(logits=left + 2 * right)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_around_a_supported_vit_is_looked_at(tiny_vit, labelled_images, family):
    model, data = Siamese(tiny_vit(family)), labelled_images(3)
    with pytest.raises(ValueError, match="must name linears that see one sample after the other"):
        estimate(model, data, target_modules=list(TARGETS))
    assert_scores(estimate(model, data, target_modules=list(TARGETS), batch_size=1), naive_fisher(model, data))


class Routed(nn.Module):
    """An expert for those rows of all samples that have a positive number in front."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        chosen, y = x[..., 0] > 0, torch.zeros(*x.shape[:-1], 6)
        y[chosen] = self.body(x[chosen])
        return types.SimpleNamespace(logits=self.head(y.tanh().mean(1)))


@pytest.mark.parametrize(
    "model, rows, routed",
    [
        (TimeFirst(), (4, 4), [4, 4, 4, 4]),
        (Shared(4), (4,), [4, 4, 4, 4]),
        (Shared(1), (1,), [4, 4, 4, 4]),
        (Padded(), (5,), [4, 4, 4, 4]),
        (Routed(), (4,), [0, 2, 1, 1]),
        (Routed(), (4,), [4, 0, 0, 0]),
        (Routed(), (5,), [0, 2, 2, 1]),
    ],
)
def test_linears_that_do_not_see_one_sample_after_the_other_are_refused(model, rows, routed):
    model.main_input_name = "x"
    data = [{"x": torch.randn(4, 5), "labels": torch.tensor(i % 3)} for i in range(4)]
    for row, count in zip(data, routed, strict=True):
        row["x"][:, 0] = torch.where(torch.arange(4) < count, 1.0, -1.0)
    with pytest.raises(
        ValueError, match=f"got body with rows {re.escape(str(rows))} for 4 samples: pass `batch_size=1`"
    ):
        estimate(model, data, target_modules=["body"])
    expected = torch.zeros_like(model.body.weight)
    for row in data:
        loss = F.cross_entropy(model(row["x"][None]).logits, row["labels"][None])
        expected += torch.autograd.grad(loss, model.body.weight)[0] ** 2 / len(data)
    assert_scores(estimate(model, data, target_modules=["body"], batch_size=1), {"body": expected})


def test_weights_that_are_no_numbers_are_not_taken_for_an_order():
    model = Padded()
    model.main_input_name = "x"
    nn.init.constant_(model.head.weight, float("nan"))
    data = [{"x": torch.randn(4, 5), "labels": torch.tensor(i % 3)} for i in range(4)]
    with pytest.raises(ValueError, match="must have finite gradients, got others in head"):
        estimate(model, data, target_modules=["head"])


def test_mean_gradients_ask_for_no_order():
    torch.manual_seed(0)
    model, data = TimeFirst(), [{"x": torch.randn(4, 5), "labels": torch.tensor(i % 3)} for i in range(6)]
    model.main_input_name = "x"
    first, second = (estimate(model, data, score="gradient", target_modules=["body"], batch_size=n) for n in (1, 4))
    assert_scores(second, dict(first))


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_written_to(bias):
    class Masked(nn.Module):
        main_input_name = "x"

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3, bias=bias)

        def forward(self, x):
            y = self.second(self.first(x).tanh())
            y[:, -1] = 0
            return types.SimpleNamespace(logits=y.mul_(2).mean(1))

    model, data = Masked(), [{"x": torch.randn(4, 5), "labels": torch.tensor(i % 3)} for i in range(5)]
    scores = estimate(model, data, target_modules=["first", "second"])
    for name in scores:
        expected = torch.zeros_like(scores[name])
        for row in data:
            loss = F.cross_entropy(model(row["x"][None]).logits, row["labels"][None])
            expected += torch.autograd.grad(loss, model.get_submodule(name).weight)[0] ** 2 / len(data)
        torch.testing.assert_close(scores[name], expected)


def test_linears_that_return_no_tensor_are_refused():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    router = nn.Sequential(Router(3, 3))
    collector = FisherCollector({"0": router[0]}, "fisher", 256)
    with collector.collecting(router), pytest.raises(ValueError, match="got 0, which returns a tuple"):
        router(torch.randn(2, 3))


def test_a_batch_without_samples_adds_nothing():
    model = nn.Sequential(nn.Linear(5, 3))
    collector = FisherCollector({"0": model[0]}, "fisher", 256)
    with collector.collecting(model):
        for count in (0, 2):
            outputs = types.SimpleNamespace(logits=model(torch.ones(count, 5)))
            collector.add(per_sample_cross_entropy(outputs, torch.zeros(count, dtype=torch.int64)))
    assert collector.num_samples == 2
    assert collector.sums["0"].isfinite().all()


def test_the_first_output_may_be_overwritten():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), torch.randn(1, 5)
    collector = FisherCollector({"0": model[0]}, "gradient", 256)
    with collector.collecting(model):
        collector.add(per_sample_cross_entropy(types.SimpleNamespace(logits=model(x)), torch.tensor([1])))
    F.cross_entropy(model(x), torch.tensor([1])).backward()
    torch.testing.assert_close(collector.sums["0"].float(), model[0].weight.grad)


def test_sums_are_given_up_one_by_one(tiny_vit, labelled_images):
    model, batch = tiny_vit(), labelled_images(3).batch()
    collector = FisherCollector(linears_of(model), "fisher", 256)
    with collector.collecting(model):
        collector.add(per_sample_cross_entropy(model(batch["pixel_values"]), batch["labels"]))
    left = []
    scores = collector.result(lambda total: left.append(len(collector.sums)) or 2 * total)
    assert left == [24, *range(23, -1, -1)]  # the count first
    assert scores.num_samples == 6


def test_checkpointing_that_goes_on_in_evaluation_is_refused(tiny_vit, labelled_images):
    model = tiny_vit()
    block = model.vit.layers[1]
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    with pytest.raises(ValueError, match="switch off activation checkpointing"):
        estimate(model, labelled_images(2))


def test_a_linear_that_is_called_twice_is_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    collector = FisherCollector({"0": model[0]}, "fisher", 256)
    with collector.collecting(model), pytest.raises(ValueError, match=r"once per .*pass, got two calls of 0"):
        model(model(torch.randn(2, 3)))


def test_losses_are_per_sample():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    losses = per_sample_cross_entropy(types.SimpleNamespace(logits=logits), labels)
    for loss, row, label in zip(losses, logits, labels, strict=True):
        assert float(loss) == pytest.approx(-float(row.log_softmax(0)[label]), rel=1e-5)


# ---- refusals ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score": "hessian"}, r"`score` must be one of 'fisher', 'gradient', got 'hessian'\."),
        ({"labels": "true"}, r"`labels` must be one of 'dataset', 'model', got 'true'\."),
        ({"num_samples": 0}, r"`num_samples` must be a whole number of at least 1, got 0\."),
        ({"batch_size": 0}, r"`batch_size` must be a whole number of at least 1, got 0\."),
        ({"target_modules": ["nothing"]}, r"`target_modules` must match at least one nn\.Linear .*'nothing'"),
        ({"loss_fn": lambda out, y: F.cross_entropy(out.logits, y)}, r"`loss_fn` must return one loss per sample"),
    ],
)
def test_bad_arguments_are_refused(tiny_vit, labelled_images, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(tiny_vit(), labelled_images(3), **options)


@pytest.mark.parametrize("labels", ["dataset", "model"])
def test_a_model_without_logits_is_told_of_a_loss(tiny_vit, labelled_images, labels):
    with pytest.raises(ValueError, match=r"`model` must return outputs with `logits`, got .*Pooling: pass a `loss_fn`"):
        estimate(tiny_vit().vit, labelled_images(3), labels=labels)


def test_no_labels_are_drawn_from_a_single_logit(tiny_vit, labelled_images):
    with pytest.raises(ValueError, match=r"`labels` must be 'dataset' .* got 'model' with logits of shape \(3, 1\)"):
        estimate(
            tiny_vit(num_labels=1), labelled_images(3), labels="model", loss_fn=lambda out, y: out.logits[:, 0] ** 2
        )


def test_labels_outside_the_head_are_refused(tiny_vit, labelled_images):
    with pytest.raises(ValueError, match=r"`labels` must be from 0 to 2, the labels of the head, got 0 to [34]"):
        estimate(tiny_vit(), labelled_images(5, num_labels=5))


def test_linears_that_are_read_without_a_call_are_named(caplog):
    class Net(nn.Module):
        main_input_name = "x"

        def __init__(self):
            super().__init__()
            self.attention, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return types.SimpleNamespace(logits=self.mlp(self.attention(x, x, x)[0]).mean(1))

    data = [{"x": torch.randn(4, 8), "labels": torch.tensor(i % 3)} for i in range(5)]
    estimate(Net(), data, target_modules=["mlp"])
    assert not caplog.records
    scores = estimate(Net(), data, target_modules=["out_proj", "mlp"])
    assert not scores["attention.out_proj"].any()
    assert "has not called 1 of the targeted linears, of which attention.out_proj is the first" in caplog.text
    with pytest.raises(ValueError, match="must name linears that the model calls, got none"):
        estimate(Net(), data, target_modules=["out_proj"])


def test_a_layer_that_the_model_reaches_by_another_way_is_named(caplog):
    class Listed(nn.Module):
        main_input_name = "x"

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
            self.steps = (self.a, self.b)

        def forward(self, x):
            return types.SimpleNamespace(logits=self.steps[1](self.a(x).tanh()))

    model = get_peft_model(Listed(), TRPTSConfig(target_modules=["a", "b"]))
    scores = estimate(model, [{"x": torch.randn(5), "labels": torch.tensor(i % 3)} for i in range(5)])
    assert scores["a"].any()
    assert not scores["b"].any()
    assert "of which b is the first" in caplog.text


def test_a_head_of_zeros_is_refused(tiny_vit, labelled_images):
    model = tiny_vit()
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match="got zero everywhere: its head is all zeros"):
        estimate(model, labelled_images(3))


def test_gradients_that_are_not_finite_are_refused(tiny_vit, labelled_images):
    data = labelled_images(3)
    data.pixel_values[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"`model` must have finite gradients, got others in vit\.layers"):
        estimate(tiny_vit(), data)


def test_a_model_outside_the_table_needs_its_targets_named():
    with pytest.raises(ValueError, match="`target_modules` must be given"):
        estimate(nn.Linear(3, 3), [{"x": torch.zeros(3), "labels": 0}])


# ---- FisherScores ----


def test_scores_are_a_mapping():
    scores = FisherScores({"b": torch.ones(2, 3), "a": torch.zeros(1, 2)}, 7)
    assert list(scores) == ["b", "a"]
    assert len(scores) == 2
    assert torch.equal(scores["b"], torch.ones(2, 3))
    assert repr(scores) == "FisherScores(2 linears, num_samples=7)"


def test_scores_are_saved_and_loaded_in_their_order(tmp_path):
    scores = FisherScores({"b": torch.rand(3, 2).t(), "a.x": torch.rand(1, 2)}, 7)
    scores.save(tmp_path / "scores.safetensors")
    loaded = FisherScores.load(tmp_path / "scores.safetensors")
    assert list(loaded) == ["b", "a.x"]
    assert loaded.num_samples == 7
    assert all(torch.equal(loaded[name], scores[name]) for name in scores)


@pytest.mark.parametrize(
    "metadata", [{"order": order} for order in ("null", "1", "[1]", '["a", "a"]', '["b"]', "[" * 100_000)] + [{}]
)
def test_scores_in_no_order_are_refused(tmp_path, metadata):
    save_file({"a": torch.zeros(1)}, tmp_path / "scores.safetensors", metadata={"num_samples": "1", **metadata})
    with pytest.raises(ValueError, match="`path` must be a file written by"):
        FisherScores.load(tmp_path / "scores.safetensors")


def test_scores_that_are_no_floats_are_refused(tmp_path):
    metadata = {"num_samples": "1", "order": '["a"]'}
    save_file({"a": torch.zeros(1, dtype=torch.int64)}, tmp_path / "scores.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="`path` must be a file written by"):
        FisherScores.load(tmp_path / "scores.safetensors")


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"`path` must be a file written by `FisherScores\.save`, got .*other"):
        FisherScores.load(tmp_path / "other.safetensors")


def test_modes_come_back_whatever_changed_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
        model.train()
    assert [module.training for module in model.modules()] == [True, True, False]
