"""Uneven shares: whatever they are, the samples of a step are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from scaledtrain.balance import Balance, Fixed
from scaledtrain.balance.balancer import Balancer
from scaledtrain.balance.loader import BalancedLoader
from scaledtrain.data import Column, Ragged, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.cut import cut, join
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.timeline import Timeline

N = 46  # samples, in batches of 4: 12, the last of 2; a step of 3 ranks has 12, the last 10
SHARES = [6, 1, 5]


def numbers() -> TensorDataset:
    return TensorDataset(torch.arange(N), torch.arange(N) * 10)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((torch.tensor(i), torch.tensor(10 * i)) for i in range(N))


class Unequal(Sampler[list[int]]):
    """Batches of 1, 2, 3, 4, ... samples."""

    def __iter__(self) -> Iterator[list[int]]:
        order, size = list(range(N)), 1
        while order:
            yield order[:size]
            order, size = order[size:], size + 1

    def __len__(self) -> int:
        return 10


def batched() -> DataLoader[Any]:
    sampler = BatchSampler(RandomSampler(numbers()), 4, False)
    return DataLoader(numbers(), sampler=sampler, batch_size=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    with ShardWriter(path, columns={"text": Column("int64", ragged=True)}) as writer:
        for i in range(N):
            writer.write({"x": i, "text": torch.full((1 + i * 7 % 11,), i)})
    return path


def sharded(folder: Path, **options: Any) -> ShardedLoader:
    return ShardedLoader(ShardedDataset(folder), batch_size=4, buffer_bytes=2000, **options)


LOADERS = {
    "shuffled": lambda _: DataLoader(numbers(), batch_size=4, shuffle=True),
    "workers": lambda _: DataLoader(numbers(), batch_size=4, shuffle=True, num_workers=1),
    "batched access": lambda _: batched(),
    "own sampler": lambda _: DataLoader(numbers(), batch_sampler=Unequal()),
    "iterable": lambda _: DataLoader(Stream(), batch_size=4),
    "list": lambda _: [(torch.arange(i, min(i + 4, N)),) for i in range(0, N, 4)],
    "sharded": lambda folder: sharded(folder),
    "buckets": lambda folder: sharded(folder, bucket_by="text"),
    "tokens": lambda folder: sharded(folder, bucket_by="text", max_tokens=20, pad={"text": -1}),
}


def column(batch: Any) -> list[int]:
    first = batch["x"] if isinstance(batch, dict) else batch[0]
    return [int(x) for x in first]


def samples(step: StepBatch) -> list[int]:
    return [x for batch in step.microbatches for x in column(batch)]


def balancer(balance: Balance, replicas: int = 3) -> Balancer:
    return Balancer(balance, replicas, Timeline(), torch.device("cpu"), None, print)


def steps_of(loader: Any, replica: int, shares: list[float], **options: Any) -> list[StepBatch]:
    start, epoch = options.pop("start", 0), options.pop("epoch", 1)
    of_rank = BalancedLoader(
        loader, balancer(Fixed(shares), len(shares)), replica=replica, seed=3, **options
    )
    return list(of_rank.epoch(epoch, start))


@pytest.mark.parametrize("kind", LOADERS)
def test_steps_have_the_samples_of_one_process_in_their_order(kind: str, folder: Path) -> None:
    loader = LOADERS[kind](folder)
    whole = [samples(step) for step in ReplicaLoader(loader, accumulation=3, seed=3).epoch(1)]
    each = [steps_of(loader, replica, SHARES) for replica in range(3)]
    together = [[x for step in steps for x in samples(step)] for steps in zip(*each, strict=True)]
    assert together == whole
    assert sorted(x for step in together for x in step) == list(range(N))
    for replica in range(3):  # entered in its middle, it goes on with the same
        ranks = balancer(Fixed(SHARES))
        ranks.begin(12 if kind != "own sampler" else 1 + 2 + 3)
        rest = BalancedLoader(loader, ranks, replica=replica, seed=3).epoch(1, start=2)
        assert [samples(s) for s in rest] == [samples(s) for s in each[replica][2:]]
    # The first has 6 of 12, more than a batch: it computes them in two microbatches, or more where
    # batches of the loader do not fit together.
    if kind not in ("own sampler", "buckets", "tokens"):
        assert [step.sizes for step in each[0]] == [[3, 3]] * 3 + [[2, 3]]  # 5 of the last 10
        assert [step.sizes for step in each[1]] == [[1]] * 4  # 10 / 12 of one
        assert [step.sizes for step in each[2]] == [[2, 3]] * 3 + [[4]]
        weights = [[step.weight for step in steps] for steps in zip(*each, strict=True)]
        assert weights[0] == [6 / 4, 1 / 4, 5 / 4]
        assert [step.samples_per_rank for step in each[2]] == [4.0, 4.0, 4.0, 10 / 3]
        assert {step.even_share for step in each[2]} == {4.0}


@pytest.mark.parametrize("kind", LOADERS)
def test_steps_grow_and_need_be_no_multiple_of_the_ranks(kind: str, folder: Path) -> None:
    """Steps of 2 batches on 3 ranks, 8 samples as 4, 1, 3; from the second on, two in one."""
    loader = LOADERS[kind](folder)

    def steps(of: ReplicaLoader | BalancedLoader) -> list[StepBatch]:
        made = []
        for step in of.epoch(1):
            made.append(step)
            of.multiple = 2
        return made

    whole = steps(ReplicaLoader(loader, batches_per_step=2, seed=3))
    each = [
        steps(
            BalancedLoader(
                loader, balancer(Fixed(SHARES)), replica=replica, seed=3, batches_per_step=2
            )
        )
        for replica in range(3)
    ]
    together = [[x for step in rank for x in samples(step)] for rank in zip(*each, strict=True)]
    assert together == [samples(step) for step in whole]
    assert [[step.multiple for step in rank] for rank in each] == [[s.multiple for s in whole]] * 3
    assert whole[1].multiple == 2
    if kind not in ("own sampler", "tokens"):
        assert [step.samples for step in each[0][:2]] == [4, 8]
        assert [step.samples for step in each[1][:2]] == [1, 2]
        assert [step.weight for step in each[2][:2]] == [3 / (8 / 3), 6 / (16 / 3)]
        assert [step.even_share for step in each[2][:2]] == [8 / 3, 8 / 3]
        assert [step.is_full for step in each[1]] == [True, True, True, False]  # 46 = 8+16+16+6


def test_it_tells_the_samples_of_a_step_without_moving() -> None:
    rank = BalancedLoader(LOADERS["shuffled"](None), balancer(Fixed(SHARES)), replica=2, seed=3)
    with closing(rank.epoch(1)) as steps:
        for number, step in enumerate(steps):
            assert rank.indices(1, number) == [column(batch) for batch in step.microbatches]
    assert rank.indices(1, 9) == []  # behind the end
    assert BalancedLoader([torch.zeros(2)], balancer(Fixed([1]), 1)).indices(0, 0) is None


def test_replicas_alone_have_no_step_of_all() -> None:
    with pytest.raises(ConfigError, match="replicas of this strategy make steps of their own"):
        BalancedLoader([torch.zeros(1)], balancer(Fixed(SHARES)), alone=True, batches_per_step=4)


def test_accumulation_pieces_and_limits() -> None:
    """Steps of 2 batches x 4 ranks x 4 = 32 samples; 24 and 8 of replicas of two ranks each."""
    loader = DataLoader(numbers(), batch_size=4)
    firsts = [
        steps_of(loader, replica, [3, 1], piece=(i, 2), accumulation=2, epoch=0)[0]
        for replica in range(2)
        for i in range(2)
    ]
    assert [x for step in firsts for x in samples(step)] == list(range(32))
    assert [step.sizes for step in firsts] == [[4, 4, 4], [4, 4, 4], [2, 2], [2, 2]]
    limited = BalancedLoader(loader, balancer(Fixed([3, 1], max_local_batch_size=2), 2))
    assert next(limited.epoch(0)).sizes == [2, 2, 2]  # 6 of 8
    wide = BalancedLoader(loader, balancer(Fixed([3, 1], max_local_batch_size=64), 2))
    assert next(wide.epoch(0)).sizes == [6]


def test_a_replica_alone_makes_no_step_on_nothing_and_counts_by_its_samples() -> None:
    """Of 9 samples in steps of 8 and 1 the second replica has 2 of the first and none then."""
    loader = DataLoader(TensorDataset(torch.arange(9)), batch_size=4)
    mine = steps_of(loader, 1, [6, 2], alone=True, epoch=0)
    assert [(step.sizes, step.weight, step.gradient_samples) for step in mine] == [([2], 1.0, 4.0)]
    together = steps_of(loader, 1, [6, 2], epoch=0)
    assert [(step.sizes, step.weight) for step in together] == [([2], 0.5), ([], 0.0)]


def test_reading_begins_anew_where_shares_change() -> None:
    loader = DataLoader(numbers(), batch_size=4, num_workers=0)
    of_all = [BalancedLoader(loader, balancer(Fixed(SHARES)), replica=r) for r in range(3)]
    seen: list[int] = []
    with ExitStack() as stack:
        steps = [stack.enter_context(closing(rank.epoch(0))) for rank in of_all]
        for step in zip(*steps, strict=True):
            seen += [x for part in step for x in samples(part)]
            for rank in of_all:  # as a decision does, on all of them
                rank._balancer.shares = [4, 4, 4] if len(seen) == 12 else [1, 10, 1]
                rank._balancer.decisions += 1
    assert seen == list(range(N))


def test_no_batch_is_an_error() -> None:
    empty: DataLoader[Any] = DataLoader(
        TensorDataset(torch.arange(3)), batch_size=4, drop_last=True
    )
    with pytest.raises(ConfigError, match="the loader has no batch"):
        steps_of(empty, 0, [1, 2])


def test_cut_and_join() -> None:
    ragged = Ragged(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 3, 3, 4]))
    batch = {"text": ragged, "y": torch.arange(3), "names": ["a", "b", "c"], "scale": 2.0}
    parts = [cut(batch, 0, 1), cut(batch, 1, 3)]
    assert [p["text"].values.tolist() for p in parts] == [[5, 6, 7], [8]]
    assert parts[1]["text"].offsets.tolist() == [0, 0, 1]
    assert parts[1]["names"] == ["b", "c"]
    whole = join(parts)
    assert whole["text"].values.tolist() == [5, 6, 7, 8]
    assert whole["text"].offsets.tolist() == [0, 3, 3, 4]
    assert (whole["y"].tolist(), whole["names"], whole["scale"]) == (
        [0, 1, 2],
        ["a", "b", "c"],
        2.0,
    )
