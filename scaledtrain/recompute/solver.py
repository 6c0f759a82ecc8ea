"""The fastest plan within a number of bytes, by dynamic programming over the chain.

For blocks i..l with m bytes, the gradient of the last output and the input of the first block
included, either block i keeps what its backward pass needs, in one of its ways,

    T(m, i, l) = f_i + T(m - kept_i, i + 1, l) + b_i

or blocks i..j-1 are run without keeping anything but their input, and again when the rest is done:

    T(m, i, l) = sum_{k=i}^{j-1} f_k + T(m - a_{i-1}, j, l) + T(m - a_{i-1}, i, j - 1)

each where the bytes that it takes meanwhile fit. What runs again may have its input a_{i-1} written
to somewhere else meanwhile: then the rest has m bytes, and the way there and back is added. Whoever
needs a block's input counts it, unless it is there anyway: then T is another one. Every plan of
these kinds of steps is considered, so the result is the fastest of them, for sizes rounded up to a
unit. Many sizes below a unit make it think that little fits; so it is compared with all fixed
plans, whose sizes are added up exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaledtrain.recompute.chain import Block, Chain, Way
from scaledtrain.recompute.plan import Keep, Plan, Recompute, Step, cost, every

__all__ = ["fastest_plan", "smallest_bytes"]

_UNITS = 1000  # into which a budget is divided, unless the sizes have a larger divisor

_Times = NDArray[np.float64]


def fastest_plan(chain: Chain, peak_bytes: int) -> Plan | None:
    """The plan that takes the least time of those that need at most so many bytes; None: none does.

    Args:
        chain: the blocks.
        peak_bytes: of activations, at any moment of the step.

    Example:
        Four blocks that keep 9 bytes, beside their input of 1. Everything is 40 bytes, a gradient,
        and a byte on the way. In 25 bytes one block is kept beside the one whose turn it is, and
        two are run again.

        >>> from scaledtrain.recompute.plan import cost
        >>> way = Way("all", 1.0, 2.0, 9, 10, 11, 1.0)
        >>> chain = Chain((Block((way,), 1, 1.0, 2),) * 4)
        >>> cost(chain, fastest_plan(chain, 42))
        Cost(seconds=12.0, peak_bytes=42)
        >>> cost(chain, fastest_plan(chain, 25)).seconds, fastest_plan(chain, 12)
        (14.0, None)

    References:
        Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly, Shilova 2019, Optimal checkpointing for
        heterogeneous chains (INRIA RR-9302; rotor). Here a block may have several ways.
    """
    limit = min(peak_bytes - chain.base_bytes - chain.late_bytes, _enough(chain))
    found = None if limit < 0 else _Table(chain, limit).plan()
    least = math.inf if found is None else cost(chain, found).seconds
    for plan in _fixed_plans(chain):
        seconds, peak = cost(chain, plan)
        if peak <= peak_bytes and seconds < least:
            found, least = plan, seconds
    return found


def smallest_bytes(chain: Chain) -> int:
    """The least budget for which there is a plan, up to a thousandth of what everything needs."""
    table = _Table(chain, _enough(chain))
    whole = _Part(0, len(chain) - 1, False, False)
    units = int(np.argmax(np.isfinite(table.times(whole))))
    least = units * table.unit + chain.base_bytes + chain.late_bytes
    least = min(least, *(cost(chain, plan).peak_bytes for plan in _fixed_plans(chain)))
    while fastest_plan(chain, least) is None:  # which rounds to other units
        least += table.unit
    return least


def _fixed_plans(chain: Chain) -> Iterator[Plan]:
    """Groups of one size, and one way for all blocks; what comes after them is kept."""
    blocks = chain.blocks[:-1]
    n = len(blocks)
    for k in range(1, n + 1 if all(block.joins for block in blocks[1:]) else min(2, n + 1)):
        yield (*every(k, n), Keep())
    for name in sorted({way.name for block in blocks for way in block.ways} | {"all"}):
        has = [any(way.name == name for way in block.ways) for block in blocks]
        yield (*(Keep(name if own else "all") for own in has), Keep())


def _enough(chain: Chain) -> int:
    """Bytes with which every plan fits, without those that are always there."""
    ways = [way for block in chain.blocks for way in block.ways]
    kept = sum(
        max(way.kept_bytes for way in block.ways) + block.output_bytes for block in chain.blocks
    )
    working = max(max(way.forward_bytes, way.backward_bytes) for way in ways)
    working = max(working, *(block.forward_bytes for block in chain.blocks))
    most = max(block.output_bytes for block in chain.blocks)
    return chain.first_input_bytes + kept + working + most


class _Part(NamedTuple):
    """Consecutive blocks, and in which situation they run."""

    first: int
    last: int
    again: bool
    """The forward pass is made for the backward pass alone."""
    counted: bool
    """The first block's input is there anyway, and in nobody's count here."""


class _Option(NamedTuple):
    """What can be done with the first block of a part, or several."""

    way: str | None
    """Of the first block; None: what is before the rest is computed again."""
    rest: int
    """Its first block."""
    offload: bool
    stays: int
    """Units that are kept while the rest has its turn."""
    counted: bool
    """The rest's input is among them."""
    least: int
    """Units that it needs."""
    seconds: _Times
    """With that many units and more."""


