"""A rank's part of a step's samples, and batches cut and joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from scaledtrain.data.ragged import Ragged

__all__ = ["Divisible", "Division", "count_samples", "cut", "join"]


class Division(NamedTuple):
    """Of each ``total`` samples, in their order, the ones from ``start`` to ``stop``.

    Example:
        >>> division = Division(start=6, stop=16, total=16, microbatches=2, most=4)
        >>> division.part(16), division.part(8)  # the last step of an epoch has fewer
        ((6, 16), (3, 8))
        >>> division.pieces(6, 16)
        [(6, 9), (9, 12), (12, 16)]
    """

    start: int
    stop: int
    total: int
    microbatches: int = 1
    """At least, of a step, as long as each has a sample."""
    most: int | None = None
    """Samples in one of them; None: any number."""

    def part(self, samples: int) -> tuple[int, int]:
        """This rank's, of a step with so many samples, in the same proportions."""
        twice = 2 * self.total
        return (
            (2 * self.start * samples + self.total) // twice,  # rounded, the same for neighbours
            (2 * self.stop * samples + self.total) // twice,
        )

    def pieces(self, low: int, high: int, at_least: int = 1) -> list[tuple[int, int]]:
        """Samples low to high in microbatches that are as equal as can be."""
        n = high - low
        if n <= 0:
            return []
        count = max(min(at_least, n), math.ceil(n / (self.most or n)))
        ends = [low + n * i // count for i in range(count + 1)]
        return list(pairwise(ends))

    def take(self, batches: Sequence[Any]) -> tuple[list[Any], int]:
        """This rank's microbatches of a step's batches, and how many samples the step has."""
        sizes = [count_samples(batch) for batch in batches]
        low, high = self.part(sum(sizes))
        mine: list[Any] = []
        first = 0
        for batch, size in zip(batches, sizes, strict=True):
            a, b = max(low - first, 0), min(high - first, size)
            if a < b:
                mine.append(cut(batch, a, b))
            first += size
        at_least = self.microbatches
        try:
            mine = [join(mine)] if mine else []
        except _MisfitError:  # padded to different lengths, say: each stays by itself
            at_least = 1
        pieces = [
            cut(batch, *piece)
            for batch in mine
            for piece in self.pieces(0, count_samples(batch), at_least)
        ]
        return pieces, sum(sizes)


@runtime_checkable
class Divisible(Protocol):
    """A loader that gives a rank any part of each step, and reads no other samples."""

    def parts(
        self, epoch: int, start: int, batches: int, division: Division, seed: int | None = None
    ) -> Any:
        """See `ShardedLoader.parts`."""


def count_samples(batch: Any) -> int:
    """Length of the first dimension of the first tensor (or list) in a batch."""
    if isinstance(batch, Ragged):
        return batch.samples
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        return count_samples(next(iter(batch.values())))
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        return count_samples(first) if isinstance(first, (Mapping, tuple, list)) else len(batch)
    return 1


def cut(batch: Any, low: int, high: int) -> Any:
    """Samples low to high of a batch, in the same memory.

    Whatever has not one entry for each sample stays whole.

    Example:
        >>> cut((torch.arange(4), ["a", "b", "c", "d"], 0.5), 1, 3)
        (tensor([1, 2]), ['b', 'c'], 0.5)
    """
    return _cut(batch, count_samples(batch), low, high)


def _cut(value: Any, n: int, low: int, high: int) -> Any:
    if (low, high) == (0, n):
        return value
    if isinstance(value, Ragged):
        offsets = value.offsets[low : high + 1]
        return Ragged(value.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
    if isinstance(value, Tensor):
        return value[low:high] if value.dim() and len(value) == n else value
    if isinstance(value, Mapping):
        return {key: _cut(column, n, low, high) for key, column in value.items()}
    if isinstance(value, (tuple, list)):
        if len(value) == n and not any(_holds_more(one) for one in value):
            return value[low:high]
        return _like(value, [_cut(column, n, low, high) for column in value])
    return value


class _MisfitError(Exception):
    """Batches that cannot be one."""


def join(batches: Sequence[Any]) -> Any:
    """Batches, of the same structure, as one."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if any(type(batch) is not type(first) for batch in batches):
        raise _MisfitError
    if isinstance(first, Ragged):
        lengths = torch.cat([batch.offsets.diff() for batch in batches])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Ragged(torch.cat([batch.values for batch in batches]), offsets)
    if isinstance(first, Tensor):
        if not first.dim() or any(batch.shape[1:] != first.shape[1:] for batch in batches):
            raise _MisfitError
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: join([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        if first and not any(_holds_more(one) for one in first):
            return type(first)(one for batch in batches for one in batch)
        return _like(first, [join(columns) for columns in zip(*batches, strict=True)])
    if isinstance(first, (str, int, float, type(None))) and len(set(batches)) == 1:
        return first
    raise _MisfitError


def _holds_more(value: Any) -> bool:
    return isinstance(value, (Tensor, Mapping, tuple, list))


def _like(value: Any, columns: list[Any]) -> Any:
    return type(value)(*columns) if hasattr(value, "_fields") else type(value)(columns)
