"""Which samples each replica gets: nothing twice, nothing lost, the same steps for any number."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from scaledtrain.data.cut import count_samples
from scaledtrain.data.replica_loader import ReplicaLoader, first_batch
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n))


def samples(step: StepBatch) -> list[int]:
    columns = (b[0] if isinstance(b, (tuple, list)) else b for b in step.microbatches)
    return [int(x) for column in columns for x in column]


def steps_of_all(loader: Any, replicas: int, *, epoch: int = 0, **options: Any) -> list[list[int]]:
    """For each step the sorted samples of all replicas together."""
    each = [
        list(ReplicaLoader(loader, rank=r, replicas=replicas, **options).epoch(epoch))
        for r in range(replicas)
    ]
    assert len({len(steps) for steps in each}) == 1, "all replicas make the same number of steps"
    return [sorted(s for step in steps for s in samples(step)) for steps in zip(*each, strict=True)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor(i) for i in range(22))


def batched(n: int) -> DataLoader[Any]:
    data = numbers(n)
    return DataLoader(data, sampler=BatchSampler(RandomSampler(data), 4, False), batch_size=None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(numbers(22), batch_size=4, shuffle=True),
        lambda: DataLoader(numbers(22), batch_size=4),
        lambda: batched(22),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: [(torch.arange(i, min(i + 4, 22)),) for i in range(0, 22, 4)],
    ],
    ids=["shuffled", "sequential", "batched-access", "iterable", "list"],
)
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_sample_once_and_equal_steps(make: Any, replicas: int, accumulation: int) -> None:
    steps = steps_of_all(make(), replicas, accumulation=accumulation)
    assert sorted(s for step in steps for s in step) == list(range(22))
    # 22 samples in batches of 4 are 6 batches.
    assert len(steps) == -(-6 // (replicas * accumulation))


def test_iterable_dataset_is_read_by_all_and_kept_by_one() -> None:
    loader = DataLoader(Stream(), batch_size=4)
    mine = list(ReplicaLoader(loader, rank=1, replicas=2).epoch(0))
    assert [[int(x) for b in s.microbatches for x in b] for s in mine] == [
        [4, 5, 6, 7],
        [12, 13, 14, 15],
        [20, 21],
    ]
    assert [s.weight for s in mine] == [1.0, 1.0, 0.5]


def test_steps_hold_the_same_samples_for_any_number_of_replicas() -> None:
    """32 samples a step: 1 x 8 batches, 2 x 4, 4 x 2 and 8 x 1 of 4 samples each."""
    loader = DataLoader(numbers(70), batch_size=4, shuffle=True)
    one = steps_of_all(loader, 1, accumulation=8)
    for replicas in (2, 4, 8):
        assert steps_of_all(loader, replicas, accumulation=8 // replicas) == one


def test_order_is_a_function_of_seed_and_epoch() -> None:
    loader = DataLoader(numbers(16), batch_size=4, shuffle=True)
    again = DataLoader(numbers(16), batch_size=4, shuffle=True)
    torch.manual_seed(1)
    first = [samples(s) for s in ReplicaLoader(loader, seed=5).epoch(2)]
    torch.manual_seed(2)
    assert [samples(s) for s in ReplicaLoader(again, seed=5).epoch(2)] == first
    assert [samples(s) for s in ReplicaLoader(again, seed=5).epoch(3)] != first
    assert [samples(s) for s in ReplicaLoader(again, seed=6).epoch(2)] != first


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(numbers(22), batch_size=4, shuffle=True),
        lambda: [(torch.arange(i, min(i + 4, 22)),) for i in range(0, 22, 4)],
    ],
)
def test_an_epoch_can_be_entered_in_the_middle(make: Any, replicas: int) -> None:
    for rank in range(replicas):
        loader = ReplicaLoader(make(), rank=rank, replicas=replicas)
        whole = [samples(s) for s in loader.epoch(1)]
        for start in range(len(whole) + 1):
            assert [samples(s) for s in loader.epoch(1, start)] == whole[start:]


class OwnRandomSampler(Sampler[int]):
    """As users write them: it draws from torch's global generator."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(20).tolist())

    def __len__(self) -> int:
        return 20


def test_a_sampler_of_the_users_draws_the_same_order_everywhere() -> None:
    seen = []
    for rank in range(2):
        torch.manual_seed(rank)  # as it is on different ranks
        before = torch.get_rng_state()
        loader = DataLoader(numbers(20), batch_size=4, sampler=OwnRandomSampler())
        steps = ReplicaLoader(loader, rank=rank, replicas=2).epoch(0)
        seen += [x for step in steps for x in samples(step)]
        assert torch.equal(torch.get_rng_state(), before)
    assert sorted(seen) == list(range(20))


def test_uneven_end_has_smaller_weights() -> None:
    """10 samples in batches of 4 on 2 replicas: steps of (4, 4) and (2, 0)."""
    loader = DataLoader(numbers(10), batch_size=4)
    weights = [
        [s.weight for s in ReplicaLoader(loader, rank=r, replicas=2).epoch(0)] for r in (0, 1)
    ]
    assert weights == [[1.0, 0.5], [1.0, 0.0]]


