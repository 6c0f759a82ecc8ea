"""The fastest plan within a number of bytes, by dynamic programming over the chain.

For blocks i..l with m bytes, the gradient of the last output included, either block i keeps what
its backward pass needs, in one of its ways,

    T(m, i, l) = f_i + T(m - kept_i, i + 1, l) + b_i

or blocks i..j-1 are run without keeping anything but their last output, and again when the rest is
done:

    T(m, i, l) = sum_{k=i}^{j-1} f_k + T(m - a_{j-1}, j, l) + T(m, i, j - 1)

each where the bytes that it takes meanwhile fit. Every plan of these two kinds of steps is
considered, so the result is the fastest of them, for sizes rounded up to a unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from scaledtrain.recompute.chain import Block, Chain, Way
from scaledtrain.recompute.plan import Keep, Plan, Recompute, Step

__all__ = ["fastest_plan", "smallest_bytes"]

_UNITS = 1000  # into which a budget is divided, unless the sizes have a larger divisor

_Times = NDArray[np.float64]


def fastest_plan(chain: Chain, peak_bytes: int) -> Plan | None:
    """The plan that takes the least time of those that need at most so many bytes; None: none does.

    Args:
        chain: the blocks.
        peak_bytes: of activations, at any moment of the step.

    Example:
        Four blocks that keep 10 bytes, of which 1 is the output. Everything is 40 bytes, a
        gradient, and a byte on the way. In 20 bytes one block is kept, and three are run again.

        >>> from scaledtrain.recompute.plan import cost
        >>> way = Way("all", 1.0, 2.0, 10, 10, 11, 1.0, 9)
        >>> chain = Chain((Block((way,), 1, 1.0, 2),) * 4)
        >>> cost(chain, fastest_plan(chain, 42))
        Cost(seconds=12.0, peak_bytes=42)
        >>> cost(chain, fastest_plan(chain, 25)).seconds, fastest_plan(chain, 12)
        (14.0, None)

    References:
        Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly, Shilova 2019, Optimal checkpointing for
        heterogeneous chains (INRIA RR-9302; rotor). Here a block may have several ways.
    """
    limit = min(peak_bytes - chain.base_bytes, _enough(chain))
    return None if limit < 0 else _Table(chain, limit).plan()


def smallest_bytes(chain: Chain) -> int:
    """The least budget for which there is a plan, up to a thousandth of what everything needs."""
    table = _Table(chain, _enough(chain))
    units = int(np.argmax(np.isfinite(table.times(0, len(chain) - 1, False))))
    return units * table.unit + chain.base_bytes


def _enough(chain: Chain) -> int:
    """Bytes with which every plan fits, without those that are always there."""
    ways = [way for block in chain.blocks for way in block.ways]
    kept = sum(max(way.kept_bytes for way in block.ways) for block in chain.blocks)
    working = max(max(way.forward_bytes, way.backward_bytes) for way in ways)
    working = max(working, *(block.forward_bytes for block in chain.blocks))
    return kept + working + max(block.output_bytes for block in chain.blocks)


class _Table:
    """T for every part of a chain and every number of units.

    Parts of equal blocks are solved once: of n equal blocks there are n different parts, not n^2.

    Args:
        chain: the blocks.
        limit: bytes, without those that are always there.
    """

    def __init__(self, chain: Chain, limit: int) -> None:
        self.unit = _unit(chain, limit)
        self._blocks = chain.blocks
        self._top = limit // self.unit
        self._outputs = [self._units(block.output_bytes) for block in chain.blocks]
        self._kinds = _kinds(chain)
        self._solved: dict[tuple[bytes, bool], _Times] = {}
        end = len(chain) - 1
        for length in range(1, len(chain) + 1):
            for first in range(len(chain) - length + 1):
                self._solve(first, first + length - 1, True)
            self._solve(len(chain) - length, end, False)

    def _key(self, first: int, last: int, again: bool) -> tuple[bytes, bool]:
        return self._kinds[2 * first : 2 * last + 2], again

    def times(self, first: int, last: int, again: bool) -> _Times:
        """By units, the least seconds of the blocks from ``first`` to ``last``.

        Args:
            first: block.
            last: block.
            again: the forward pass is made for the backward pass alone.
        """
        return self._solved[self._key(first, last, again)]

    def _solve(self, first: int, last: int, again: bool) -> None:
        key = self._key(first, last, again)
        if key in self._solved:
            return
        best = np.full(self._top + 1, math.inf)
        for _, least, seconds in self._options(first, last, again):
            np.minimum(best[least:], seconds, out=best[least:])
        self._solved[key] = best

    def _options(
        self, first: int, last: int, again: bool
    ) -> Iterator[tuple[tuple[int, int], int, _Times]]:
        """What can be done with the first block, or several.

        Yields:
            The way and the first block of the rest, the way -1 if what is before the rest is
            computed again; the units that it needs; and the seconds with that many and more.
        """
        for index, way in enumerate(self._blocks[first].ways):
            least, seconds = self._kept(way, first, last, again)
            if least <= self._top:
                yield (index, first + 1), least, seconds
        forward_seconds, most, before, end = 0.0, 0, 0, self._outputs[last]
        for rest in range(first + 1, last + 1):
            block, output = self._blocks[rest - 1], self._outputs[rest - 1]
            forward_seconds += block.forward_seconds
            most = max(most, before + block.forward_bytes)
            before = block.output_bytes
            least = max(self._units(most) + end, output)
            if least > self._top:
                return
            seconds = self.times(rest, last, again)[least - output : self._top + 1 - output]
            yield (
                (-1, rest),
                least,
                seconds + self.times(first, rest - 1, True)[least:] + forward_seconds,
            )

    def _kept(self, way: Way, first: int, last: int, again: bool) -> tuple[int, _Times]:
        stopped = again and first == last
        kept = self._units(way.stopped_bytes if stopped else way.kept_bytes)
        seconds = way.stopped_seconds if stopped else way.forward_seconds
        seconds += way.backward_seconds
        least = max(
            kept,
            self._units(way.forward_bytes) + self._outputs[last],
            self._outputs[first] + self._units(way.backward_bytes),
        )
        if first == last:
            return least, np.full(max(0, self._top + 1 - least), seconds)
        rest = self.times(first + 1, last, again)
        return least, rest[least - kept : self._top + 1 - kept] + seconds

    def _units(self, n_bytes: int) -> int:
        return -(-n_bytes // self.unit)

    def plan(self) -> Plan | None:
        """Of the whole chain, with all units."""
        last = len(self._blocks) - 1
        if math.isinf(self.times(0, last, False)[self._top]):
            return None
        return tuple(self._steps(self._top, 0, last, False))

    def _steps(self, units: int, first: int, last: int, again: bool) -> Iterator[Step]:
        while first <= last:
            options = self._options(first, last, again)
            fitting = [(s[units - least], o) for o, least, s in options if least <= units]
            _, (way, rest) = min(fitting)
            if way >= 0:
                yield Keep(way)
                units -= self._units(self._blocks[first].ways[way].kept_bytes)
            else:
                yield Recompute(tuple(self._steps(units, first, rest - 1, True)))
                units -= self._outputs[rest - 1]
            first = rest


def _kinds(chain: Chain) -> bytes:
    """Two bytes for each block; equal blocks have equal ones."""
    numbers: dict[Block, int] = {}
    kinds = [numbers.setdefault(block, len(numbers)) for block in chain.blocks]
    return b"".join(kind.to_bytes(2, "big") for kind in kinds)


def _unit(chain: Chain, limit: int) -> int:
    """Bytes of a unit: exact if the sizes allow it."""
    sizes = {0}
    for block in chain.blocks:
        sizes |= {block.output_bytes, block.forward_bytes}
        for way in block.ways:
            sizes |= {way.kept_bytes, way.forward_bytes, way.backward_bytes, way.stopped_bytes}
    divisor = math.gcd(*sizes) or 1
    return max(divisor, -(-limit // _UNITS))
