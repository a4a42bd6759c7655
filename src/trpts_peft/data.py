"""Batches of a labelled data set, shared out among processes."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import NoneType
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)
from accelerate.utils import broadcast, broadcast_object_list, is_compiled_module, parse_flag_from_env, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from tqdm.auto import tqdm
from transformers import default_data_collator

__all__ = [
    "Batches",
    "check_bare",
    "check_loading",
    "check_whole",
    "of_first_process",
    "process_state",
    "processes",
    "sum_of_processes",
]

logger = logging.getLogger(__name__)

Batch = dict[str, Any]  # tensors, and what else a collate function adds for the model

# How a DataLoader loads, which says nothing of what it yields.
_LOADING = (
    "num_workers",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
)


def processes(accelerator: Accelerator | None) -> tuple[int, int]:
    """(rank, number of processes) that share the work."""
    if accelerator is not None:
        return accelerator.process_index, accelerator.num_processes
    if torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        state = process_state()
        return state.process_index, state.num_processes
    return 0, 1


def process_state() -> PartialState:
    """This process among those of the present launch."""
    # Not told of CPUs it would take each process for the only one, and so would any Accelerator made later.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def sum_of_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the device of this one: NCCL takes nothing from a model still on the CPU."""
    total: Tensor = reduce(tensor.to(PartialState().device), "sum")
    return total


def of_first_process(tensor: Tensor) -> Tensor:
    """What the first process holds, on the device of this one."""
    first: Tensor = broadcast(tensor.to(PartialState().device))
    return first