def test_replicas_in_step_with_no_other_share_the_sequence_of_epochs() -> None:
    """3 batches, 5 replicas: 0 1 2 | 3 4 0 | 1 2 3 | 4 0 1 | ... is who gets which.

    So after five epochs each has had three batches, and nobody a step on nothing.
    """
    loader = DataLoader(numbers(6), batch_size=2)  # batches (0, 1), (2, 3), (4, 5)

    def of(rank: int) -> list[list[list[int]]]:
        own = ReplicaLoader(loader, rank=rank, replicas=5, alone=True)
        return [[samples(step) for step in own.epoch(epoch)] for epoch in range(5)]

    assert of(0) == [[[0, 1]], [[4, 5]], [], [[2, 3]], []]
    assert of(1) == [[[2, 3]], [], [[0, 1]], [[4, 5]], []]
    assert [sum(len(steps) for steps in of(rank)) for rank in range(5)] == [3] * 5
    # In the middle of an epoch, of 3 batches of 2 replicas: 0 1 0 | 1 0 1.
    one = ReplicaLoader(loader, rank=1, replicas=2, alone=True)
    assert [samples(step) for step in one.epoch(1)] == [[0, 1], [4, 5]]
    assert [samples(step) for step in one.epoch(1, start=1)] == [[4, 5]]


def test_replicas_in_step_with_no_other_share_the_sequence_of_an_iterables_epochs() -> None:
    batches = [torch.tensor([i]) for i in range(3)]

    def of(rank: int) -> list[list[list[int]]]:
        own = ReplicaLoader(batches, rank=rank, replicas=5, alone=True)
        return [[samples(step) for step in own.epoch(epoch)] for epoch in range(5)]

    # The batches 0 1 2 | 0 1 2 | 0 1 2 ... are given to the replicas 0 1 2 3 4 0 1 2 3 4 ...
    assert of(0) == [[[0]], [[2]], [], [[1]], []]
    assert of(3) == [[], [[0]], [[2]], [], [[1]]]
    # Also where another run goes on: 0 1 0 | 1 0 1.
    later = ReplicaLoader(batches, rank=1, replicas=2, alone=True)
    assert [samples(step) for step in later.epoch(1, start=1)] == [[2]]


def test_an_iterable_that_can_be_iterated_once_is_refused_also_with_a_length() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = [torch.tensor([1]), torch.tensor([0])]

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[torch.Tensor]:
            while self.left:
                yield self.left.pop()

    once = Once()
    own = ReplicaLoader(once, rank=1, replicas=2, alone=True)
    assert [samples(step) for step in own.epoch(0)] == [[1]]
    with pytest.raises(ConfigError, match="iterated more than once"):
        list(own.epoch(1))


def test_a_replica_that_will_never_have_a_batch_is_told() -> None:
    class WithoutLength:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter([torch.tensor([0]), torch.tensor([1])])

    one, two = (ReplicaLoader(WithoutLength(), rank=r, replicas=3, alone=True) for r in (1, 2))
    assert [samples(step) for step in one.epoch(1)] == [[1]]
    with pytest.raises(ConfigError, match="or no batch for replica 2 of 3"):
        list(two.epoch(0))


def test_the_users_loader_is_left_as_it_was() -> None:
    loader = DataLoader(numbers(8), batch_size=4, shuffle=True)
    list(ReplicaLoader(loader, rank=0, replicas=2).epoch(0))
    assert loader.sampler.generator is None  # type: ignore[attr-defined]
    assert len(list(loader)) == 2


def test_drop_last_and_workers() -> None:
    loader = DataLoader(numbers(10), batch_size=4, drop_last=True, num_workers=1)
    assert steps_of_all(loader, 2) == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_distributed_sampler_is_refused() -> None:
    data = numbers(8)
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0)
    with pytest.raises(ConfigError, match="pass the loader as for one process"):
        ReplicaLoader(DataLoader(data, batch_size=2, sampler=sampler), rank=0, replicas=2)


@pytest.mark.parametrize("loader", [[], DataLoader(numbers(3), batch_size=4, drop_last=True)])
def test_empty_loader_is_an_error(loader: Any) -> None:
    with pytest.raises(ConfigError, match="no batch"):
        next(iter(ReplicaLoader(loader).epoch(0)))


def test_the_first_batch_that_can_be_read() -> None:
    class Damaged:
        batch_size, infinite = 2, False

        def __init__(self, *given: int | None) -> None:
            self._given = given

        def __len__(self) -> int:
            return len(self._given)

        def batches(
            self, epoch: int, start: int = 0, step: int = 1, seed: int | None = None
        ) -> Generator[Any, None, None]:
            yield from self._given[start::step]

    assert first_batch(Damaged(None, 3, 4)) == 3  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no batch of the loader could be read"):
        first_batch(Damaged(None, None))  # type: ignore[arg-type]


def test_count_samples() -> None:
    assert count_samples(torch.zeros(3, 2)) == 3
    assert count_samples((torch.zeros(3), torch.zeros(3))) == 3
    assert count_samples({"x": torch.zeros(5, 1)}) == 5
    assert count_samples(torch.tensor(1.0)) == 1
    assert count_samples([["a", "b"], [1, 2]]) == 2
