"""What every strategy keeps to on two replicas: over shared memory, over gloo, and simulated."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scaledtrain import Replica, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.connection import Transport
from scaledtrain.sim import Cluster, Gamma, SlowWorkers, Topology, Wire, simulate
from tests.contract.cases import CASES, Case
from tests.contract.training import SGD, SaveAt, batches, flat, net, plain_training, trainer
from tests.ranks import run_ranks

RANKS = 2
REAL: list[Transport] = ["shared_memory", "torch"]
World = Transport | Literal["simulated"]
WORLDS: list[World] = [*REAL, "simulated"]
HOST = Topology(ranks_per_host=2, hosts=1, port=Wire(1e-4, gigabits_per_second=1.0))
UNEVEN = Cluster(Gamma(seconds=0.01, shape=4.0), HOST, SlowWorkers({1: 1.5}))


class Alone(NamedTuple):
    """A plain loop in which this replica skipped some updates."""

    clock: int
    in_lockstep: bool
    before: Tensor
    inside_consensus: Tensor
    after_consensus: Tensor
    final: Tensor


class Outcome(NamedTuple):
    """What one replica saw of one strategy."""

    equal_data: Tensor
    runs: list[Tensor]
    resumed: Tensor | None
    steps: int
    skipping: Alone
    met: tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """By world, rank and strategy; a transport is one run of real processes."""
    real: Outcomes = {t: run_ranks(over, RANKS, t, timeout_seconds=100) for t in REAL}
    return {**real, "simulated": simulate(every_case, UNEVEN, RANKS).results}


Outcomes = dict[World, list[dict[str, Outcome]]]

every_strategy = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
in_every_world = pytest.mark.parametrize("world", WORLDS)


def over(transport: Transport) -> dict[str, Outcome]:
    with connect(transport=transport, timeout_seconds=20) as link:
        return every_case(link)


def every_case(link: Link) -> dict[str, Outcome]:
    return {case.name: observe(case, link) for case in CASES}


def observe(case: Case, link: Link) -> Outcome:
    rank, n = link.group.rank, link.group.size
    # Batch i goes to replica i modulo n: with each of them n times, all have the same.
    equal = trainer(strategy=case.make(n), link=link)
    equal.fit([batch for batch in batches(40) for _ in range(n)], max_epochs=1)

    # 21 batches: the last is smaller, and the second replica has none in the eleventh step.
    uneven = batches(4 * 10 * n + 2)
    save = SaveAt(5)
    drop = partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5)
    straight = trainer(strategy=case.make(n), lr_scheduler=drop, link=link, callbacks=[save])
    steps = straight.fit(uneven, max_epochs=1).step
    again = trainer(strategy=case.make(n), lr_scheduler=drop, link=link)
    again.fit(uneven, max_epochs=1)
    resumed = None
    if case.deterministic and straight.strategy.lockstep.size == n:
        from_five = trainer(strategy=case.make(n), lr_scheduler=drop, link=link)
        from_five.load_state_dict(save.state)
        from_five.fit(uneven, max_epochs=1)
        resumed = flat(from_five.model)
    skipped = [2, 3, 7] if rank == 1 or not case.skips_alone else [3]
    return Outcome(
        flat(equal.model),
        [flat(straight.model), flat(again.model)],
        resumed,
        steps,
        train_by_hand(case, link, steps=10, skipped=skipped),
        meet(case, link),
    )


def train_by_hand(case: Case, link: Link, steps: int, skipped: list[int]) -> Alone:
    """As a user's own loop does it; in the steps ``skipped`` there is no update."""
    strategy, model = case.make(link.group.size), net()
    replica = Replica(model, SGD)
    strategy.attach(replica, link)
    strategy.start(None)
    for step, (x, y) in enumerate(batches(4 * 2 * steps)[link.group.rank :: 2]):
        replica.zero_grad()
        assert strategy.before_forward()
        F.cross_entropy(model(x), y).backward()
        strategy.reduce_gradients()
        if step not in skipped:
            strategy.apply_gradients()
        strategy.after_step()
    clock = strategy.step
    in_lockstep = strategy.lockstep.size == link.group.size
    before = vector(replica)
    with strategy.consensus():
        inside = vector(replica)
    after = vector(replica)
    strategy.settle()
    return Alone(clock, in_lockstep, before, inside, after, vector(replica))


def meet(case: Case, link: Link) -> tuple[Tensor, Tensor]:
    """Replicas that differ make three steps without an update; parameters before and after."""
    strategy = case.make(link.group.size)
    replica = Replica(net(), SGD)
    strategy.attach(replica, link)
    strategy.start(None)
    with torch.no_grad():
        for parameter in replica.parameters:
            parameter += 1.0 + link.group.rank
    before = vector(replica)
    for _ in range(3):
        strategy.before_forward()
        strategy.reduce_gradients()
        strategy.after_step()
    after = vector(replica)
    strategy.settle()
    return before, after


def vector(replica: Replica) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in replica.parameters])


@cache
def plain() -> Tensor:
    return plain_training(batches(40))


@in_every_world
@every_strategy
def test_equal_data_is_one_process(case: Case, world: World, outcomes: Outcomes) -> None:
    """The mean of n equal values is that value; for n = 2 without rounding."""
    for rank in outcomes[world]:
        final = rank[case.name].equal_data
        assert torch.equal(final, outcomes[world][0][case.name].equal_data)
        if case.equal_data and case.tolerance is not None:
            torch.testing.assert_close(final, plain(), rtol=case.tolerance, atol=case.tolerance)
        elif case.equal_data is not None:
            assert not torch.allclose(final, plain(), rtol=1e-5, atol=1e-5)


@in_every_world
@every_strategy
def test_replicas_end_equal_and_runs_repeat(case: Case, world: World, outcomes: Outcomes) -> None:
    """In all worlds the same bits: a sum of two has no order."""
    first = outcomes[WORLDS[0]][0][case.name]
    for rank in outcomes[world]:
        outcome = rank[case.name]
        for run, expected in zip(outcome.runs, outcomes[world][0][case.name].runs, strict=True):
            assert torch.equal(run, expected)
        if case.deterministic:
            assert outcome.steps == 11
            assert all(torch.equal(run, first.runs[0]) for run in outcome.runs)
        if outcome.resumed is not None:
            assert torch.equal(outcome.resumed, first.runs[0])


@in_every_world
@every_strategy
def test_skipped_updates_do_not_part_the_replicas(
    case: Case, world: World, outcomes: Outcomes
) -> None:
    zero, one = (rank[case.name].skipping for rank in outcomes[world])
    assert torch.equal(zero.final, one.final)
    for replica in (zero, one):
        if case.own_memory:
            assert torch.equal(replica.after_consensus, replica.before)
        if replica.in_lockstep:
            assert replica.clock == 10
            assert torch.equal(replica.inside_consensus, replica.final)


@in_every_world
@pytest.mark.parametrize("case", [c for c in CASES if c.keeps_mean], ids=lambda case: case.name)
def test_meeting_keeps_the_mean(case: Case, world: World, outcomes: Outcomes) -> None:
    """Parameters of about 1: a rounding of 6e-8 each in a difference, a sum and a quotient."""
    met: list[Any] = [rank[case.name].met for rank in outcomes[world]]
    (zero, one), (zero_after, one_after) = zip(*met, strict=True)
    torch.testing.assert_close(zero_after + one_after, zero + one, rtol=1e-6, atol=1e-6)
    assert (one_after - zero_after).norm() < 0.9 * (one - zero).norm()
