"""Which samples come, in which batches, to which process."""

from __future__ import annotations

import pickle
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    IterableDatasetShard,
    SeedableRandomSampler,
    skip_first_batches,
)
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from transformers import default_data_collator

from trpts_peft.data import Batches, processes


class Model(nn.Module):
    """All that `Batches` asks of a model: its main input, the arguments of its forward, its device."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values, labels=None, interpolate_pos_encoding=False): ...


def samples(count):
    return [{"pixel_values": torch.full((2,), float(i)), "labels": i} for i in range(count)]


CPU_ONLY = {"ACCELERATE_USE_CPU": "true"}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def labels_of(data, batch_size=3, num_samples=None, **ranks):
    batches = Batches(data, Model(), num_samples=num_samples, batch_size=batch_size, **ranks)
    return [batch["labels"].tolist() for batch in batches.iterate("", False)]


def test_every_sample_comes_once_and_in_order():
    assert labels_of(samples(7)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_batches_hold_what_the_model_takes():
    rows = [{**row, "image": object(), "name": "a", "interpolate_pos_encoding": True} for row in samples(2)]
    (batch,) = Batches(rows, Model(), num_samples=None, batch_size=4).iterate("", False)
    assert set(batch) == {"pixel_values", "labels", "interpolate_pos_encoding"}
    assert torch.equal(batch["pixel_values"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_batches_come_to_the_models_device():
    (batch,) = Batches(samples(2), Model().to("meta"), num_samples=None, batch_size=2).iterate("", False)
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_collate_function_adds_reaches_the_model(stream):
    def collate(rows):
        return {**default_data_collator(rows), "interpolate_pos_encoding": True}

    data = DataLoader(Stream(samples(5)) if stream else samples(5), batch_size=2, collate_fn=collate)
    batches = list(Batches(data, Model(), num_samples=3, batch_size=2).iterate("", False))
    assert [len(batch["labels"]) for batch in batches] == [2, 1]
    assert all(batch["interpolate_pos_encoding"] is True for batch in batches)


@pytest.mark.parametrize("key", ["label", "label_ids"])
def test_other_names_of_labels_are_known(key):
    rows = [{"pixel_values": row["pixel_values"], key: torch.tensor(row["labels"])} for row in samples(4)]
    assert labels_of(rows) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("count", [7, 99])
def test_as_many_samples_as_there_are_means_all(count):
    assert list(chain(*labels_of(samples(7), num_samples=count))) == list(range(7))


def test_fewer_samples_are_the_same_ones_every_time_and_in_order():
    chosen = list(chain(*labels_of(samples(40), num_samples=10)))
    assert len(set(chosen)) == 10 and chosen == sorted(chosen)
    assert chosen == list(chain(*labels_of(samples(40), num_samples=10)))


def test_samples_are_drawn_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        batches = Batches(samples(9), Model(), num_samples=4, batch_size=4)
    assert len(list(batches.iterate("", False))) == 1


def test_fewer_samples_do_not_fall_into_step_with_labels_that_come_in_turn():
    chosen = list(chain(*labels_of(samples(200), num_samples=20)))
    assert len({index % 10 for index in chosen}) > 5


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_the_same_batches(world):
    shared = [labels_of(samples(11), rank=rank, world=world) for rank in range(world)]
    alone = labels_of(samples(11))
    assert sorted(chain(*shared)) == alone
    assert all(shared[k % world][k // world] == batch for k, batch in enumerate(alone))


def test_a_dataloader_stands_for_its_samples_not_for_their_order():
    for options in ({"shuffle": True}, {"batch_size": 5}, {"shuffle": True, "drop_last": True, "batch_size": 4}):
        assert labels_of(DataLoader(samples(7), **options)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_dataloader_keeps_its_collate_function():
    def collate(rows):
        return {
            "pixel_values": torch.stack([r["pixel_values"] for r in rows]),
            "labels": torch.tensor([42] * len(rows)),
        }

    assert labels_of(DataLoader(samples(4), collate_fn=collate)) == [[42, 42, 42], [42]]


def this_worker(rows):
    worker = get_worker_info()
    return {"pixel_values": torch.zeros(len(rows), 2), "labels": torch.tensor([worker.id, worker.num_workers])}


def test_a_dataloader_keeps_its_workers():
    options = {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": True, "timeout": 60}
    data = DataLoader(samples(6), collate_fn=this_worker, worker_init_fn=print, **options)
    loader = Batches(data, Model(), num_samples=None, batch_size=3).loader
    assert {name: getattr(loader, name) for name in options} == options
    assert loader.worker_init_fn is print
    assert sorted(batch["labels"].tolist() for batch in loader) == [[0, 2], [1, 2]]


def test_workers_of_any_kind_can_load():
    loader = Batches(samples(3), Model(), num_samples=None, batch_size=3).loader
    collate = pickle.loads(pickle.dumps(loader.collate_fn))
    assert collate(samples(3))["labels"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="got one without `labels`"):
        collate([{"pixel_values": torch.zeros(2)}])


@pytest.mark.parametrize(
    "there, environment, rank, said", [(True, {}, 0, 1), (True, {}, 1, 0), (False, {}, 0, 0), (True, CPU_ONLY, 0, 0)]
)
def test_a_model_beside_an_idle_gpu_is_hinted_at(monkeypatch, caplog, there, environment, rank, said):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("WARNING", logger="trpts_peft"):
        Batches(samples(3), Model(), num_samples=None, batch_size=3, rank=rank, world=2)
    assert [record.getMessage().count("model.to('cuda')") for record in caplog.records] == [1] * said


def test_samplers_and_subsets_that_leave_samples_out_are_kept():
    assert labels_of(DataLoader(samples(7), sampler=SubsetRandomSampler([6, 1, 3]))) == [[1, 3, 6]]
    assert labels_of(DataLoader(Subset(samples(7), [6, 1, 3]))) == [[6, 1, 3]]
    assert labels_of(DataLoader(samples(7), sampler=RandomSampler(range(2)))) == [[0, 1]]
    assert labels_of(DataLoader(samples(7), sampler=WeightedRandomSampler([0, 1, 0, 2.5], 9))) == [[1, 3]]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(IterableDatasetShard(Stream(samples(4)), num_processes=2), batch_size=2),
        DataLoaderDispatcher(Stream(samples(4)), batch_size=2),
    ],
)
def test_streams_that_are_shared_out_already_are_refused(loader):
    """Each process would take a share of its share."""
    with pytest.raises(ValueError, match=r"`data` must be whole in every process.*made from"):
        labels_of(loader, world=2)


class Sharing:
    """The share of one process, as other libraries' samplers hand it out."""

    num_replicas = 2

    def __iter__(self):
        return iter([1, 3, 5])

    def __len__(self):
        return 3


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(7), replacement=True),
        RandomSampler(range(7), num_samples=2),
        SeedableRandomSampler(range(7), num_samples=2),
        WeightedRandomSampler([1.0] * 7, 2),
        DistributedSampler(range(7), num_replicas=2, rank=1),
        Sharing(),
    ],
)
def test_samples_that_are_drawn_or_shared_out_stand_for_all(sampler):
    """The same ones each time, and on every process; shares are made of all of them."""
    assert labels_of(DataLoader(samples(7), sampler=sampler)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert labels_of(DataLoader(samples(7), sampler=sampler), rank=1, world=2) == [[3, 4, 5]]


def test_a_loader_that_skips_batches_stands_for_all_samples():
    loader = skip_first_batches(DataLoader(samples(7), batch_size=2, shuffle=True), num_batches=1)
    assert labels_of(loader) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("num_samples, expected", [(None, [[0, 1], [2, 3], [4]]), (3, [[0, 1], [2]]), (2, [[0, 1]])])
def test_a_stream_keeps_its_own_batches(num_samples, expected):
    assert labels_of(DataLoader(Stream(samples(5)), batch_size=2), num_samples=num_samples) == expected


def test_a_stream_is_limited_whatever_its_labels_are_called():
    rows = [{"pixel_values": row["pixel_values"], "label": row["labels"]} for row in samples(5)]
    assert labels_of(DataLoader(Stream(rows), batch_size=2), num_samples=3) == [[0, 1], [2]]


def test_a_stream_is_shared_out():
    shared = [labels_of(DataLoader(Stream(samples(5)), batch_size=2), rank=rank, world=2) for rank in (0, 1)]
    assert shared == [[[0, 1], [4]], [[2, 3]]]


@pytest.mark.parametrize("stream", [False, True])
def test_data_can_be_gone_over_twice(stream):
    data = DataLoader(Stream(samples(5)), batch_size=2) if stream else samples(5)
    batches = Batches(data, Model(), num_samples=None, batch_size=2)
    passes = [[batch["labels"].tolist() for batch in batches.iterate("", False)] for _ in range(2)]
    assert passes[0] == passes[1] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("data", [[], DataLoader([])])
def test_no_samples_are_refused(data):
    with pytest.raises(ValueError, match="`data` must hold at least one sample, got none"):
        labels_of(data)


@pytest.mark.parametrize("missing", ["pixel_values", "labels"])
@pytest.mark.parametrize("wrap", [list, DataLoader, lambda rows: DataLoader(Stream(rows))])
def test_missing_columns_are_named(missing, wrap):
    rows = [{key: value for key, value in row.items() if key != missing} for row in samples(2)]
    with pytest.raises(ValueError, match=f"`data` must yield dicts with .* got one without `{missing}`"):
        labels_of(wrap(rows))


def test_samples_that_are_no_dicts_are_refused():
    with pytest.raises(ValueError, match=r"`data` must yield dicts .* got tuple"):
        labels_of([(torch.zeros(2), 1)])


@pytest.mark.parametrize(("label", "wrap"), [("rose", list), ("rose", DataLoader), (None, list)])
@pytest.mark.parametrize("key", ["labels", "label"])
def test_labels_that_are_no_numbers_are_named(label, wrap, key):
    rows = [{"pixel_values": torch.zeros(2), key: label}] * 2
    with pytest.raises(ValueError, match=r"`labels` must be whole numbers, .* got .*(rose|None)"):
        labels_of(wrap(rows))


def test_labels_in_a_batch_are_a_tensor():
    rows = [{"pixel_values": torch.zeros(2), "labels": 1}] * 2
    data = DataLoader(rows, collate_fn=lambda rows: {"pixel_values": torch.zeros(1, 2), "labels": [1]})
    with pytest.raises(ValueError, match=r"`labels` must be .* a tensor of them, got \[1\]"):
        labels_of(data)


def test_one_name_of_labels_will_do():
    rows = [{"pixel_values": torch.zeros(2), "labels": 1, "label_ids": None}]
    assert labels_of(rows) == [[1]]
    assert labels_of(DataLoader(rows, collate_fn=lambda rows: {**rows[0], "labels": torch.tensor([1])})) == [[1]]


def test_pixels_that_are_no_tensors_are_named():
    """As those of a `datasets.Dataset` without a format in a DataLoader."""
    rows = [{"pixel_values": [0.0, 1.0], "labels": 1}] * 2
    with pytest.raises(ValueError, match=r"`data` must yield `pixel_values` as tensors, got list: .*with_format"):
        labels_of(DataLoader(rows, batch_size=2))
    assert labels_of(rows) == [[1, 1]]


@pytest.mark.parametrize("data", [3, "train", {"train": samples(2)}, None, iter(samples(2)), Stream(samples(2))])
def test_what_is_no_dataset_is_refused(data):
    with pytest.raises(TypeError, match=f"`data` must be a Dataset .* got {type(data).__name__}"):
        labels_of(data)


class Repeater:
    """Hands out the batches of another for ever, as timm's loaders do."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from self.sampler


def test_samplers_of_ones_own_are_asked_for_what_they_hand_out():
    class Some(SequentialSampler):
        def __iter__(self):
            return iter([4, 1])

    class Pairs(BatchSampler):
        def __iter__(self):
            return iter([[5, 2], [2, 3]])

    assert labels_of(DataLoader(samples(7), sampler=Some(range(7)))) == [[1, 4]]
    for batches in (Pairs(SequentialSampler(range(7)), 2, False), [[5, 2], [2, 3]]):
        assert labels_of(DataLoader(samples(7), batch_sampler=batches)) == [[2, 3, 5]]
    shuffled = type("Logged", (BatchSampler,), {})(RandomSampler(range(7)), 2, True)  # its luck is not asked
    for batches in (shuffled, Repeater(BatchSampler(SequentialSampler(range(7)), 2, True))):
        assert labels_of(DataLoader(samples(7), batch_sampler=batches)) == [[0, 1, 2], [3, 4, 5], [6]]
    shard = BatchSamplerShard(Pairs(SequentialSampler(range(7)), 2, False), num_processes=2, process_index=1)
    assert labels_of(DataLoader(samples(7), batch_sampler=shard)) == [[2, 3, 5]]


@pytest.mark.parametrize("name", ["batch_size", "num_samples"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_counts_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got {value!r}"):
        labels_of(samples(2), **{name: value})


def test_alone_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes(None) == (0, 1)
    assert processes(Accelerator(cpu=True)) == (0, 1)
