"""Mixtures: the proportions, whose turn it is, and what an epoch has of each source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaledtrain.data import Column, Mixture, Ragged, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.sharded.interleave import Interleave
from scaledtrain.errors import ConfigError
from tests.sharded_samples import shard

SIZES = (23, 40, 7)
SMALL: dict[str, Any] = {"block_bytes": 120, "buffer_bytes": 500}

weights = st.lists(
    st.one_of(st.integers(1, 1000), st.floats(1e-3, 1e3), st.sampled_from([0.7, 0.2, 0.1])),
    min_size=1,
    max_size=9,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Source s has the numbers 100 s and on, as a number, as bfloat16, and as i % 3 tokens."""
    made = []
    for source, size in enumerate(SIZES):
        folder = tmp_path_factory.mktemp(f"source{source}")
        columns = {"tokens": Column("uint16", ragged=True), "b": Column("bfloat16")}
        with ShardWriter(folder, columns, shard_samples=9) as writer:
            for i in range(100 * source, 100 * source + size):
                writer.write(
                    {"i": i, "b": torch.tensor(float(i % 128)).bfloat16(), "tokens": [i] * (i % 3)}
                )
        made.append(folder)
    return made


def mixture(
    folders: Sequence[Path], shares: Sequence[float] = (3, 5, 2), **options: Any
) -> Mixture:
    datasets = [ShardedDataset(folder) for folder in folders]
    return Mixture(list(zip(datasets, shares, strict=True)), **options)


def numbers(batch: Any) -> list[int]:
    """What the batch holds, if all of its columns are of the same samples."""
    found: list[int] = batch["i"].tolist()
    assert batch["b"].tolist() == [float(i % 128) for i in found]
    assert isinstance(batch["tokens"], Ragged)
    assert [t.tolist() for t in batch["tokens"].unbind()] == [[i] * (i % 3) for i in found]
    return found


LABELS = [100 * source + i for source, size in enumerate(SIZES) for i in range(size)]


def epoch(mixed: Mixture, number: int, shuffle: Any = "block") -> list[int]:
    """What an epoch of a mixture of all three holds, in its order."""
    order = mixed.order(shuffle, seed=0, **SMALL)
    return [LABELS[i] for i in order.indices(number, 0, len(mixed)).tolist()]


class TestInterleave:
    @given(weights, st.integers(0, 2**50))
    def test_of_the_first_p_each_has_its_share_give_or_take_the_bound(
        self, given_weights: list[float], position: int
    ) -> None:
        turns = Interleave(given_weights)
        counts, total = turns.counts(position), sum(turns.shares)
        assert sum(counts) == position
        bound = math.ceil(math.log2(len(given_weights))) / 2
        for count, share in zip(counts, turns.shares, strict=True):
            # |count - p share / total| <= bound, in whole numbers
            assert abs(count * total - position * share) <= bound * total

    @given(weights, st.integers(0, 2**50), st.integers(0, 40))
    def test_a_turn_is_what_the_counts_grow_by(
        self, given_weights: list[float], start: int, n: int
    ) -> None:
        turns = Interleave(given_weights)
        sources, drawn = turns.take(start, start + n)
        for i in range(n):
            before, after = turns.counts(start + i), turns.counts(start + i + 1)
            grown = [b - a for a, b in zip(before, after, strict=True)]
            assert grown == [int(s == sources[i]) for s in range(len(given_weights))]
            assert drawn[i] == before[sources[i]]

    def test_equal_weights_take_turns(self) -> None:
        # floor(p / 2 + 1/2): 0, 1, 1, 2, 2: the first source has positions 0 and 2
        assert Interleave([2, 2]).take(0, 4)[0].tolist() == [0, 1, 0, 1]
        # Halves {0}, {1, 2} with shares 2, 1, 1 of 4: 0 at p = 0, 2; the others at 1 and 3
        assert Interleave([2, 1, 1]).take(0, 4)[0].tolist() == [0, 1, 0, 2]

    @given(weights)
    def test_shares_are_the_weights(self, given_weights: list[float]) -> None:
        shares, total = Interleave(given_weights).shares, sum(given_weights)
        assert sum(shares) < 2**31
        for share, weight in zip(shares, given_weights, strict=True):
            assert share / sum(shares) == pytest.approx(weight / total, abs=1e-8)

    @pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
    def test_a_weight_is_positive(self, weight: float) -> None:
        with pytest.raises(ConfigError, match=f"a weight is {weight}"):
            Interleave([1, weight])