class _Table:
    """T for every part of a chain and every number of units.

    Parts of equal blocks are solved once: of n equal blocks there are n different parts, not n^2.

    Args:
        chain: the blocks.
        limit: bytes, without those that are always there.
    """

    def __init__(self, chain: Chain, limit: int) -> None:
        self.unit = _unit(chain, limit)
        self._chain = chain
        self._blocks = chain.blocks
        self._top = limit // self.unit
        self._outputs = [self._units(block.output_bytes) for block in chain.blocks]
        self._kinds = _kinds(chain)
        self._solved: dict[tuple[bytes, bool, int], _Times] = {}
        end = len(chain) - 1
        for length in range(1, len(chain) + 1):
            for counted in (True, False):
                for first in range(len(chain) - length + 1):
                    self._solve(_Part(first, first + length - 1, True, counted))
                self._solve(_Part(len(chain) - length, end, False, counted))

    def _key(self, part: _Part) -> tuple[bytes, bool, int]:
        kinds = self._kinds[2 * part.first : 2 * part.last + 2]
        return kinds, part.again, 0 if part.counted else self._chain.input_bytes(part.first)

    def _input(self, part: _Part) -> int:
        """Units of the first block's input, unless they are in nobody's count."""
        return 0 if part.counted else self._units(self._chain.input_bytes(part.first))

    def times(self, part: _Part) -> _Times:
        """By units, the least seconds."""
        return self._solved[self._key(part)]

    def _solve(self, part: _Part) -> None:
        key = self._key(part)
        if key in self._solved:
            return
        best = np.full(self._top + 1, math.inf)
        for option in self._options(part):
            np.minimum(best[option.least :], option.seconds, out=best[option.least :])
        self._solved[key] = best

    def _options(self, part: _Part) -> Iterator[_Option]:
        for way in self._blocks[part.first].ways:
            if part.again and way.first_pass_only:
                continue
            yield from self._keeping(part, way, False)
            if way.runs_again and self._can_offload(part):
                yield from self._keeping(part, way, True)
        forward_seconds, most, before, end = 0.0, 0, 0, self._outputs[part.last]
        own = self._input(part)
        for rest in range(part.first + 1, part.last + 1):
            if rest > part.first + 1 and not self._blocks[rest - 1].joins:
                return
            block = self._blocks[rest - 1]
            forward_seconds += block.forward_seconds
            most = max(most, before + block.forward_bytes)
            before = block.output_bytes
            least = own + self._units(most) + end
            if least > self._top:
                return
            inner = self.times(_Part(part.first, rest - 1, True, True))
            seconds = inner[least - own : self._top + 1 - own] + forward_seconds
            for offload in (False, True) if self._can_offload(part) else (False,):
                stays = 0 if offload else own
                after = self.times(_Part(rest, part.last, part.again, False))
                all_seconds = after[least - stays : self._top + 1 - stays] + seconds
                if offload:
                    all_seconds += self._offload_seconds(part)
                yield _Option(None, rest, offload, stays, False, least, all_seconds)

    def _keeping(self, part: _Part, way: Way, offload: bool) -> Iterator[_Option]:
        """Run the first block in one of its ways."""
        first, last, again, _ = part
        seconds = way.stopped_seconds if again and first == last else way.forward_seconds
        seconds += way.backward_seconds
        if offload:
            seconds += self._offload_seconds(part)
        own = self._input(part)
        kept_input = own if way.keeps_input else 0
        stays = self._units(way.kept_bytes) + (0 if offload else kept_input)
        least = max(
            stays,
            own + self._units(way.forward_bytes) + self._outputs[last],
            kept_input + self._outputs[first] + self._units(way.backward_bytes),
        )
        if least > self._top:
            return
        times = np.full(self._top + 1 - least, float(seconds))
        if first < last:
            rest = self.times(_Part(first + 1, last, again, way.keeps_output))
            times += rest[least - stays : self._top + 1 - stays]
        yield _Option(way.name, first + 1, offload, stays, way.keeps_output, least, times)

    def _can_offload(self, part: _Part) -> bool:
        return self._chain.offload_seconds is not None and self._input(part) > 0

    def _offload_seconds(self, part: _Part) -> float:
        return self._chain.input_bytes(part.first) * (self._chain.offload_seconds or 0.0)

    def _units(self, n_bytes: int) -> int:
        return -(-n_bytes // self.unit)

    def plan(self) -> Plan | None:
        """Of the whole chain, with all units."""
        whole = _Part(0, len(self._blocks) - 1, False, False)
        if math.isinf(self.times(whole)[self._top]):
            return None
        return tuple(self._steps(self._top, whole))

    def _steps(self, units: int, part: _Part) -> Iterator[Step]:
        while part.first <= part.last:
            fitting = [option for option in self._options(part) if option.least <= units]
            best = min(fitting, key=lambda option: option.seconds[units - option.least])
            if best.way is not None:
                yield Keep(best.way, best.offload)
            else:
                inner = _Part(part.first, best.rest - 1, True, True)
                steps = self._steps(units - self._input(part), inner)
                yield Recompute(tuple(steps), best.offload)
            units -= best.stays
            part = _Part(best.rest, part.last, part.again, best.counted)


def _kinds(chain: Chain) -> bytes:
    """Two bytes for each block; equal blocks have equal ones."""
    numbers: dict[Block, int] = {}
    kinds = [numbers.setdefault(block, len(numbers)) for block in chain.blocks]
    return b"".join(kind.to_bytes(2, "big") for kind in kinds)


def _unit(chain: Chain, limit: int) -> int:
    """Bytes of a unit: exact if the sizes allow it."""
    sizes = {0, chain.first_input_bytes}
    for block in chain.blocks:
        sizes |= {block.output_bytes, block.forward_bytes}
        for way in block.ways:
            sizes |= {way.kept_bytes, way.forward_bytes, way.backward_bytes}
    divisor = math.gcd(*sizes) or 1
    return max(divisor, -(-limit // _UNITS))
