"""Which blocks keep what, and which are computed again: a plan, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scaledtrain.recompute.chain import Chain

__all__ = [
    "ELSEWHERE",
    "Cost",
    "Keep",
    "Plan",
    "Planned",
    "Recompute",
    "Step",
    "cost",
    "count_blocks",
    "depth",
    "every",
    "kept_bytes",
]


ELSEWHERE = "everything elsewhere"
"""The way of a block what is saved of which, but for crumbs, waits in a store."""


@dataclass(frozen=True)
class Keep:
    """Run one block so that its backward pass can follow.

    Args:
        way: the name of one of its ways.
        offload: its input, until the block runs again; only if the way does that.
    """

    way: str = "all"
    offload: bool = False


@dataclass(frozen=True)
class Recompute:
    """Run blocks and keep only their last output; before their backward pass, run them again.

    Args:
        plan: of the second time. It may compute again in its turn.
        offload: their input, until they run again.
    """

    plan: Plan
    offload: bool = False


Step = Keep | Recompute
Plan = tuple[Step, ...]
"""Of consecutive blocks."""


def count_blocks(plan: Plan) -> int:
    """How many blocks a plan is for.

    Example:
        >>> count_blocks((Recompute((Keep(), Keep())), Keep()))
        3
    """
    return sum(1 if isinstance(step, Keep) else count_blocks(step.plan) for step in plan)


def depth(plan: Plan) -> int:
    """How often blocks are inside of a `Recompute`, at most.

    Example:
        >>> depth((Recompute((Recompute((Keep(),)), Keep())), Keep()))
        2
    """
    return max((1 + depth(s.plan) for s in plan if isinstance(s, Recompute)), default=0)


def every(k: int, n_blocks: int) -> Plan:
    """Compute groups of ``k`` blocks again, the last of which may be smaller.

    Example:
        >>> [count_blocks((step,)) for step in every(2, 5)]
        [2, 2, 1]
    """
    sizes = [min(k, n_blocks - start) for start in range(0, n_blocks, k)]
    return tuple(Recompute((Keep(),) * size) for size in sizes)


class Cost(NamedTuple):
    """What a step comes to."""

    seconds: float
    peak_bytes: int


class Planned(NamedTuple):
    """What a plan is to come to, what keeping everything would, and what was found."""

    predicted: Cost
    everything: Cost
    measured_bytes: int
    """At most, when the plan was tried out; of all microbatches that are under way at once."""

    @property
    def predicted_more(self) -> float:
        """Time, as a part of that of keeping everything: 0.25 is a quarter more."""
        return self.predicted.seconds / self.everything.seconds - 1.0


def cost(chain: Chain, plan: Plan) -> Cost:
    """Go through a step as it will be executed.

    Args:
        chain: the blocks.
        plan: for all of them.

    Example:
        Two blocks that keep 9 bytes each, beside their input of 1. Everything: 18 bytes, the second
        one's input, and the gradient of its output while its backward pass has 11. Computed again,
        the first one's input is there anyway.

        >>> from scaledtrain.recompute.chain import Block, Way
        >>> way = Way("all", 1.0, 2.0, 9, 10, 11, 1.0)
        >>> chain = Chain((Block((way,), 1, 1.0, 2),) * 2)
        >>> cost(chain, (Keep(), Keep()))
        Cost(seconds=6.0, peak_bytes=22)
        >>> cost(chain, (Recompute((Keep(),)), Keep()))
        Cost(seconds=7.0, peak_bytes=13)
    """
    assert count_blocks(plan) == len(chain)
    walk = _Walk(chain)
    walk.live = chain.base_bytes + chain.late_bytes + chain.blocks[-1].output_bytes
    walk.step(plan, 0, again=False)
    return Cost(walk.seconds, walk.peak)


def kept_bytes(chain: Chain, plan: Plan) -> int:
    """What is there between the forward and the backward pass.

    Example:
        The chain of `cost`: its second block's input and what both keep, or what the first one does
        not.

        >>> from scaledtrain.recompute.chain import Block, Way
        >>> way = Way("all", 1.0, 2.0, 9, 10, 11, 1.0)
        >>> chain = Chain((Block((way,), 1, 1.0, 2),) * 2)
        >>> kept_bytes(chain, (Keep(), Keep())), kept_bytes(chain, (Recompute((Keep(),)), Keep()))
        (19, 10)
    """
    walk = _Walk(chain)
    walk.live = chain.base_bytes
    walk.step(plan, 0, again=False)
    return walk.kept


class _Walk:
    """Adds up what happens; what comes late, as the last gradient, counts from the beginning."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.live = 0
        self.peak = 0
        self.kept = 0
        self.seconds = 0.0

    def _reaches(self, more: int) -> None:
        self.peak = max(self.peak, self.live + more)

    def step(self, plan: Plan, first: int, again: bool) -> None:
        """Forward, then backward; ``again``: the forward pass is made for the backward pass.

        Of blocks that run again, the first one's input is somebody else's, who has counted it.
        """
        blocks = self._chain.blocks
        places = list(_places(plan, first))
        end = places[-1][2]
        own: list[int] = []  # bytes of the step's input, unless they have been counted
        counted = again
        for step, start, stop in places:
            own.append(0 if counted else self._chain.input_bytes(start))
            self.live += own[-1]
            if isinstance(step, Keep):
                way = blocks[start].way(step.way)
                self._reaches(way.forward_bytes)
                self.live += way.kept_bytes
                stopped = again and stop == end
                self.seconds += way.stopped_seconds if stopped else way.forward_seconds
                keeps_input, counted = way.keeps_input, way.keeps_output
            else:
                seconds, most = self._chain.without_keeping(start, stop - 1)
                self._reaches(most)
                self.seconds += seconds
                keeps_input, counted = True, False
            if step.offload:
                assert self._chain.offload_seconds is not None
                self.seconds += own[-1] * self._chain.offload_seconds
            if step.offload or not keeps_input:
                self.live -= own[-1]
        if not again:
            self.kept = self.live
        for (step, start, _), n_bytes in zip(reversed(places), reversed(own), strict=True):
            if step.offload:
                self.live += n_bytes
            if isinstance(step, Keep):
                way = blocks[start].way(step.way)
                self.live -= way.kept_bytes
                self._reaches(way.backward_bytes)
                self.seconds += way.backward_seconds
                self.live += self._chain.input_bytes(start) - blocks[start].output_bytes
                keeps_input = way.keeps_input
            else:
                self.step(step.plan, start, again=True)
                keeps_input = True
            if keeps_input:
                self.live -= n_bytes


def _places(plan: Sequence[Step], first: int) -> Iterator[tuple[Step, int, int]]:
    """Each step with its first block, and the one after its last."""
    for step in plan:
        stop = first + count_blocks((step,))
        yield step, first, stop
        first = stop