class TestEpochs:
    @given(st.lists(st.integers(1, 20), min_size=3, max_size=3), st.sampled_from(["none", "block"]))
    @settings(
        max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_until_the_first_or_the_last_source_is_exhausted(
        self, folders: list[Path], shares: list[int], shuffle: str
    ) -> None:
        first = mixture(folders, shares)
        found = Counter(i // 100 for i in epoch(first, 0, shuffle=shuffle))
        assert found.total() == len(first)
        assert max(found[s] - size for s, size in enumerate(SIZES)) == 0, "one is used up"
        assert len(set(epoch(first, 0, shuffle=shuffle))) == len(first), "nothing comes twice"
        every = mixture(folders, shares, stop="all_exhausted")
        found = Counter(i // 100 for i in epoch(every, 0, shuffle=shuffle))
        assert min(found[s] - size for s, size in enumerate(SIZES)) == 0, "all are used up, just"
        assert len(set(epoch(every, 0, shuffle=shuffle))) == sum(SIZES)

    @pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted", 10])
    def test_a_source_is_passed_through_whole_before_it_begins_anew(
        self, folders: list[Path], stop: Any
    ) -> None:
        mixed = mixture(folders, stop=stop)
        seen: Counter[int] = Counter()
        for number in range(12):
            seen.update(epoch(mixed, number))
            for source, size in enumerate(SIZES):
                often = [seen[i] for i in range(100 * source, 100 * source + size)]
                assert max(often) - min(often) <= 1
        # 12 epochs of 10 samples: shares of 3, 5 and 2 tenths are exactly 36, 60 and 24
        if stop == 10:
            by_source = Counter(i // 100 for i in seen.elements())
            assert by_source == {0: 36, 1: 60, 2: 24}

    def test_hand_computed(self, folders: list[Path]) -> None:
        """7 of source 2 are 2/10 of 35: then 3/10 are 10.5, and 5/10 are 17.5."""
        mixed = mixture(folders)
        found = Counter(i // 100 for i in epoch(mixed, 0, shuffle="none"))
        assert found[2] == 7
        assert found[0] + found[1] == len(mixed) - 7
        assert abs(found[0] - 0.3 * len(mixed)) <= 1
        # In their own order each, since nothing is shuffled
        assert [i for i in epoch(mixed, 0, shuffle="none") if i < 100] == list(range(found[0]))

    def test_a_source_is_in_the_order_that_it_would_have_alone(self, folders: list[Path]) -> None:
        own = [i for i in epoch(mixture(folders, stop="all_exhausted"), 0) if i < 100]
        alone = ShardedLoader(ShardedDataset(folders[0]), 8, **SMALL)
        expected = [i for number in range(9) for b in alone.batches(number) for i in numbers(b)]
        assert own == expected[: len(own)]

    def test_the_same_data_set_twice_comes_in_two_orders(self, folders: list[Path]) -> None:
        twice = mixture([folders[1]] * 2, (1, 1)).order("block", seed=0, **SMALL)
        found = twice.indices(0, 0, 80)
        assert sorted(found[0::2].tolist()) == list(range(40))
        assert sorted(found[1::2].tolist()) == list(range(40, 80))
        assert (found[0::2] != found[1::2] - 40).any()


@given(
    st.integers(1, 30),
    st.integers(0, 12),
    st.integers(1, 4),
    st.sampled_from(["first_exhausted", "all_exhausted", 50]),
    st.booleans(),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_nth_batch_from_anywhere(
    folders: list[Path], batch_size: int, start: int, step: int, stop: Any, bucketed: bool
) -> None:
    options: dict[str, Any] = {"bucket_by": "tokens" if bucketed else None, "buffer_bytes": 2_000}
    mixed = mixture(folders, stop=stop)
    loader = ShardedLoader(mixed, batch_size, **options)
    whole = [numbers(batch) for batch in loader.batches(2, seed=5)]
    assert sum(map(len, whole)) == len(mixed)
    again = ShardedLoader(mixture(folders, stop=stop), batch_size, **options)
    assert [numbers(b) for b in again.batches(2, start, step, seed=5)] == whole[start::step]


def test_a_batch_has_the_proportions_of_the_whole(folders: list[Path]) -> None:
    """Batches of 10 with shares of 3, 5, 2 tenths: off by less than 2 for three sources."""
    loader = ShardedLoader(mixture(folders, stop=400), 10, **SMALL)
    for batch in loader:
        found = Counter(i // 100 for i in numbers(batch))
        assert all(abs(found[s] - n) < 2 for s, n in enumerate((3, 5, 2)))


def test_state_of_another_mixture_is_refused(folders: list[Path]) -> None:
    state = ShardedLoader(mixture(folders), 4, **SMALL).state_dict()
    ShardedLoader(mixture(folders, (30, 50, 20)), 4, **SMALL).load_state_dict(state)
    for other, told in (
        (mixture(folders, (1, 1, 1)), "samples 37, but this loader has 23"),
        (mixture(folders, stop=37), "goes_on False"),
        (ShardedDataset(folders[0]), "samples 37, but this loader has 23"),
    ):
        with pytest.raises(ConfigError, match=told):
            ShardedLoader(other, 4, **SMALL).load_state_dict(state)


def test_a_damaged_shard_of_one_source_is_left_out(folders: list[Path], tmp_path: Path) -> None:
    with ShardWriter(tmp_path, {"b": Column("bfloat16"), "tokens": Column("uint16", ragged=True)},
                     shard_samples=2) as writer:  # fmt: skip
        for i in range(6):
            writer.write({"b": torch.tensor(float(i)).bfloat16(), "tokens": [i] * (i % 3), "i": i})
    shard(tmp_path, 1).unlink()
    broken = ShardedDataset(tmp_path, ["i", "b", "tokens"], on_damage="skip")
    whole = ShardedDataset(folders[1], ["i", "b", "tokens"])
    loader = ShardedLoader(Mixture([(broken, 1), (whole, 1)]), 4, shuffle="none")
    found = [numbers(batch) for batch in loader]
    assert found == [[0, 100, 1, 101], [102, 103], [4, 104, 5, 105]]
    assert broken.samples_skipped == 2


def test_what_does_not_go_together_is_told(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no source"):
        Mixture([])
    for stop in ("never", 0, True):
        with pytest.raises(ConfigError, match=f"stop is {stop!r}"):
            mixture(folders, stop=stop)
    one, other = ShardedDataset(folders[0], ["i"]), ShardedDataset(folders[1], ["b"])
    with pytest.raises(ConfigError, match="needs the same columns"):
        Mixture([(one, 1), (other, 1)])
    with pytest.raises(ConfigError, match="gives tuples"):
        Mixture([(one, 1), (ShardedDataset(folders[0], ["i"], as_tuple=True), 1)])
    with ShardWriter(tmp_path, {"i": Column("int64")}):
        pass
    with pytest.raises(ConfigError, match="is empty"):
        Mixture([(one, 1), (ShardedDataset(tmp_path), 1)])


def test_a_far_position_needs_no_long_way(folders: list[Path]) -> None:
    order = mixture(folders, stop=10**15).order("block", 120, 500, 0)
    assert len(order.indices(3, 10**15 - 5, 10**15)) == 5
    assert np.array_equal(
        order.indices(3, 10**15 - 5, 10**15)[2:], order.indices(3, 10**15 - 3, 10**15)
    )
