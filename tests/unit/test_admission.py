"""Admission policies, traced by hand on a quadratic with two parameters.

Worker w has the loss (a x^2 + b y^2) / 2 and so the gradient (a x, b y) with its own (a, b). Every
number is a fraction that float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from scaledtrain.errors import ConfigError
from scaledtrain.replica import Updater
from scaledtrain.server import (
    Admission,
    Asynchronous,
    BackupWorkers,
    Pushed,
    Rennala,
    Ringmaster,
    Server,
    ServerView,
    SoftSync,
    StaleSynchronous,
    Synchronous,
)

Pair = tuple[float, float]


class Cluster:
    """A server at (4, 2) and workers that compute when they are told to."""

    def __init__(self, admission: Admission, lr: float, curvatures: Sequence[Pair]) -> None:
        def make(parameters: list[nn.Parameter]) -> Updater:
            return Updater([("x", parameters[0])], partial(torch.optim.SGD, lr=lr))

        self.curvatures = [torch.tensor(pair) for pair in curvatures]
        self.server = Server([torch.tensor([4.0, 2.0])], make, len(curvatures), admission)
        self.computing: dict[int, tuple[torch.Tensor, int]] = {}
        self.pull(*range(len(curvatures)))

    def pull(self, *workers: int) -> None:
        for worker in workers:
            assert self.server.may_go_on(worker)
            (x,) = self.server.pull(worker)
            self.computing[worker] = self.curvatures[worker] * x.detach(), self.server.version

    def gradient(self, worker: int) -> Pair:
        x, y = self.computing[worker][0].tolist()
        return x, y

    def push(self, worker: int) -> Pushed:
        gradient, version = self.computing.pop(worker)
        return self.server.push(worker, [gradient], version)

    @property
    def x(self) -> Pair:
        x, y = self.server.parameters[0].tolist()
        return x, y

    @property
    def version(self) -> int:
        return self.server.version

    def waiting(self) -> list[int]:
        idle = [w for w in sorted(self.server.members) if w not in self.computing]
        return [w for w in idle if not self.server.may_go_on(w)]


def test_asynchronous() -> None:
    c = Cluster(Asynchronous(), 1 / 2, [(1, 2), (1, 2)])  # both at (4, 2): gradient (4, 4)
    assert c.push(0) == Pushed(True, 0)
    assert c.x == (2, 0)  # (4, 2) - (4, 4)/2
    c.pull(0)  # gradient (2, 0)
    assert c.push(1) == Pushed(True, 1)
    assert c.x == (0, -2)  # (2, 0) - (4, 4)/2
    c.pull(1)  # gradient (0, -4)
    assert c.push(0) == Pushed(True, 1)
    assert c.x == (-1, -2)  # (0, -2) - (2, 0)/2
    assert c.push(1) == Pushed(True, 1)
    assert c.x == (-1, 0)  # (-1, -2) - (0, -4)/2
    assert c.waiting() == []


def test_synchronous() -> None:
    c = Cluster(Synchronous(), 1 / 4, [(1, 2), (3, 2)])  # (4, 4) and (12, 4), mean (8, 4)
    assert c.push(0) == Pushed(True, 0)
    assert c.x == (4, 2)
    assert c.waiting() == [0]
    assert c.push(1) == Pushed(True, 0)
    assert c.x == (2, 1)  # (4, 2) - (8, 4)/4
    assert c.waiting() == []
    c.pull(0, 1)  # (2, 2) and (6, 2), mean (4, 2)
    c.push(1)
    c.push(0)
    assert c.x == (1, 1 / 2)  # (2, 1) - (4, 2)/4
    assert c.version == 2


def test_synchronous_takes_one_gradient_of_each() -> None:
    c = Cluster(Synchronous(), 1 / 4, [(1, 2), (3, 2)])
    c.push(0)
    assert c.server.push(0, [torch.ones(2)], 0) == Pushed(False, 0)
    c.push(1)
    assert c.x == (2, 1)


def test_backup_workers() -> None:
    c = Cluster(BackupWorkers(k=2), 1 / 4, [(1, 2), (3, 2), (5, 2)])
    c.push(0)  # (4, 4)
    assert c.waiting() == [0]
    c.push(2)  # (20, 4)
    assert c.x == (1, 1)  # (4, 2) - (12, 4)/4
    assert c.push(1) == Pushed(False, 1)  # late: dropped
    assert c.x == (1, 1)
    c.pull(0, 1)  # late ones go on at once: (1, 2) and (3, 2)
    c.push(1)
    c.push(0)
    assert c.x == (1 / 2, 1 / 2)  # (1, 1) - (2, 2)/4


def test_backup_workers_count_anew_when_some_die() -> None:
    c = Cluster(BackupWorkers(k=3), 1 / 4, [(1, 2)] * 4)
    c.push(0)
    c.push(1)
    c.server.remove(2)  # three are left: 0, 1 and 3
    assert c.version == 0
    c.server.remove(3)  # two are left, and both have given
    assert c.x == (3, 1)  # (4, 2) - (4, 4)/4
    assert c.waiting() == []


def test_softsync() -> None:
    c = Cluster(SoftSync(2), 1 / 4, [(1, 2), (3, 2), (5, 2)])
    assert c.push(0) == Pushed(True, 0)  # (4, 4)
    assert c.x == (4, 2)
    c.pull(0)  # at once, still at version 0: (4, 4)
    assert c.push(1) == Pushed(True, 0)  # (12, 4)
    assert c.x == (2, 1)  # (4, 2) - (8, 4)/4
    assert c.push(2) == Pushed(True, 1)  # (20, 4)
    assert c.push(0) == Pushed(True, 1)  # (4, 4)
    assert c.x == (-1, 0)  # (2, 1) - (12, 4)/4
    assert c.waiting() == []


def test_stale_synchronous() -> None:
    c = Cluster(StaleSynchronous(staleness_bound=1), 1 / 2, [(1, 2), (1, 2)])
    c.push(0)  # (4, 4)
    assert c.x == (2, 0)
    c.pull(0)  # one step ahead: allowed. (2, 0)
    c.push(0)
    assert c.x == (1, 0)
    assert c.waiting() == [0]  # two ahead
    assert c.push(1) == Pushed(True, 2)  # (4, 4)
    assert c.x == (-1, -2)
    assert c.waiting() == []
    c.pull(0)  # (-1, -4)
    c.push(0)
    assert c.x == (-1 / 2, 0)  # (-1, -2) + (1, 4)/2
    assert c.waiting() == [0]
    c.server.remove(1)
    assert c.waiting() == []


def test_stale_synchronous_bound_0_goes_round_by_round() -> None:
    c = Cluster(StaleSynchronous(0), 1 / 2, [(1, 2)] * 3)
    c.push(1)
    c.push(0)
    assert c.waiting() == [0, 1]
    c.push(2)
    assert c.waiting() == []
    assert c.version == 3  # an update for each gradient, unlike Synchronous


def test_stale_synchronous_staleness_reaches_what_the_docstring_says() -> None:
    """(n - 1)(2 bound + 1): while one computes, the others go from -bound to bound + 1."""
    bound = 2
    c = Cluster(StaleSynchronous(bound), 0.0, [(1, 2)] * 2)
    for _ in range(bound):
        c.push(1)
        c.pull(1)
    c.push(1)
    assert c.server.clocks == [0, 3]
    assert c.waiting() == [1]
    c.push(0)
    c.pull(0, 1)  # worker 1 at clock 3 pulls, two ahead of worker 0 at clock 1 = 3 - bound
    n_pushes = 0
    while 0 not in c.waiting():
        c.push(0)
        n_pushes += 1
        if c.server.may_go_on(0):
            c.pull(0)
    assert n_pushes == 2 * bound + 1
    assert c.push(1).staleness == 2 * bound + 1


def test_rennala() -> None:
    c = Cluster(Rennala(batch=2), 1 / 2, [(1, 2), (3, 2)])
    c.push(0)  # (4, 4)
    c.pull(0)  # at once, and at the same version
    assert c.push(0) == Pushed(True, 0)  # (4, 4) again
    assert c.x == (2, 0)  # (4, 2) - (4, 4)/2: a fast worker may make the update alone
    assert c.push(1) == Pushed(False, 1)  # of version 0: dropped
    assert c.x == (2, 0)
    c.pull(0, 1)  # (2, 0) and (6, 0)
    c.push(1)
    c.push(0)
    assert c.x == (0, 0)  # (2, 0) - (4, 0)/2
    assert c.waiting() == []


@pytest.mark.parametrize("stop", [False, True])
def test_ringmaster(stop: bool) -> None:
    c = Cluster(Ringmaster(delay_threshold=2, stop=stop), 1 / 2, [(1, 2), (1, 2)])
    c.push(0)  # (4, 4)
    assert c.x == (2, 0)
    c.pull(0)  # (2, 0)
    assert c.server.to_abandon() == []  # worker 1 would have missed one update
    c.push(0)
    assert c.x == (1, 0)
    assert c.server.to_abandon() == ([1] if stop else [])
    if not stop:
        assert c.push(1) == Pushed(False, 2)  # two updates missed: ignored
        assert c.x == (1, 0)
    c.pull(1)  # (1, 0); with stop: without having pushed
    assert c.server.to_abandon() == []
    assert c.push(1) == Pushed(True, 0)
    assert c.x == (1 / 2, 0)
    assert c.server.clocks == ([2, 1] if stop else [2, 2])


def test_ringmaster_refuses_also_what_could_not_be_stopped_in_time() -> None:
    c = Cluster(Ringmaster(1, stop=True), 1 / 2, [(1, 2), (1, 2)])
    c.push(0)
    assert c.server.to_abandon() == [1]
    assert c.push(1) == Pushed(False, 1)
    assert c.server.to_abandon() == []


def test_ringmaster_with_threshold_1_uses_no_stale_gradient() -> None:
    c = Cluster(Ringmaster(1), 1 / 2, [(1, 2), (1, 2)])
    assert [c.push(0).accepted, c.push(1).accepted] == [True, False]


def test_a_policy_of_ones_own() -> None:
    """Backup workers by a share: half of those that take part."""

    @dataclass(frozen=True)
    class Half(Admission):
        def accepts(self, worker: int, staleness: int, server: ServerView) -> bool:
            return staleness == 0

        def gradients_per_update(self, n_members: int) -> int:
            return (n_members + 1) // 2

    c = Cluster(Half(), 1 / 4, [(1, 2)] * 4)
    accepted = [c.push(worker).accepted for worker in range(4)]
    assert accepted == [True, True, False, False]
    assert c.x == (3, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BackupWorkers(0), "BackupWorkers: k is 0; .* at least 1"),
        (lambda: SoftSync(0), "SoftSync: c is 0; .* at least 1"),
        (lambda: StaleSynchronous(-1), "staleness_bound is -1; .* at least 0"),
        (lambda: Rennala(0), "Rennala: batch is 0"),
        (lambda: Ringmaster(0), "delay_threshold is 0; it is the least staleness that is refused"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_policies_are_values() -> None:
    assert Ringmaster(3) == Ringmaster(delay_threshold=3, stop=False)
    assert repr(BackupWorkers(2)) == "BackupWorkers(k=2)"
    with pytest.raises(FrozenInstanceError):
        SoftSync(2).c = 3  # type: ignore[misc]
