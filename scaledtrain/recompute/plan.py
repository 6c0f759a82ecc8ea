"""Which blocks keep what, and which are computed again: a plan, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scaledtrain.recompute.chain import Chain

__all__ = ["Cost", "Keep", "Plan", "Recompute", "Step", "cost", "count_blocks", "every"]


@dataclass(frozen=True)
class Keep:
    """Run one block so that its backward pass can follow.

    Args:
        way: which of its ways.
    """

    way: int = 0


@dataclass(frozen=True)
class Recompute:
    """Run blocks and keep only their last output; before their backward pass, run them again.

    Args:
        plan: of the second time. It may compute again in its turn.
    """

    plan: Plan


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


def cost(chain: Chain, plan: Plan) -> Cost:
    """Go through a step as it will be executed.

    Args:
        chain: the blocks.
        plan: for all of them.

    Example:
        Two blocks that keep 10 bytes each, 1 of them their output, and one more in the backward
        pass. Everything: 20 bytes, and the last gradient. Computed again, at first only outputs
        are there.

        >>> from scaledtrain.recompute.chain import Block, Way
        >>> way = Way("all", 1.0, 2.0, 10, 10, 11, 1.0, 9)
        >>> chain = Chain((Block((way,), 1, 1.0, 2),) * 2)
        >>> cost(chain, (Keep(), Keep()))
        Cost(seconds=6.0, peak_bytes=22)
        >>> cost(chain, (Recompute((Keep(),)), Keep()))
        Cost(seconds=7.0, peak_bytes=13)
    """
    assert count_blocks(plan) == len(chain)
    walk = _Walk(chain)
    walk.live = chain.base_bytes + chain.blocks[-1].output_bytes
    walk.step(plan, 0, again=False)
    return Cost(walk.seconds, walk.peak)


class _Walk:
    """Adds up what happens; the gradient of the last output counts from the beginning."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.live = 0
        self.peak = 0
        self.seconds = 0.0

    def _reaches(self, more: int) -> None:
        self.peak = max(self.peak, self.live + more)

    def step(self, plan: Plan, first: int, again: bool) -> None:
        """Forward, then backward; ``again``: the forward pass is made for the backward pass."""
        blocks = self._chain.blocks
        places = list(_places(plan, first))
        end = places[-1][2]
        for step, start, stop in places:
            if isinstance(step, Keep):
                way = blocks[start].ways[step.way]
                self._reaches(way.forward_bytes)
                stopped = again and stop == end
                self.live += way.stopped_bytes if stopped else way.kept_bytes
                self.seconds += way.stopped_seconds if stopped else way.forward_seconds
            else:
                seconds, most = self._chain.without_keeping(start, stop - 1)
                self._reaches(most)
                self.live += blocks[stop - 1].output_bytes
                self.seconds += seconds
        for step, start, stop in reversed(places):
            if isinstance(step, Keep):
                way = blocks[start].ways[step.way]
                stopped = again and stop == end
                self.live -= way.stopped_bytes if stopped else way.kept_bytes
                self._reaches(way.backward_bytes)
                self.seconds += way.backward_seconds
                self._gradient_moves(start)
            else:
                self.live -= blocks[stop - 1].output_bytes
                self.step(step.plan, start, again=True)

    def _gradient_moves(self, block: int) -> None:
        """The gradient of the block's output is given up for that of its input."""
        before = self._chain.blocks[block - 1].output_bytes if block else 0
        self.live += before - self._chain.blocks[block].output_bytes


def _places(plan: Sequence[Step], first: int) -> Iterator[tuple[Step, int, int]]:
    """Each step with its first block, and the one after its last."""
    for step in plan:
        stop = first + count_blocks((step,))
        yield step, first, stop
        first = stop