def check_loading() -> None:
    """Refuse FSDP's way of loading in which only the first process holds weights and FSDP2 cannot shard buffers."""
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` must be false for TR-PTS, got true: every process needs the base weights "
            "to calibrate, and columns are buffers, which FSDP2 does not load this way. Set it in the file that "
            "`accelerate launch --config_file` reads, or in `fsdp_config`."
        )


def check_whole(model: nn.Module) -> None:
    """Refuse a model of whose parameters this process holds a part only, or perhaps none."""
    check_loading()
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "`model` must be whole in every process, got one whose parameters are sharded: calibrate, measure or merge "
            "before `Accelerator.prepare` and `Trainer.train`, or after loading the saved adapter anew."
        )


def check_bare(model: nn.Module) -> None:
    """Refuse what wraps a model: names within it, which a config and scores hold, are no names of the model."""
    if is_compiled_module(model) or isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(
            f"`model` must be the model itself, got {type(model).__name__} around it: calibrate or measure before "
            "`torch.compile`, `Accelerator.prepare` and DDP."
        )


_LABELS = ("labels", "label", "label_ids")  # what transformers' collate function takes for labels


def _labels_in(batch: Mapping[str, Any]) -> Any:
    return next((batch[key] for key in _LABELS if batch.get(key) is not None), None)


@dataclass(frozen=True)
class _Inputs:
    """What a model takes of a sample or a batch."""

    main: str
    accepted: frozenset[str]

    def check(self, batch: Mapping[str, Any]) -> None:
        missing = self.main if self.main not in batch else None
        if missing is None and not set(_LABELS) & set(batch):
            missing = "labels"
        if missing:
            raise ValueError(
                f"`data` must yield dicts with `{self.main}` and `labels`, got one without `{missing}`: "
                f"{sorted(map(str, batch))}. Apply the image processor first, as with `dataset.with_transform`."
            )

    def of(self, sample: Any) -> Any:
        """Only what the model takes: other columns, such as the image itself, cannot be stacked."""
        if not isinstance(sample, Mapping):
            self.refuse(sample)
        self.check(sample)
        if isinstance(labels := _labels_in(sample), (str, NoneType)):  # which the collate function passes over
            self.refuse_labels(labels)
        return {key: sample[key] for key in sample if key in self.accepted or key in _LABELS}

    def refuse(self, got: object) -> NoReturn:
        raise ValueError(
            f"`data` must yield dicts with `{self.main}` and `labels`, got {type(got).__name__}: make them in the data "
            "set, or in the `collate_fn` of a DataLoader."
        )

    def refuse_labels(self, got: object) -> NoReturn:
        raise ValueError(
            f"`labels` must be whole numbers, in batches a tensor of them, got {got!r}: number the classes in the data "
            "set, as with `dataset.class_encode_column`, and make a tensor of them."
        )

    def check_collated(self, batch: Mapping[str, Any]) -> None:
        self.check(batch)
        if not isinstance(labels := _labels_in(batch), Tensor):
            self.refuse_labels(labels)
        if not isinstance(batch[self.main], Tensor):
            raise ValueError(
                f"`data` must yield `{self.main}` as tensors, got {type(batch[self.main]).__name__}: pass the data set "
                'itself, or `dataset.with_format("torch")`.'
            )


@dataclass(frozen=True)
class _Collate:
    """The collate function of a DataLoader, behind a check where it is the default one; workers can unpickle it."""

    function: Callable[[list[Any]], Any]
    inputs: _Inputs

    def __call__(self, samples: list[Any]) -> Any:
        if self.function is default_data_collator:
            samples = [self.inputs.of(sample) for sample in samples]
        return self.function(samples)


class Batches:
    """The batches of a data set that this process works on, in a fixed order, without augmentation of its own.

    Batch k goes to process k modulo their number, so that a batch holds the same samples however many processes share
    the work, and every sample is seen once.

    Args:
        data: a map-style Dataset or a DataLoader, yielding dicts with the model's main input and `labels`. Of a
            DataLoader over a map-style data set, the data set, the collate function, its workers and a sampler that
            leaves samples out are used; its order, how often it repeats one, and which share it gives to this process
            are not. Other DataLoaders are iterated as they are.
        model: the model, for the inputs that it takes and its device.
        num_samples: how many samples to use, drawn with a fixed seed (the first ones of an iterable); None: all.
        batch_size: samples per batch; a DataLoader over an iterable keeps its own.
        rank, world: this process, and their number.

    Raises:
        ValueError: there is no sample, or a sample lacks the main input or `labels`.
        TypeError: `data` is neither a Dataset nor a DataLoader.
    """

    def __init__(
        self, data: Any, model: nn.Module, *, num_samples: int | None, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_samples", num_samples)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        main_input = getattr(model, "main_input_name", "pixel_values")
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if main_input not in parameters and not takes_any:
            raise ValueError(
                f"`model` must take `{main_input}`, got one that takes {list(parameters)}: set its "
                "`main_input_name` to the name of its first input."
            )
        self.inputs = _Inputs(main_input, frozenset({main_input, "labels", *parameters}))
        self.device = next(model.parameters()).device
        if rank == 0:
            _hint_at_accelerator(self.device)
        self.num_samples, self.batch_size, self.rank, self.world = num_samples, batch_size, rank, world
        self.stream = isinstance(data, DataLoader) and (
            isinstance(data.dataset, IterableDataset) or data.batch_sampler is None
        )
        if self.stream and world > 1 and _is_shared_out(data):
            raise ValueError(
                "`data` must be whole in every process, got a stream that `Accelerator.prepare` has shared out among "
                "them: pass the DataLoader that it was made from."
            )
        self.loader: Iterable[Any] = data if self.stream else self._loader(data)

    def _loader(self, data: Any) -> DataLoader[Any]:
        if isinstance(data, DataLoader):
            loading = {name: getattr(data, name) for name in _LOADING}
            return self._sampled(data.dataset, _indices(data, self.world), data.collate_fn, loading)
        if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, Mapping)):
            return self._sampled(data, range(len(data)), default_data_collator, {})
        raise TypeError(f"`data` must be a Dataset with a length or a DataLoader, got {type(data).__name__}.")

    def _sampled(
        self, dataset: Any, indices: Any, collate: Callable[[list[Any]], Any], loading: Mapping[str, Any]
    ) -> DataLoader[Any]:
        indices = list(indices)
        if not indices:
            raise ValueError("`data` must hold at least one sample, got none.")
        wanted = len(indices) if self.num_samples is None else min(self.num_samples, len(indices))
        # Drawn, not counted off in equal steps: labels that come in turn would fall into step with those.
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(indices), generator=generator, device="cpu")[:wanted]
        chosen = [indices[i] for i in sorted(drawn.tolist())]
        batches = [chosen[i : i + self.batch_size] for i in range(0, wanted, self.batch_size)]
        mine = batches[self.rank :: self.world]
        return DataLoader(dataset, batch_sampler=mine, collate_fn=_Collate(collate, self.inputs), **loading)

    def _shared_batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        left = self.num_samples
        for k, batch in enumerate(loader):
            if left is not None and isinstance(batch, Mapping):
                if left <= 0:
                    return
                of_samples = {key: value for key, value in batch.items() if isinstance(value, (Tensor, list, tuple))}
                size = max(map(len, of_samples.values()), default=0)
                batch = {**batch, **{key: value[:left] for key, value in of_samples.items()}}
                left -= size
            if k % self.world == self.rank:
                yield batch

    def iterate(self, description: str, progress: bool) -> Iterator[Batch]:
        """The batches as dicts of what the model takes, tensors on its device, and of `labels` (B,)."""
        loader = self._shared_batches(self.loader) if self.stream else self.loader
        bar = tqdm(loader, desc=description, disable=not progress or self.rank != 0, leave=False)
        for batch in bar:
            if not isinstance(batch, Mapping):
                self.inputs.refuse(batch)
            self.inputs.check_collated(batch)
            named = {k: v for k, v in batch.items() if k not in _LABELS} | {"labels": _labels_in(batch)}
            yield {
                key: value.to(self.device) if isinstance(value, Tensor) else value
                for key, value in named.items()
                if key in self.inputs.accepted
            }


def _is_shared_out(loader: DataLoader[Any]) -> bool:
    return isinstance(loader, DataLoaderDispatcher) or isinstance(loader.dataset, IterableDatasetShard)


def _hint_at_accelerator(device: torch.device) -> None:
    """Say that a model lies on the CPU beside a GPU: Trainer moves it there, but only once it trains."""
    if device.type != "cpu" or not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    better = str(torch.accelerator.current_accelerator())
    logger.warning("The model is on the CPU, so the data is gone over there: faster after `model.to(%r)`.", better)


def _indices(loader: DataLoader[Any], world: int) -> Iterable[int]:
    """Which samples of its data set a DataLoader stands for, order apart."""
    batches: Any = loader.batch_sampler
    while type(batches) in (BatchSamplerShard, SkipBatchSampler) or isinstance(_sampler_of(batches), BatchSampler):
        batches = getattr(batches, "batch_sampler", _sampler_of(batches))  # accelerate's, or a repeater, around another
    plain = getattr(type(batches), "__iter__", None) is BatchSampler.__iter__  # a subclass may hand out others
    sampler: Any = batches.sampler if plain else batches
    if hasattr(sampler, "num_replicas"):  # the share of a process: all of them work on all of it
        return range(len(loader.dataset))  # type: ignore[arg-type]
    order = getattr(type(sampler), "__iter__", None)
    if order in (SequentialSampler.__iter__, RandomSampler.__iter__, SeedableRandomSampler.__iter__):
        return range(len(sampler.data_source))
    if order is WeightedRandomSampler.__iter__:
        return cast(list[int], sampler.weights.nonzero().flatten().tolist())
    found = [sorted(set(sampler if plain else chain.from_iterable(batches)))]
    return found[0] if world == 1 else broadcast_object_list(found)[0]  # a sampler of one's own may draw


def _sampler_of(batches: Any) -> Any:
    return getattr(batches, "sampler", None)
