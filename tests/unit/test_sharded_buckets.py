"""Batches of samples of similar length: every sample once, the same for any number of replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaledtrain.data import Column, Ragged, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.loaders import StridedLoader
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.data.sharded.batching import LengthBuckets
from scaledtrain.data.sharded.order import Order
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import damage, shard

N = 157
LENGTHS = np.random.default_rng(1).integers(0, 30, N)
LENGTHS[50] = 90  # longer than any limit below
TOKENS = {"tokens": Column("uint16", ragged=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ragged")
    with ShardWriter(folder, TOKENS, shard_samples=30) as writer:
        for i, length in enumerate(LENGTHS):
            writer.write({"i": i, "tokens": np.full(length, i, np.uint16)})
    return folder


def loader(folder: Path, batch_size: int = 8, **options: Any) -> ShardedLoader:
    defaults = {"bucket_by": "tokens", "block_bytes": 300, "buffer_bytes": 2_400, "seed": 1}
    return ShardedLoader(ShardedDataset(folder), batch_size, **{**defaults, **options})


def samples(batch: Any) -> list[int]:
    found: list[int] = batch["i"].tolist()
    tokens = batch["tokens"]
    rows = tokens.unbind() if isinstance(tokens, Ragged) else tokens
    for i, row in zip(found, rows, strict=True):
        length = int(LENGTHS[i])
        assert row[:length].tolist() == [i] * length
        assert row[length:].tolist() == [999] * (len(row) - length), "padding, if any"
    return found


def buckets(lengths: Any, batch_size: int, pool: int, **options: Any) -> LengthBuckets:
    order = Order([len(lengths)], 4, 3, seed=2)
    return LengthBuckets(
        order, lambda samples: np.asarray(lengths)[samples], batch_size, pool, **options
    )


def spans(batching: LengthBuckets, start: int = 0, step: int = 1) -> list[Any]:
    return [span for window in batching.windows(0, start, step) for span in window]


lists_of_lengths = st.lists(st.integers(0, 40), max_size=60)
limits = st.one_of(st.none(), st.integers(1, 100))


class TestBatches:
    @given(lists_of_lengths, st.integers(1, 9), st.integers(1, 40), limits, st.booleans())
    def test_every_sample_is_in_one_batch_within_the_limits(
        self, lengths: list[int], batch_size: int, pool: int, limit: int | None, padded: bool
    ) -> None:
        cut = buckets(lengths, batch_size, pool, max_tokens=limit, padded=padded)
        found = [cut.indices(0, *span).tolist() for span in spans(cut)]
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        for batch in found:
            own = [lengths[i] for i in batch]
            assert 1 <= len(own) <= batch_size
            if limit is not None and len(own) > 1:
                assert (max(own) * len(own) if padded else sum(own)) <= limit
        if limit is None:
            assert cut.batches == len(found) == -(-len(lengths) // batch_size)
            assert all(len(batch) == batch_size for batch in found[:-1])

    @given(lists_of_lengths, st.integers(1, 9), limits, st.integers(0, 40), st.integers(1, 5))
    def test_replicas_have_every_nth_and_equally_many(
        self, lengths: list[int], batch_size: int, limit: int | None, step: int, ranks: int
    ) -> None:
        whole = spans(buckets(lengths, batch_size, 16, max_tokens=limit))
        each = [
            spans(buckets(lengths, batch_size, 16, max_tokens=limit), step * ranks + r, ranks)
            for r in range(ranks)
        ]
        for r, own in enumerate(each):
            assert [s for s in own if s is not None] == whole[step * ranks + r :: ranks]
        if limit is not None:
            assert len({len(own) for own in each}) == 1

    def test_hand_computed(self) -> None:
        """From the longest on, with at most 10 tokens: 9 | 6 4 | 4 3 3 | 1 1."""
        cut = buckets([1, 4, 9, 3, 6, 3, 1, 4], 8, 8, max_tokens=10, shuffled=False)
        lengths = [
            sorted(np.array([1, 4, 9, 3, 6, 3, 1, 4])[cut.indices(0, *s)]) for s in spans(cut)
        ]
        assert lengths == [[9], [4, 6], [3, 3, 4], [1, 1]]
        # Padded to the longest: 9 | 6 | 4 4 | 3 3 1, as 2 x 6 and 3 x 4 are more than 10; then 1
        cut = buckets([1, 4, 9, 3, 6, 3, 1, 4], 8, 8, max_tokens=10, padded=True, shuffled=False)
        lengths = [
            sorted(np.array([1, 4, 9, 3, 6, 3, 1, 4])[cut.indices(0, *s)]) for s in spans(cut)
        ]
        assert lengths == [[9], [6], [4, 4], [1, 3, 3], [1]]

    def test_padding_is_what_is_saved(self) -> None:
        """Uniform lengths up to 100: in a random batch of 16 the longest is 16/17 of it, twice
        the mean. In a pool of 32 batches, lengths in a batch differ by some 3."""
        lengths = np.random.default_rng(0).integers(1, 101, 2_048)
        own, order = buckets(lengths, 16, 512), Order([2_048], 4, 3, seed=2)

        def padding(of: Any) -> float:
            batches = lengths[of.indices(0, 0, 2_048)].reshape(-1, 16)
            return float(1 - batches.sum() / (16 * batches.max(1)).sum())

        assert padding(order) > 0.4
        assert padding(own) < 0.05

    def test_batches_of_all_lengths_come_at_all_times(self) -> None:
        lengths = np.random.default_rng(0).integers(1, 101, 4_096)
        own = buckets(lengths, 16, 1_024)
        means = lengths[own.indices(0, 0, 4_096)].reshape(-1, 16).mean(1)
        # 256 independent pairs would have a correlation of 0 with a deviation of 1 / 16
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 4 / 16
        assert means[:-1].std() > 25  # of a uniform distribution: 100 / sqrt(12) = 29

    def test_the_samples_left_out_are_not_always_the_shortest(self) -> None:
        """11 samples, batches of 4: 3 are left out, in some epochs the longest, too."""
        own = buckets(list(range(11)), 4, 100, drop_last=True)
        assert own.batches == 2
        left = [set(range(11)) - set(own.indices(e, 0, 8).tolist()) for e in range(20)]
        assert len({frozenset(each) for each in left}) > 5
        assert set.union(*left) == set(range(11))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"drop_last": True},
    {"max_tokens": 60},
    {"max_tokens": 60, "pad": {"tokens": 999}},
    {"infinite": True},
    {"infinite": True, "max_tokens": 60},
]


class TestLoader:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_replicas_share_an_epoch_and_make_the_same_number_of_steps(
        self, folder: Path, options: dict[str, Any]
    ) -> None:
        assert isinstance(loader(folder, **options), StridedLoader)

        def steps(replicas: int, start: int = 0) -> list[list[int]]:
            """Each step's samples; 6 batches are a step whatever the number of replicas."""
            each = [
                ReplicaLoader(
                    loader(folder, **options), rank=r, replicas=replicas, accumulation=6 // replicas
                ).epoch(0, start)
                for r in range(replicas)
            ]
            found = []
            for together in zip(*each, strict=True):
                found.append(
                    sorted(i for s in together for b in s.microbatches for i in samples(b))
                )
                if start + len(found) == 9 and options.get("infinite"):
                    break
            return found

        one = steps(1)
        if not options.get("infinite"):
            kept = N - N % 8 if options.get("drop_last") else N
            assert len({i for step in one for i in step}) == sum(map(len, one)) == kept
        for replicas in (2, 3):
            assert steps(replicas) == one
            assert steps(replicas, 2) == one[2:]

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_state_is_what_was_given(self, folder: Path, options: dict[str, Any]) -> None:
        def of_two_epochs(own: ShardedLoader, most: int) -> list[list[int]]:
            found: list[list[int]] = []
            while own.epoch < 2 and len(found) < most:
                for batch in own:
                    found.append(samples(batch))
                    if len(found) == most:
                        break
            return found

        whole = of_two_epochs(loader(folder, **options), 60)
        for given_batches in (0, 7, 45):
            own = loader(folder, **options)
            seen = of_two_epochs(own, given_batches)
            other = loader(folder, **options)
            other.load_state_dict(own.state_dict())
            assert seen + of_two_epochs(other, 60 - len(seen)) == whole

    def test_going_on_reads_no_sample_before(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        asked: list[int] = []
        gather, lengths = ShardedDataset.gather, ShardedDataset.lengths

        def spy_gather(self: ShardedDataset, indices: Any, *rest: Any, **options: Any) -> Any:
            read.extend(indices.tolist())
            return gather(self, indices, *rest, **options)

        def spy_lengths(self: ShardedDataset, indices: Any, column: str) -> Any:
            asked.extend(indices.tolist())
            return lengths(self, indices, column)

        own = loader(folder, max_tokens=60)
        whole = [samples(batch) for batch in own.batches(0)]
        stopped = iter(own)
        for _ in range(len(whole) - 2):
            next(stopped)
        state = own.state_dict()
        monkeypatch.setattr(ShardedDataset, "gather", spy_gather)
        monkeypatch.setattr(ShardedDataset, "lengths", spy_lengths)
        # As the Trainer goes on: the lengths of the whole epoch, once, and the samples of two.
        batches = loader(folder, max_tokens=60).batches(0, start=len(whole) - 2)
        assert [samples(batch) for batch in batches] == whole[-2:]
        assert sorted(read) == sorted(whole[-2] + whole[-1])
        assert sorted(asked) == list(range(N))
        # With a state: the lengths of one pool, wherever that is.
        asked.clear()
        other = loader(folder, max_tokens=60)
        other.load_state_dict(state)
        assert [samples(batch) for batch in other] == whole[-2:]
        assert len(asked) <= other._most

    def test_its_length(self, folder: Path) -> None:
        assert len(loader(folder)) == 20  # 157 / 8
        for options in ({"max_tokens": 60}, {"infinite": True}):
            with pytest.raises(TypeError, match="no length"):
                len(loader(folder, **options))
            assert ReplicaLoader(loader(folder, **options)).steps_per_epoch is None

    def test_a_state_of_other_batches_is_refused(self, folder: Path) -> None:
        state = loader(folder, max_tokens=60).state_dict()
        for options, told in (
            ({"max_tokens": 61}, "max_tokens 60, but this loader has 61"),
            ({"max_tokens": 60, "pad": {"tokens": 0}}, "padded False"),
            ({"bucket_by": None}, "bucket_by tokens, but this loader has None"),
        ):
            with pytest.raises(ConfigError, match=told):
                loader(folder, **options).load_state_dict(state)

    def test_all_replicas_find_the_same_batches_though_a_shard_is_damaged(
        self, tmp_path: Path
    ) -> None:
        """One finds it when it reads values, another when it asks for lengths, a third never."""
        with ShardWriter(tmp_path, TOKENS, shard_samples=10) as writer:
            for i in range(40):
                writer.write({"i": i, "tokens": [i] * (i % 5)})
        damage(shard(tmp_path, 1), -3)  # among the last column's values
        shard(tmp_path, 3).unlink()

        def own() -> ShardedLoader:
            data = ShardedDataset(tmp_path, on_damage="skip")
            return ShardedLoader(data, 4, bucket_by="tokens", max_tokens=9)

        def of(batches: Any) -> list[list[int]]:
            return [[] if b is None else b["i"].tolist() for b in batches]

        whole = of(own().batches(0))
        assert {i for b in whole for i in b} >= {*range(10), *range(20, 30)}
        each = [of(own().batches(0, r, 3)) for r in range(3)]
        assert len({len(batches) for batches in each}) == 1
        together = [i for batches in each for b in batches for i in b]
        assert len(set(together)) == len(together)
        assert set(together) >= {*range(10), *range(20, 30)}
        with pytest.raises(DataError, match="shard-00003"):
            list(ShardedLoader(ShardedDataset(tmp_path), 4, bucket_by="tokens"))


class TestPadding:
    def test_without_buckets_and_as_tuples(self, tmp_path: Path) -> None:
        columns = {"x": Column("uint16", ragged=True), "y": Column("float32", (2,), ragged=True)}
        with ShardWriter(tmp_path, columns) as writer:
            for i in range(3):
                writer.write({"x": [7] * i, "y": np.full((i, 2), i, np.float32)})
        data = ShardedDataset(tmp_path, as_tuple=True)
        own = ShardedLoader(data, 3, shuffle="none", pad={"x": 65_535, "y": -1})
        ((x, y),) = own
        assert x.tolist() == [[65_535, 65_535], [7, 65_535], [7, 7]]
        assert x.dtype == torch.uint16
        assert y.tolist() == [[[-1, -1], [-1, -1]], [[1, 1], [-1, -1]], [[2, 2], [2, 2]]]
        ((x, y),) = ShardedLoader(data, 3, shuffle="none", pad={"x": 0})
        assert isinstance(y, Ragged)
        assert x.shape == (3, 2)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"pad": {"i": 0}}, "pad names 'i', which is no column of samples of different"),
            ({"pad": {"tokens": -1}}, "pad is -1 for 'tokens', which uint16 cannot hold"),
            ({"bucket_by": "i"}, "bucket_by names 'i'.* those that are read: tokens"),
            ({"max_tokens": 5, "bucket_by": None}, "max_tokens is 5, which needs bucket_by"),
            ({"max_tokens": 5, "drop_last": True}, "no use for drop_last"),
            ({"max_tokens": 0}, "max_tokens is 0"),
        ],
    )
    def test_what_cannot_be_is_told(self, folder: Path, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            loader(folder, **options)
