"""Measure how much the loss of the task depends on each weight (eqs. 1 and 2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .functional import squared_gradient_sum, tokens_with_gradient

__all__ = ["FisherCollector", "FisherScores", "LossFn", "eval_mode", "logits_of", "per_sample_cross_entropy"]

# Tokens without a gradient lie behind the last attention, where backward begins. Of its own linears two, keys and
# values, have gradients of all tokens; after one more it is as good as sure that all that follow have. To look costs a
# GPU a wait, not to look costs no exactness.
_FULL = 3

LossFn = Callable[[Any, Tensor], Tensor]


class FisherScores(Mapping[str, Tensor]):
    """Scores of the weights of a model's targeted linears.

    A mapping from the name of a linear in the base model to its scores, float32 (out_features, in_features).

    Attributes:
        num_samples: how many samples the scores are a mean over; 0 for scores that need no data.
    """

    def __init__(self, scores: Mapping[str, Tensor], num_samples: int) -> None:
        self._scores = {name: score.float() for name, score in scores.items()}
        self.num_samples = num_samples

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"FisherScores({len(self)} linears, num_samples={self.num_samples})"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores to a safetensors file."""
        # safetensors sorts the tensors by name; the order decides between equal scores.
        metadata = {"num_samples": str(self.num_samples), "order": json.dumps(list(self))}
        save_file({name: score.contiguous() for name, score in self.items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FisherScores:
        """Read what `save` has written.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            try:
                order, num_samples = json.loads(metadata["order"]), int(metadata["num_samples"])
                whole = sorted(order) == sorted(names)
            except (KeyError, TypeError, ValueError, RecursionError):
                whole = False
            scores = {name: file.get_tensor(name) for name in order} if whole else {}
            if not whole or not all(score.is_floating_point() for score in scores.values()):
                raise ValueError(f"`path` must be a file written by `FisherScores.save`, got {path!s}.")
            return cls(scores, num_samples)


def per_sample_cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, (B,), from a model's output with `logits` (B, num_labels)."""
    return F.cross_entropy(logits_of(outputs).float(), labels, reduction="none")


def logits_of(outputs: Any) -> Tensor:
    """The `logits` in what a model returns; a ValueError where there are none."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"`model` must return outputs with `logits`, got {type(outputs).__name__}: pass a `loss_fn`, and "
            '`labels="dataset"`.'
        )
    return logits


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; after, each of its modules is in its own again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class FisherCollector:
    """Adds up the scores of some linears while a model runs forward and backward.

    Args:
        linears: {name in the model that is watched: nn.Linear} to score; under a name may be a layer around the linear.
        score: `"fisher"` for Σ_b (∂L_b/∂W)², `"gradient"` for Σ_b ∂L_b/∂W.
        workspace_mb: bound in MiB on per-sample gradients held at a time.
        known_layout: every linear is known to see one sample after the other. Else the gradients of the first sample
            and of the others tell, in the first batch of several.

    Attributes:
        called: names of the linears that have been called.

    The sums are float64, 8 bytes for each weight that is scored: what they add up to then does not depend on how the
    samples were shared out among processes.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], score: str, workspace_mb: float, *, known_layout: bool = False
    ) -> None:
        self.linears = dict(linears)
        self.score = score
        self.workspace_mb = workspace_mb
        self.num_samples = 0
        self.sums = {
            name: torch.zeros(linear.weight.shape, dtype=torch.float64, device=_sums_device(linear.weight.device))
            for name, linear in self.linears.items()
        }
        self.called: set[str] = set()
        self._seen: set[str] = set()
        self._batch_size = 0  # of the pass that runs backward
        self._full = 0  # linears in it whose tokens all had a gradient
        self._known_layout = known_layout or score == "gradient"  # which is the same in any order
        self._receive: Callable[[str, Tensor, Tensor], None] = self._accumulate

    def add(self, loss: Tensor) -> None:
        """Run backward from the per-sample losses (B,) of the last forward pass."""
        self._batch_size = len(loss)
        self.num_samples += len(loss)
        if len(loss) and not loss.requires_grad:
            raise ValueError("`target_modules` must name linears that the model calls, got none of that kind.")
        if len(loss) > 1 and not self._known_layout:
            self._backward(loss[:1], partial(self._check_layout, slice(1, None)), retain_graph=True)
            self._backward(loss[1:], partial(self._check_layout, slice(0, 1)), retain_graph=True)
            self._known_layout = True
        if len(loss):
            self._full = 0
            self._backward(loss, self._accumulate)
        self._seen.clear()

    def _backward(
        self, loss: Tensor, receive: Callable[[str, Tensor, Tensor], None], retain_graph: bool = False
    ) -> None:
        self._receive = receive
        loss.sum().backward(retain_graph=retain_graph)

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Within, forward passes of `model` are watched; its parameters get no gradients. All is restored after."""
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in self.linears]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            with eval_mode(model), torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def watch(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if name in self._seen:
                raise ValueError(
                    f"`model` must call each targeted linear once per pass, got two calls of {name}: switch off "
                    "activation checkpointing that outlasts training mode, or do not target a linear that blocks share."
                )
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"`target_modules` must name linears that return a tensor, got {name}, which returns a "
                    f"{type(output).__name__}: leave it out, or list it in `exclude_modules`."
                )
            self._seen.add(name)
            self.called.add(name)
            if not output.requires_grad:  # nothing before is scored: the graph begins here; no leaf, as it may change
                output = output + output.new_zeros(()).requires_grad_()
            inputs, shape = _for_backward(args[0]), output.shape
            _unviewed(output).register_hook(lambda grad: self._receive(name, inputs(), grad.detach().reshape(shape)))
            return output

        return watch

    def _check_layout(self, others: slice, name: str, inputs: Tensor, grad: Tensor) -> None:
        """With B equal parts of all rows, one a sample, those of samples without a loss must have no gradient."""
        foreign = self._by_sample(name, grad)[others]
        if foreign.any() and foreign.isfinite().all():  # what is not finite is said of the scores
            self._refuse_layout(name, inputs)

    def _by_sample(self, name: str, rows: Tensor) -> Tensor:
        """(B, T, features); the windows of a sample, where there are any, follow one another: (B · windows, T, ...)."""
        if rows.shape[0] % self._batch_size:
            self._refuse_layout(name, rows)
        return rows.reshape(self._batch_size, -1, rows.shape[-1])

    def _refuse_layout(self, name: str, rows: Tensor) -> NoReturn:
        raise ValueError(
            f"`target_modules` must name linears that see one sample after the other, got {name} with rows "
            f"{tuple(rows.shape[:-1])} for {self._batch_size} samples: pass `batch_size=1`, or leave it out."
        )

    def _accumulate(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        x, g = inputs.float(), grad.float()
        with torch.autocast(x.device.type, enabled=False):  # 16 bits cannot hold the squares of gradients
            if self.score == "fisher":
                x, g = self._with_gradient(self._by_sample(name, x), self._by_sample(name, g))
                total = squared_gradient_sum(x, g, workspace_mb=self.workspace_mb)
            else:
                total = g.reshape(-1, g.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            self.sums[name] += total.to(self.sums[name].device)

    def _with_gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Without the tokens whose gradient is zero in all samples, as long as there may well be some."""
        if self._full == _FULL or g.shape[1] == 1:
            return x, g
        tokens = tokens_with_gradient(g)
        if tokens is None:
            self._full += 1
            return x, g
        return x[:, tokens], g[:, tokens]

    def result(self, add_up: Callable[[Tensor], Tensor]) -> FisherScores:
        """The mean over samples (its absolute value for `"gradient"`), float32 on the CPU; the sums are given up.

        Args:
            add_up: takes a tensor of this process to the sum over all processes.

        Raises:
            ValueError: there was no sample.
        """
        count = int(add_up(torch.tensor(self.num_samples, device=next(iter(self.sums.values())).device)))
        if count == 0:
            raise ValueError("`data` must hold at least one sample, got none.")
        scores = {}
        for name in list(self.sums):  # one by one: sums and scores together would need half as much again
            scores[name] = add_up(self.sums.pop(name)).div_(count).abs_().float().cpu()
        return FisherScores(scores, count)


def _sums_device(device: torch.device) -> torch.device:
    """Where sums in float64 lie: Apple's GPUs have no such numbers."""
    return torch.device("cpu") if device.type == "mps" else device


def _unviewed(output: Tensor) -> Tensor:
    """What holds the output's entries in their order: to write to a view in place takes away its hooks, not those."""
    base = output._base
    return base if base is not None and base.numel() == output.numel() and output.is_contiguous() else output


def _for_backward(inputs: Tensor) -> Callable[[], Tensor]:
    """Gives the tensor while backward runs; GELU's output is formed anew from its input, which its backward keeps."""
    node: Any = inputs.grad_fn
    unchanged = inputs._version == 0  # a hook may have written to it where autograd does not look
    if unchanged and node is not None and node.name() == "GeluBackward0":
        return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    kept = inputs.detach()
    return lambda: kept
