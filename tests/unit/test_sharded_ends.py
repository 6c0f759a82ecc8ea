"""Uneven ends: no sample twice, none lost, and all replicas make the same number of steps."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaledtrain.data import Column, Mixture, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.errors import ConfigError

SIZES = (0, 1, 2, 3, 7, 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Data sets of so many samples, in shards of 3; sample i has i % 4 tokens."""
    made = {}
    for size in SIZES:
        made[size] = folder = tmp_path_factory.mktemp(f"samples{size}")
        columns = {"i": Column("int64"), "tokens": Column("int32", ragged=True)}
        with ShardWriter(folder, columns, shard_samples=3) as writer:
            for i in range(size):
                writer.write({"i": i, "tokens": [i] * (i % 4)})
    return made


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"shuffle": "full"},
    "in order": {"shuffle": "none"},
    "buckets": {"bucket_by": "tokens"},
    "max_tokens": {"bucket_by": "tokens", "max_tokens": 5},
}


def make(folder: Path, batch_size: int, kind: str, **options: Any) -> ShardedLoader:
    small = {"block_bytes": 60, "buffer_bytes": 250}
    return ShardedLoader(ShardedDataset(folder), batch_size, **small, **KINDS[kind], **options)


def steps(
    loader: ShardedLoader, replicas: int, accumulation: int, seed: int, start: int = 0
) -> list[list[int]]:
    """The samples of each step of epoch 1."""
    each = [
        list(
            ReplicaLoader(
                loader, rank=rank, replicas=replicas, accumulation=accumulation, seed=seed
            ).epoch(1, start)
        )
        for rank in range(replicas)
    ]
    return [
        [i for step in together for batch in step.microbatches for i in batch["i"].tolist()]
        for together in zip(*each, strict=True)  # strict: equally many on all
    ]


@given(
    size=st.sampled_from([size for size in SIZES if size]),
    batch_size=st.integers(1, 25),
    replicas=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    kind=st.sampled_from(list(KINDS)),
    start=st.integers(0, 4),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_epoch_on_any_number_of_replicas_from_anywhere(
    folders: dict[int, Path],
    size: int,
    batch_size: int,
    replicas: int,
    accumulation: int,
    seed: int,
    kind: str,
    start: int,
) -> None:
    loader = make(folders[size], batch_size, kind)
    found = steps(loader, replicas, accumulation, seed)
    assert sorted(i for step in found for i in step) == list(range(size))
    assert all(found), "no step without a sample"
    if start < len(found):
        rest = steps(make(folders[size], batch_size, kind), replicas, accumulation, seed, start)
        assert [sorted(step) for step in rest] == [sorted(step) for step in found[start:]]


@given(
    size=st.sampled_from([size for size in SIZES if size]),
    batch_size=st.integers(1, 25),
    replicas=st.integers(1, 4),
    kind=st.sampled_from(list(KINDS)),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_endless_stream_has_all_samples_equally_often(
    folders: dict[int, Path], size: int, batch_size: int, replicas: int, kind: str
) -> None:
    loader = make(folders[size], batch_size, kind, infinite=True)
    whole = [b["i"].tolist() for b in islice(loader.batches(0), 12) if b is not None]
    if KINDS[kind].get("max_tokens") is None:
        assert {len(batch) for batch in whole} == {batch_size}, "also of a smaller data set"
    if "bucket_by" not in KINDS[kind]:  # a pool of buckets may be more than an epoch
        seen = Counter(i for batch in whole for i in batch)
        assert max(seen.values()) - min(seen[i] for i in range(size)) <= 1
    for rank in range(replicas):
        again = loader.batches(0, rank, replicas)
        mine = [b["i"].tolist() for b in islice(again, 12 // replicas) if b is not None]
        assert mine == whole[rank::replicas][: len(mine)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bucket_by" not in KINDS[kind]])
class TestEmpty:
    """It has no columns either, and so none whose lengths could be asked for."""

    def test_there_is_nothing_in_a_loop_of_ones_own(
        self, folders: dict[int, Path], kind: str
    ) -> None:
        loader = make(folders[0], 4, kind)
        assert list(loader) == list(loader) == []
        assert loader.epoch == 2

    def test_training_on_it_is_refused_on_every_replica(
        self, folders: dict[int, Path], kind: str
    ) -> None:
        for rank in range(2):
            with pytest.raises(ConfigError, match="the loader has no batch"):
                next(ReplicaLoader(make(folders[0], 4, kind), rank=rank, replicas=2).epoch(0))

    def test_so_is_an_endless_stream_of_nothing(self, folders: dict[int, Path], kind: str) -> None:
        with pytest.raises(ConfigError, match="an empty data set has no endless stream"):
            make(folders[0], 4, kind, infinite=True)


def test_one_sample_on_four_replicas(folders: dict[int, Path]) -> None:
    """One step, of which one replica has the sample and the weight."""
    for kind in KINDS:
        loader = make(folders[1], 4, kind)
        each = [list(ReplicaLoader(loader, rank=r, replicas=4).epoch(0)) for r in range(4)]
        assert [[s.samples for s in own] for own in each] == [[1], [0], [0], [0]]
        assert [own[0].weight for own in each] == [0.25, 0, 0, 0]


def test_replicas_alone_make_no_step_on_nothing(folders: dict[int, Path]) -> None:
    """7 samples, batches of 2, 3 replicas that wait for nobody."""
    for kind in KINDS:
        loader = make(folders[7], 2, kind)
        each = [
            list(ReplicaLoader(loader, rank=r, replicas=3, alone=True).epoch(0)) for r in range(3)
        ]
        found = [i for own in each for s in own for b in s.microbatches for i in b["i"].tolist()]
        assert sorted(found) == list(range(7))
        assert all(step.samples for own in each for step in own)


def test_a_mixture_of_one_sample_and_many(folders: dict[int, Path]) -> None:
    one, many = ShardedDataset(folders[1]), ShardedDataset(folders[20])
    # Turns of 1, 3: floor(p/4 + 1/2) is 0, 0, 1, 1, 1, 1, 2: position 5 would be the second
    assert len(Mixture([(one, 1), (many, 3)])) == 5
    loader = ShardedLoader(Mixture([(one, 1), (many, 3)], "all_exhausted"), 30)
    (batch,) = loader
    assert Counter(batch["tokens"].offsets.diff().tolist()) == {0: 5 + 7, 1: 5, 2: 5, 3: 5}
    assert [s.samples for s in ReplicaLoader(loader, rank=1, replicas=2).epoch(0)] == [0]
