"""A rank's part of a step's samples."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

from scaledtrain.balance.shares import apportion
from scaledtrain.data.cut import MisfitError, count_samples, cut, join

__all__ = ["Divisible", "Division"]


class Division(NamedTuple):
    """Which samples of a step, in their order, are this rank's, and in which microbatches.

    Example:
        >>> division = Division([6, 10], replica=1, microbatches=2, most=4)
        >>> division.part(16), division.part(8)  # the last step of an epoch has fewer
        ((6, 16), (3, 8))
        >>> division.pieces(6, 16)
        [(6, 9), (9, 12), (12, 16)]
    """

    shares: Sequence[int]
    """By replica, of a full step."""
    replica: int
    piece: tuple[int, int] = (0, 1)
    """(i, n): of the replica's samples this rank has the i-th of n equal parts."""
    microbatches: int = 1
    """At least, of a step, as long as each has a sample."""
    most: int | None = None
    """Samples in one of them; None: any number."""

    def part(self, samples: int) -> tuple[int, int]:
        """This rank's, of a step with so many; each replica has one, if there are enough."""
        shares = self.shares
        if samples != sum(shares):
            shares = apportion(shares, samples)
        (i, n), own = self.piece, shares[self.replica]
        before = sum(shares[: self.replica])
        return before + own * i // n, before + own * (i + 1) // n

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
        except MisfitError:  # padded to different lengths, say: each stays by itself
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
    ) -> Generator[tuple[list[Any], int], None, None]:
        """See `ShardedLoader.parts`."""
