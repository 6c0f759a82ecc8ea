"""What holds for the server under every policy and correction, whatever happens in which order.

A world of workers is driven by a list of choices that hypothesis makes: who does something next,
and whether it pushes a good or a broken gradient, gives none, dies, or comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scaledtrain.replica import Updater
from scaledtrain.server import (
    AdaptiveDelayCompensated,
    Admission,
    Asynchronous,
    BackupWorkers,
    Correction,
    Dana,
    DelayAdaptive,
    DelayCompensated,
    GapAware,
    Ledger,
    Pushed,
    Rennala,
    Ringmaster,
    Server,
    SoftSync,
    StalenessAware,
    StaleSynchronous,
    Synchronous,
    Uncorrected,
)

# The same examples in every run.
fixed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)

small = st.integers(1, 5)
policies = st.one_of(
    st.builds(Asynchronous),
    st.builds(Synchronous),
    st.builds(BackupWorkers, small),
    st.builds(SoftSync, small),
    st.builds(StaleSynchronous, st.integers(0, 3)),
    st.builds(Rennala, small),
    st.builds(Ringmaster, small, st.booleans()),
)
corrections = st.sampled_from(
    [
        Uncorrected(),
        StalenessAware(),
        DelayAdaptive(),
        DelayCompensated(),
        AdaptiveDelayCompensated(0.1),
        GapAware(),
        Dana(0.5),
    ]
)
# A worker's number (modulo their count) and what it does if it computes; most often it pushes.
choices = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["push"] * 5 + ["nan", "skip", "die"])),
    min_size=10,
    max_size=80,
)
workers = st.integers(1, 6)


class World:
    """Workers, each computing, waiting or dead, around one server."""

    def __init__(self, n: int, admission: Admission, correction: Correction) -> None:
        def make(parameters: Sequence[nn.Parameter]) -> Updater:
            return Updater([("x", parameters[0])], partial(torch.optim.SGD, lr=0.1))

        self.server = Server([torch.ones(2)], make, n, admission, correction)
        self.computing: dict[int, tuple[Tensor, int]] = {}
        self.n_pushed = 0
        self.n_accepted = 0

    def act(self, worker: int, what: str) -> None:
        """The next thing that this worker can do."""
        server = self.server
        if worker not in server.members:
            server.add(worker)
        elif worker not in self.computing:
            if server.may_go_on(worker):
                (x,) = server.pull(worker)
                self.computing[worker] = x.detach().clone(), server.version
        elif what == "die":
            del self.computing[worker]
            server.remove(worker)
        elif what == "skip":
            del self.computing[worker]
            server.skip(worker)
        else:
            self.push(worker, broken=what == "nan")

    def push(self, worker: int, broken: bool) -> Pushed:
        gradient, version = self.computing.pop(worker)
        if broken:
            gradient = torch.full_like(gradient, math.nan)
        pushed = self.server.push(worker, [gradient], version)
        assert not (broken and pushed.accepted)
        self.n_pushed += 1
        self.n_accepted += pushed.accepted
        return pushed

    def runnable(self) -> list[int]:
        server = self.server
        return [w for w in server.members if w in self.computing or server.may_go_on(w)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@fixed
@given(workers, policies, corrections, choices)
def test_versions_grow_and_every_push_is_counted(
    n: int, admission: Admission, correction: Correction, events: list[tuple[int, str]]
) -> None:
    """A version grows by at most one per event; accepted + rejected = pushed."""
    world = World(n, admission, correction)
    ledger = world.server.ledger
    for worker, what in events:
        version, slowest = ledger.version, ledger.slowest
        world.act(worker % n, what)
        assert version <= ledger.version <= version + 1
        assert slowest <= ledger.slowest
        assert sum(ledger.pushed) == world.n_pushed
        assert sum(ledger.accepted) == world.n_accepted
        assert ledger.gathered == sum(ledger.pending.values())
        assert ledger.slowest == min((ledger.clocks[w] for w in ledger.members), default=slowest)
        assert world.server.parameters[0].isfinite().all()


@fixed
@given(workers, policies, corrections, choices)
def test_somebody_can_always_run(
    n: int, admission: Admission, correction: Correction, events: list[tuple[int, str]]
) -> None:
    """No deadlock, whoever pushes what and whoever leaves."""
    world = World(n, admission, correction)
    for worker, what in events:
        world.act(worker % n, what)
        assert world.runnable() or not world.server.members


@fixed
@given(workers, policies, choices)
def test_nobody_waits_for_ever(n: int, admission: Admission, events: list[tuple[int, str]]) -> None:
    """Once all that can run do, every member pushes, and again, and again."""
    world = World(n, admission, Uncorrected())
    for worker, what in events:
        world.act(worker % n, what)
    pushed = world.server.ledger.pushed
    for _ in range(3):
        before = list(pushed)
        for _ in range(2 * (5 + n)):  # a bound of 3, one step more, a pull and a push each
            for worker in sorted(world.server.members):
                world.act(worker, "push")
        assert all(pushed[w] > before[w] for w in world.server.members)


@fixed
@given(workers, st.integers(0, 3), choices)
def test_the_lead_stays_within_the_bound(n: int, bound: int, events: list[tuple[int, str]]) -> None:
    """At most the bound while a worker computes, and one more while it waits."""
    world = World(n, StaleSynchronous(bound), Uncorrected())
    ledger = world.server.ledger
    for worker, what in events:
        world.act(worker % n, what)
        for w in ledger.members:
            lead = ledger.clocks[w] - min(ledger.clocks[m] for m in ledger.members)
            assert lead <= (bound if w in world.computing else bound + 1)


@fixed
@given(workers, policies, corrections, choices, st.sampled_from(["nan", "shape", "stale"]))
def test_a_rejected_gradient_changes_nothing(
    n: int, admission: Admission, correction: Correction, events: list[tuple[int, str]], how: str
) -> None:
    """But the clock and the count of its worker."""

    def kept(server: Server) -> dict[str, Any]:
        state = server.state_dict()
        counts = ("clocks", "slowest", "pushed", "computing")
        ledger = {k: v for k, v in state["ledger"].items() if k not in counts}
        return {**state, "ledger": ledger, "sent": None}  # what it had been sent is used up

    world = World(n, admission, correction)
    for worker, what in events:
        world.act(worker % n, what)
    for worker, (gradient, version) in world.computing.items():
        if how == "stale" and world.server.ledger.admits(worker, world.server.version - version):
            continue
        broken = {"nan": gradient * math.nan, "shape": gradient[:1], "stale": gradient}[how]
        before = kept(world.server)
        pushed = world.server.push(worker, [broken], version)
        assert not pushed.accepted
        assert (pushed.fault is None) == (how == "stale")
        assert same(before, kept(world.server))


@fixed
@given(workers, policies, corrections, choices, choices)
def test_restored_goes_on_alike(
    n: int,
    admission: Admission,
    correction: Correction,
    before: list[tuple[int, str]],
    after: list[tuple[int, str]],
) -> None:
    one, two = World(n, admission, correction), World(n, admission, correction)
    for worker, what in before:
        one.act(worker % n, what)
    two.server.load_state_dict(one.server.state_dict())
    two.computing = dict(one.computing)
    for worker, what in after:
        for world in (one, two):
            world.act(worker % n, what)
    assert same(one.server.state_dict(), two.server.state_dict())


@fixed
@given(workers, policies, choices)
def test_decisions_follow_from_the_order_of_events_alone(
    n: int, admission: Admission, events: list[tuple[int, str]]
) -> None:
    """A ledger that is told who pulled, pushed, left and came, in order, decides as the server."""
    world, told = World(n, admission, Uncorrected()), Ledger(n, admission)
    for worker, what in events:
        worker %= n
        server, ledger = world.server, world.server.ledger
        was_member, was_computing = worker in server.members, worker in world.computing
        version = world.computing[worker][1] if was_computing else ledger.version
        admitted = told.admits(worker, told.version - version)
        accepted = ledger.accepted[worker]
        world.act(worker, what)
        if not was_member:
            told.add(worker)
        elif not was_computing:
            if told.may_go_on(worker):
                told.pull(worker)
        elif what == "die":
            told.remove(worker)
        elif what == "skip":
            told.skip(worker)
        else:
            told.push(worker, version, admitted and what == "push")
            assert (ledger.accepted[worker] > accepted) == (admitted and what == "push")
        if told.completes:
            told.update()
        assert told.state_dict() == ledger.state_dict()


@fixed
@given(workers, small, choices)
def test_only_work_that_would_be_refused_is_given_up(
    n: int, threshold: int, events: list[tuple[int, str]]
) -> None:
    world = World(n, Ringmaster(threshold, stop=True), Uncorrected())
    for worker, what in events:
        world.act(worker % n, what)
        late = [w for w, (_, v) in world.computing.items() if world.server.version - v >= threshold]
        assert world.server.to_abandon() == sorted(late)
