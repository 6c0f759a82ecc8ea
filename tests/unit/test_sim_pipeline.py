"""Pipelines on the virtual cluster: how long their stages are idle is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import pytest

from scaledtrain.sim import Topology, Wire
from scaledtrain.sim.network import Network
from scaledtrain.sim.post import Post
from scaledtrain.sim.world import World

FORWARD, BACKWARD = 1.0, 2.0  # seconds of a microbatch in a stage


class Pass(NamedTuple):
    """Forward or backward of one microbatch through one chunk of the model."""

    is_forward: bool
    microbatch: int
    chunk: int
    """From 0, in the order of the forward pass; stage s of p has chunks s, s + p, ..."""


def gpipe(stage: int, p: int, m: int) -> list[Pass]:
    """All forward, then all backward."""
    forward = [Pass(True, i, stage) for i in range(m)]
    return forward + [Pass(False, i, stage) for i in range(m)]


def one_forward_one_backward(stage: int, p: int, m: int) -> list[Pass]:
    """p - 1 - stage forward first; then one of each in turns, the forward one first."""
    return in_turns(gpipe(stage, p, m), min(m, p - 1 - stage))


def interleaved(stage: int, p: int, m: int, v: int = 2) -> list[Pass]:
    """The same with v chunks in each stage, p microbatches at a time through each of them."""
    groups = [range(first, first + p) for first in range(0, m, p)]
    forward = [Pass(True, i, stage + p * c) for g in groups for c in range(v) for i in g]
    backward = [
        Pass(False, i, stage + p * (v - 1 - c)) for g in groups for c in range(v) for i in g
    ]
    return in_turns(forward + backward, min(m * v, 2 * (p - 1 - stage) + (v - 1) * p))


def in_turns(passes: Sequence[Pass], first: int) -> list[Pass]:
    n = len(passes) // 2
    forward, backward = passes[:n], passes[n:]
    mixed = [one for pair in zip(forward[first:], backward, strict=False) for one in pair]
    return [*forward[:first], *mixed, *backward[n - first :]]


def seconds(schedules: Sequence[Sequence[Pass]], hop: float = 0.0, v: int = 1) -> float:
    """Of a step in which each stage makes its passes in its order, as what they need has come.

    Args:
        schedules: by stage.
        hop: seconds that activations or gradients take from a stage to another.
        v: chunks in each stage, of which each takes 1/v of a stage's time.
    """
    p = len(schedules)
    last = p * v - 1
    world = World(p, own_generators=False)
    wire = Wire(latency_seconds=hop, gigabits_per_second=math.inf)
    post = Post(world, Network(Topology(ranks_per_host=p, hosts=1, port=wire), p))
    come: set[Pass] = set()

    def needed(one: Pass) -> Pass | None:
        """What has to have come: activations of the chunk before, or gradients of the next one."""
        if one.is_forward:
            return None if one.chunk == 0 else one
        return one if one.chunk < last else None

    def work(stage: int) -> None:
        me = world.ranks[stage]
        for one in schedules[stage]:
            while needed(one) not in come | {None}:
                me.wait(f"for what {one} needs")
            me.sleep_until(world.now + (FORWARD if one.is_forward else BACKWARD) / v)
            following = one.chunk + (1 if one.is_forward else -1)
            if 0 <= following <= last:
                there = following % p
                post.send(
                    post.route(stage, there), 0, stage,
                    partial(arrive, one._replace(chunk=following), there),
                )  # fmt: skip

    def arrive(what: Pass, stage: int) -> None:
        come.add(what)
        if world.ranks[stage].doing is not None:
            world.ranks[stage].wake()

    for rank in world.ranks:
        rank.start(partial(work, rank.number))
    world.run()
    return world.now


@pytest.mark.parametrize(("p", "m"), [(2, 1), (4, 4), (4, 8), (8, 32)])
@pytest.mark.parametrize("schedule", [gpipe, one_forward_one_backward])
def test_idle_are_p_minus_1_of_m_plus_p_minus_1(schedule: object, p: int, m: int) -> None:
    assert callable(schedule)
    took = seconds([schedule(stage, p, m) for stage in range(p)])
    # The first microbatch reaches the last stage after p - 1 others' forward passes, and the last
    # one's gradient the first stage after as many backward passes.
    assert took == (m + p - 1) * (FORWARD + BACKWARD)
    idle = 1 - Fraction(m * 3, int(took))
    assert idle == Fraction(p - 1, m + p - 1)


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 4), (4, 8)])
def test_interleaved_chunks_shorten_the_bubble(p: int, m: int) -> None:
    v = 2
    took = seconds([interleaved(stage, p, m, v) for stage in range(p)], v=v)
    # Idle beside m (F + B) of work: (p - 1) / v of a microbatch's time, (p - 1) / (v m) of it.
    assert took == (m + (p - 1) / v) * (FORWARD + BACKWARD)


def test_a_hop_delays_the_filling_and_the_emptying_alone() -> None:
    p, m, hop = 4, 8, 0.25
    took = seconds([gpipe(stage, p, m) for stage in range(p)], hop)
    # Each of p - 1 hops there, and back; in between messages travel while stages compute.
    assert took == (m + p - 1) * (FORWARD + BACKWARD) + 2 * (p - 1) * hop
