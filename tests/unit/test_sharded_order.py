"""The order of an epoch: every sample once, the same for any number of ranks, from anywhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledtrain.data.sharded.order import Order
from scaledtrain.data.sharded.permutation import SORTED_UP_TO, Permutation
from scaledtrain.errors import ConfigError

orders = st.builds(
    Order,
    st.lists(st.integers(1, 40), max_size=6),
    block_samples=st.integers(1, 12),
    buffer_blocks=st.integers(1, 5),
    shuffle=st.sampled_from(["full", "block", "none"]),
    seed=st.integers(0, 2**70),
)


@given(orders, st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    indices = order.indices(epoch, 0, order.samples)
    assert indices.dtype == np.int64
    assert sorted(indices.tolist()) == list(range(order.samples))


@given(orders, st.data())
def test_any_part_is_that_of_the_whole(order: Order, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.samples))
    stop = data.draw(st.integers(start, order.samples))
    whole = order.indices(1, 0, order.samples)
    again = Order(
        order._shards, order.block_samples, order.buffer_blocks, order.shuffle, order.seed
    )
    assert again.indices(1, start, stop).tolist() == whole[start:stop].tolist()


@given(orders, st.integers(1, 4))
@settings(max_examples=50)
def test_global_batches_are_the_same_for_1_2_4_and_8_ranks(order: Order, eighth: int) -> None:
    """Global batch b is positions 8 eighth b and on; rank r of R reads its R-th part of each."""
    size = 8 * eighth

    def batches(ranks: int) -> list[list[int]]:
        local = size // ranks
        return [
            [
                int(i)
                for rank in range(ranks)
                for i in order.indices(
                    2,
                    min(begin + rank * local, order.samples),
                    min(begin + (rank + 1) * local, order.samples),
                )
            ]
            for begin in range(0, order.samples, size)
        ]

    one = batches(1)
    for ranks in (2, 4, 8):
        assert batches(ranks) == one


@given(orders)
def test_groups_tile_the_epoch_and_mix_whole_blocks(order: Order) -> None:
    bounds = order.group_bounds(3)
    assert (bounds[0], bounds[-1]) == (0, order.samples)
    assert (np.diff(bounds) > 0).all() or order.samples == 0
    if order.shuffle != "block":
        return
    shards = np.repeat(np.arange(len(order._shards)), order._shards)
    within = np.concatenate([np.arange(n) for n in order._shards] or [np.zeros(0, np.int64)])
    blocks = shards * 1000 + within // order.block_samples
    seen: set[int] = set()
    for low, high in pairwise(bounds):
        group = set(blocks[order.indices(3, int(low), int(high))].tolist())
        assert len(group) <= order.buffer_blocks
        assert not group & seen, "a block is in one group"
        seen |= group


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int, shuffle: Any) -> list[int]:
        return Order([100, 50], 10, 4, shuffle, seed).indices(number, 0, 150).tolist()

    for shuffle in ("block", "full"):
        drawn = [epoch(s, e, shuffle) for s in (0, 1, 2**64) for e in (0, 1, 2)]
        assert len({tuple(d) for d in drawn}) == 9
    assert epoch(0, 0, "none") == list(range(150))


def test_the_order_is_the_same_in_every_version_on_every_platform() -> None:
    """Stated as it came when this was written: a run of then goes on with it."""
    order = Order([5, 4], block_samples=2, buffer_blocks=2, shuffle="block", seed=3)
    assert order.indices(1, 0, 9).tolist() == [1, 0, 2, 3, 6, 4, 5, 7, 8]
    full = Order([10**12], 1, 1, "full", seed=3)
    assert full.indices(1, 10**11, 10**11 + 3).tolist() == [
        692539606684,
        911158561522,
        763198387555,
    ]


def test_a_far_place_in_a_large_set_needs_no_long_way() -> None:
    """10^13 samples: what an epoch holds in memory does not grow with them."""
    order = Order([10**9] * 10_000, block_samples=10**8, buffer_blocks=4, shuffle="full", seed=0)
    assert len(order.indices(0, 10**13 - 5, 10**13)) == 5


class TestPermutation:
    @given(st.integers(1, 3 * SORTED_UP_TO), st.integers(0, 9))
    @settings(max_examples=30)
    def test_is_one(self, n: int, seed: int) -> None:
        assert sorted(Permutation(n, seed).take(0, n).tolist()) == list(range(n))

    def test_small_ones_are_uniform(self) -> None:
        """6,000 of 3 things: each of 6 orders 1,000 times, with a deviation of 29."""
        drawn = [tuple(Permutation(3, seed).take(0, 3).tolist()) for seed in range(6_000)]
        counts = [drawn.count(order) for order in set(drawn)]
        assert len(counts) == 6
        assert all(abs(count - 1_000) < 5 * 29 for count in counts)

    def test_large_ones_have_no_trend(self) -> None:
        """Correlations of 100,000 independent pairs have a deviation of 1 / sqrt(100,000)."""
        n = 100_000
        order = Permutation(n, 1).take(0, n)
        for lag in (1, 2, 256, 1024):
            correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
            assert abs(correlation) < 5 / np.sqrt(n)
        # The first of 500 permutations: mean n/2, with a deviation of n / sqrt(12 x 500).
        firsts = [int(Permutation(n, seed).take(0, 1)[0]) for seed in range(500)]
        assert abs(np.mean(firsts) / n - 0.5) < 5 / np.sqrt(12 * 500)


def test_sorted_labels_come_mixed() -> None:
    """10 classes of 1,000, sorted; blocks of 10, 50 in a group: batches of 100 have all classes.

    A group is 50 of 1,000 blocks: 5 of each class with a deviation of 2. Unshuffled, a batch has
    one class.
    """
    labels = np.repeat(np.arange(10), 1_000)

    def classes_per_batch(shuffle: Any) -> float:
        order = Order([2_500] * 4, block_samples=10, buffer_blocks=50, shuffle=shuffle, seed=0)
        batches = labels[order.indices(0, 0, 10_000)].reshape(100, 100)
        return float(np.mean([len(set(batch.tolist())) for batch in batches]))

    assert classes_per_batch("none") == 1.0
    assert classes_per_batch("full") > 9.9
    assert classes_per_batch("block") > 9.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"block_samples": 0}, "block_samples is 0"),
        ({"buffer_blocks": 0}, "buffer_blocks is 0"),
        ({"shuffle": "all"}, "shuffle is 'all'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_mistake_is_told(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Order(**{"shard_samples": [3], "block_samples": 1, "buffer_blocks": 1, **arguments})
    with pytest.raises(IndexError):
        Order([3], 1, 1).indices(0, 2, 4)


def test_a_position_alone_is_what_it_is_in_its_group() -> None:
    """One position of 100 or of 5,000 is found alone, all of them at once."""
    for samples in (100, 5_000):
        order = Order([samples], block_samples=10, buffer_blocks=500, seed=3)
        whole = order.indices(1, 0, samples)
        assert sorted(whole.tolist()) == list(range(samples))
        for position in range(0, samples, samples // 20):
            assert order.indices(1, position, position + 1).tolist() == [whole[position]]
