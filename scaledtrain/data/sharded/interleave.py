"""Which source every position of a mixture takes its sample from: a pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.errors import ConfigError

__all__ = ["Interleave"]

LARGEST_SUM = 2**31  # of the shares: a product of two numbers below it fits into int64


class Interleave:
    """An endless sequence of sources in given proportions, as even as can be.

    Nothing is drawn: of the first p positions source i has p times its share, give or take
    ``ceil(log2(sources)) / 2``, for every p: half a sample with two sources, one with up to four.
    Random draws would be off by the square root of p, and to find how many of them fell on a source
    before some position one would have to draw them all; here it is a few divisions.

    The sources are halved, and the halves again, down to single ones. Of p positions of a whole
    with share w the left half, of share l, gets ``floor(p l / w + 1/2)``, the right one the rest.
    Both only grow with p, so each position belongs to one source; each halving rounds by at most
    1/2, and what is rounded above reaches a part in proportion to its share.

    Args:
        weights: of the sources, > 0, of any sum. Kept exactly as long as they have few digits, like
            0.7 and 0.3, else to one part in a thousand million.

    Attributes:
        shares: whole numbers in proportion to the weights.

    Raises:
        ConfigError: no weight, or one that is not > 0 and finite.

    Example:
        >>> sources, numbers = Interleave([0.75, 0.25]).take(0, 8)
        >>> sources.tolist(), numbers.tolist()  # sample 2 of source 0 comes at position 3
        ([0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 2, 3, 4, 1, 5])
        >>> Interleave([0.75, 0.25]).counts(10**15 + 2)
        [750000000000002, 250000000000000]
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for weight in weights:
            if not 0 < weight < math.inf:
                raise ConfigError(
                    f"a weight is {weight}; it is a number > 0, and a source that is not wanted is "
                    "left out"
                )
        if not weights:
            raise ConfigError("there is no source; give at least one, with its weight")
        self.shares = _whole(weights)
        self._before = [0, *accumulate(self.shares)]

    def counts(self, position: int) -> list[int]:
        """How many of the first ``position`` samples are from each source."""
        found = [0] * len(self.shares)
        halves = [(position, 0, len(self.shares))]
        while halves:
            size, low, high = halves.pop()
            if high - low == 1:
                found[low] = size
                continue
            middle = (low + high) // 2
            left = int(self._left(size, low, middle, high))
            halves += [(left, low, middle), (size - left, middle, high)]
        return found

    def take(self, start: int, stop: int) -> tuple[Array, Array]:
        """Of positions ``start`` to ``stop``: the source, and which of its samples, from 0 on.

        Returns:
            int64 ``[stop - start]`` twice.
        """
        sources = np.zeros(stop - start, np.int64)
        numbers = np.arange(start, stop, dtype=np.int64)
        halves = [(np.arange(stop - start), 0, len(self.shares))]
        while halves:
            places, low, high = halves.pop()
            if high - low == 1:
                sources[places] = low
                continue
            middle, at = (low + high) // 2, numbers[places]
            before = self._left(at, low, middle, high)
            goes_left = self._left(at + 1, low, middle, high) > before
            numbers[places] = np.where(goes_left, before, at - before)
            halves += [(places[goes_left], low, middle), (places[~goes_left], middle, high)]
        return sources, numbers

    def _left(self, size: Array | int, low: int, middle: int, high: int) -> Array | int:
        """How many of so many positions of sources low to high go to those below the middle."""
        left, both = (
            self._before[middle] - self._before[low],
            self._before[high] - self._before[low],
        )
        # size * left / both, rounded, in two parts of which none is too large for int64.
        return size // both * left + (size % both * left + both // 2) // both


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(part.denominator for part in exact))
    shares = [int(part * scale) for part in exact]
    common = math.gcd(*shares)
    shares = [share // common for share in shares]
    total = sum(shares)
    if total >= LARGEST_SUM:
        most = LARGEST_SUM - len(shares)  # of which each may be rounded up by one
        shares = [max(1, share * most // total) for share in shares]
    return tuple(shares)
