"""In which order an epoch goes through a data set: a pure function, no input or output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.permutation import Permutation
from scaledtrain.errors import ConfigError

__all__ = ["Endless", "Order", "SampleOrder", "Shuffle"]

Shuffle = Literal["full", "block", "none"]

# What a permutation is for, as a part of its key.
_OF_BLOCKS, _IN_GROUP, _OF_SAMPLES = range(3)

FEW = 16  # positions of so small a part of a group are found one by one, not all of the group's


class SampleOrder(Protocol):
    """What a loader asks of an order: a pure function of the epoch, the same on every rank."""

    seed: int
    samples: int
    """Positions in an epoch."""

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at positions ``start`` to ``stop`` of an epoch, int64 ``[stop - start]``."""

    def group_end(self, epoch: int, position: int) -> int:
        """Where what is best read together with this position ends."""

    def identity(self) -> dict[str, Any]:
        """What makes it this order and no other."""


class Order:
    """The order of the samples in every epoch.

    A pure function of its arguments and the epoch. It knows of no ranks: position p of an epoch has
    the same sample whoever reads it, so that global batch b, of G samples, is positions bG to
    (b + 1)G whatever the number of ranks, and a run can go on anywhere on another number of them.

    * ``"none"``: as they were written.
    * ``"full"``: a random permutation of all samples. Each is read from somewhere else.
    * ``"block"`` (CorgiPile): consecutive samples of a shard are a block, a shard's last block may
      be smaller. Blocks are drawn in random order from the whole data set, and the samples of each
      group of ``buffer_blocks`` of them are mixed. Reads are as long as a block, and each group is
      a random sample of the data set by blocks, so that also sorted data come mixed. With all
      blocks in one group this is a full shuffle.

    A position is found in constant time, but for the first in an epoch: a block takes 8 bytes and
    some 100 ns once per epoch.

    Args:
        shard_samples: samples in each shard.
        block_samples: in a block.
        buffer_blocks: blocks in a group.
        shuffle: which of the three.
        seed: >= 0.

    Raises:
        ConfigError: something is not a count, or there is no such shuffle.

    Example:
        >>> order = Order([5, 3], block_samples=2, buffer_blocks=2, shuffle="block", seed=1)
        >>> order.group_bounds(epoch=0)  # blocks of 2, 2, 1 and of 2, 1 samples, two in a group
        array([0, ..., 8])
        >>> sorted(order.indices(0, 0, 8).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> bool((order.indices(3, 2, 7) == order.indices(3, 0, 8)[2:7]).all())
        True

    References:
        Xu et al. 2022, In-Database Machine Learning with CorgiPile: Stochastic Gradient Descent
        without Full Data Shuffle, arXiv:2206.05830.
    """

    def __init__(
        self,
        shard_samples: Sequence[int],
        block_samples: int,
        buffer_blocks: int,
        shuffle: Shuffle = "block",
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("block_samples", block_samples, 1),
            ("buffer_blocks", buffer_blocks, 1),
            ("seed", seed, 0),
            ("samples of a shard", min(shard_samples, default=0), 0),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; it is a whole number >= {least}")
        if shuffle not in ("full", "block", "none"):
            raise ConfigError(f"shuffle is {shuffle!r}; it is 'full', 'block' or 'none'")
        self.shuffle = shuffle
        self.seed = seed
        self.block_samples = block_samples
        self.buffer_blocks = buffer_blocks
        shards = np.asarray(shard_samples, np.int64)
        self.samples = int(shards.sum())
        self._first_samples = np.cumsum(shards) - shards
        blocks = -(-shards // block_samples)
        self._first_blocks = np.cumsum(blocks) - blocks
        self._shards = shards
        self._blocks = int(blocks.sum())
        self._epoch = lru_cache(2)(self._drawn)
        self._group = lru_cache(4)(self._blocks_of_group)
        self._whole_group = lru_cache(4)(self._mixed)

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at positions ``start`` to ``stop`` of an epoch, int64 ``[stop - start]``.

        Raises:
            IndexError: positions that an epoch does not have.
        """
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"positions {start} to {stop} of {self.samples}")
        if self.shuffle == "none" or start == stop:
            return np.arange(start, stop, dtype=np.int64)
        if self.shuffle == "full":
            return Permutation(self.samples, self.seed, _OF_SAMPLES, epoch).take(start, stop)
        bounds = self.group_bounds(epoch)
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        found = []
        while start < stop:
            begin, end = int(bounds[first]), min(int(bounds[first + 1]), stop)
            low, high = start - begin, end - begin
            samples, permutation = self._group(epoch, first)
            if (high - low) * FEW < len(samples):
                found.append(samples[permutation.take(low, high)])
            else:
                found.append(self._whole_group(epoch, first)[low:high])
            start, first = end, first + 1
        return np.concatenate(found)

    def group_end(self, epoch: int, position: int) -> int:
        """Where the group of this position ends, which is best read at once."""
        bounds = self.group_bounds(epoch)
        return int(bounds[np.searchsorted(bounds, position, side="right")])

    def identity(self) -> dict[str, Any]:
        """What makes it this order and no other."""
        names = ("samples", "shuffle", "block_samples", "buffer_blocks", "seed")
        return {name: getattr(self, name) for name in names}

    def group_bounds(self, epoch: int) -> Array:
        """Where groups begin, in positions of an epoch, and the last one ends: int64.

        Without blocks there is one group.
        """
        if self.shuffle != "block" or not self.samples:
            return np.array([0, self.samples])
        return self._epoch(epoch)[1]

    def _drawn(self, epoch: int) -> tuple[Array, Array]:
        """The blocks in the order of an epoch, and where each group begins."""
        drawn = Permutation(self._blocks, self.seed, _OF_BLOCKS, epoch).take(0, self._blocks)
        _, lengths = self._of_blocks(drawn)
        ends = np.cumsum(lengths)
        last = np.append(np.arange(self.buffer_blocks, self._blocks, self.buffer_blocks), 0) - 1
        return drawn, np.concatenate([[0], ends[last]])

    def _of_blocks(self, blocks: Array) -> tuple[Array, Array]:
        """First sample and number of samples of each block."""
        shards = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        within = (blocks - self._first_blocks[shards]) * self.block_samples
        lengths = np.minimum(self.block_samples, self._shards[shards] - within)
        return self._first_samples[shards] + within, lengths

    def _blocks_of_group(self, epoch: int, group: int) -> tuple[Array, Permutation]:
        """The samples of a group as they are stored, and how they are mixed."""
        drawn = self._epoch(epoch)[0]
        blocks = drawn[group * self.buffer_blocks : (group + 1) * self.buffer_blocks]
        starts, lengths = self._of_blocks(blocks)
        n = int(lengths.sum())
        samples: Array = np.arange(n) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        return samples, Permutation(n, self.seed, _IN_GROUP, epoch, group)

    def _mixed(self, epoch: int, group: int) -> Array:
        """The samples of a group, in their order."""
        samples, permutation = self._group(epoch, group)
        return samples[permutation.take(0, len(samples))]


class Endless:
    """The epochs of an order one after the other, without an end.

    Position p of epoch e is position p of what begins with the order's epoch e: of an order with n
    samples, position p modulo n of its epoch e + p // n.

    Args:
        order: with at least one sample.

    Raises:
        ConfigError: the order is empty.

    Example:
        >>> order = Order([3], 1, 3, seed=2)
        >>> [order.indices(epoch, 0, 3).tolist() for epoch in range(3)]
        [[2, 0, 1], [1, 0, 2], [0, 1, 2]]
        >>> Endless(order).indices(0, 2, 8).tolist()
        [1, 1, 0, 2, 0, 1]
    """

    def __init__(self, order: SampleOrder) -> None:
        if not order.samples:
            raise ConfigError("an empty data set has no endless stream of samples; write some")
        self._order = order
        self.seed = order.seed
        self.samples = sys.maxsize  # more than anybody reads

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at positions ``start`` to ``stop``, int64 ``[stop - start]``."""
        n = self._order.samples
        found = [np.zeros(0, np.int64)]
        while start < stop:
            passed, low = divmod(start, n)
            high = min(n, low + stop - start)
            found.append(self._order.indices(epoch + passed, low, high))
            start += high - low
        return np.concatenate(found)

    def group_end(self, epoch: int, position: int) -> int:
        """Where the group of this position ends."""
        passed, within = divmod(position, self._order.samples)
        return position - within + self._order.group_end(epoch + passed, within)

    def identity(self) -> dict[str, Any]:
        """What makes it this order and no other."""
        return self._order.identity()
