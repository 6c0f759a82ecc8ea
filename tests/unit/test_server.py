"""The pure server: every number below can be checked by hand."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.replica import Updater
from scaledtrain.server import (
    DelayCompensated,
    GapAware,
    Pushed,
    Ringmaster,
    Server,
    SoftSync,
    StaleSynchronous,
    Synchronous,
)


def server_at(
    x: float, *, lr: float, n_workers: int, momentum: float = 0.0, **rules: Any
) -> Server:
    """One parameter, at x, with plain SGD."""

    def make(parameters: list[nn.Parameter]) -> Updater:
        return Updater([("x", parameters[0])], partial(torch.optim.SGD, lr=lr, momentum=momentum))

    return Server([torch.tensor([x])], make, n_workers, **rules)


def gradient(g: float) -> list[Tensor]:
    return [torch.tensor([g])]


def two_tensors(**rules: Any) -> Server:
    """Parameters (1, 1) and ((1, 1), (1, 1)), learning rate 1."""

    def make(parameters: list[nn.Parameter]) -> Updater:
        return Updater(list(zip("ab", parameters, strict=True)), partial(torch.optim.SGD, lr=1.0))

    return Server([torch.ones(2), torch.ones(2, 2)], make, 2, **rules)


def test_asynchronous_updates_once_per_push_and_counts_staleness() -> None:
    server = server_at(1.0, lr=0.5, n_workers=3)
    # All three pull version 0 and push in turn: staleness 0, 1, 2.
    assert server.push(0, gradient(1.0), 0) == Pushed(True, 0)  # 1 - 0.5 * 1 = 0.5
    assert server.push(1, gradient(-2.0), 0) == Pushed(True, 1)  # 0.5 + 0.5 * 2 = 1.5
    assert server.push(2, gradient(4.0), 0) == Pushed(True, 2)  # 1.5 - 0.5 * 4 = -0.5
    assert server.parameters[0].item() == -0.5
    assert server.version == 3
    assert server.clocks == [1, 1, 1]


def test_equal_workers_reach_staleness_n_minus_1() -> None:
    """Measured at the arrival of a push; the first round has 0, 1, .. n - 1, then always n - 1."""
    n = 4
    server = server_at(0.0, lr=0.1, n_workers=n)
    versions = [0] * n
    seen = []
    for _ in range(5):
        for worker in range(n):
            seen.append(server.push(worker, gradient(0.0), versions[worker]).staleness)
            server.pull(worker)
            versions[worker] = server.version
    assert seen == [0, 1, 2, 3] + [3] * 16


def test_no_update_beyond_the_limit() -> None:
    server = server_at(1.0, lr=1.0, n_workers=2)
    server.last_version = 1
    assert server.push(0, gradient(1.0), 0).accepted
    assert server.push(1, gradient(5.0), 0) == Pushed(False, 1)
    assert server.parameters[0].item() == 0.0  # only the first: 1 - 1
    assert server.finished


def test_momentum_and_schedule_live_on_the_server() -> None:
    def make(parameters: list[nn.Parameter]) -> Updater:
        optimizer = partial(torch.optim.SGD, lr=1.0, momentum=0.5)
        halve = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        return Updater([("x", parameters[0])], optimizer, halve)

    server = Server([torch.tensor([0.0])], make, 2)
    server.push(0, gradient(1.0), 0)  # v = 1, lr 1: x = -1
    assert server.learning_rate == 0.5
    server.push(1, gradient(1.0), 0)  # v = 0.5 + 1 = 1.5, lr 0.5: x = -1 - 0.75
    assert server.parameters[0].item() == -1.75
    assert server.learning_rate == 0.25


def test_server_does_not_share_memory_with_the_model() -> None:
    x = torch.tensor([1.0])
    server = server_at(0.0, lr=1.0, n_workers=1)
    server = Server([x], lambda p: Updater([("x", p[0])], partial(torch.optim.SGD, lr=1.0)), 1)
    server.push(0, gradient(1.0), 0)
    assert x.item() == 1.0


def test_no_workers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="n_workers is 0"):
        server_at(0.0, lr=1.0, n_workers=0)


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def without_counts(state: dict[str, Any]) -> dict[str, Any]:
    """All but what even a rejected push advances."""
    counts = ("clocks", "slowest", "pushed", "computing")
    ledger = {key: value for key, value in state["ledger"].items() if key not in counts}
    return {**state, "ledger": ledger}


class TestFaults:
    """A gradient that no policy can use is refused, named, and leaves no trace."""

    @pytest.mark.parametrize(
        ("broken", "why"),
        [
            ([torch.ones(2), torch.full((2, 2), math.nan)], "parameter 1 holds NaN or infinity"),
            ([torch.tensor([0.0, math.inf]), torch.ones(2, 2)], "parameter 0 holds NaN"),
            ([torch.tensor([-math.inf, math.inf]), torch.ones(2, 2)], "parameter 0 holds NaN"),
            ([torch.ones(2)], "a gradient of 1 tensors for 2 parameters"),
            ([torch.ones(2), torch.ones(4)], r"parameter 1 has shape \(4,\), not \(2, 2\)"),
            ([torch.ones(1), torch.ones(2, 2)], r"parameter 0 has shape \(1,\), not \(2,\)"),
            ([torch.ones(2), torch.ones(2, 2, dtype=torch.int64)], "parameter 1 is torch.int64"),
            # Finite in the worker's dtype, but not in the server's.
            ([torch.ones(2), torch.full((2, 2), 1e300, dtype=torch.float64)], "parameter 1 holds"),
        ],
    )
    @pytest.mark.parametrize("admission", [None, SoftSync(2), Synchronous()])
    def test_refused_and_named(self, broken: list[Tensor], why: str, admission: Any) -> None:
        server = two_tensors(admission=admission)
        server.push(0, [torch.ones(2), torch.ones(2, 2)], 0)  # makes an update, or waits for one
        before = without_counts(server.state_dict())
        pushed = server.push(1, broken, 0)
        assert not pushed.accepted
        assert pushed.fault is not None
        assert re.search(f"worker 1: .*{why}", pushed.fault)
        assert equal(without_counts(server.state_dict()), before)
        assert server.clocks == [1, 1]

    def test_the_worker_goes_on_with_its_next_batch(self) -> None:
        """Even where each worker's gradient is needed: the broken one does not count as given."""
        server = server_at(1.0, lr=1.0, n_workers=2, admission=Synchronous())
        server.push(0, gradient(math.nan), 0)
        server.push(1, gradient(1.0), 0)
        assert (server.version, server.may_go_on(0), server.may_go_on(1)) == (0, True, False)
        server.push(0, gradient(3.0), 0)
        assert server.parameters[0].item() == -1.0  # 1 - (3 + 1) / 2
        assert server.may_go_on(1)

    def test_large_is_not_infinite(self) -> None:
        """The sum overflows, no element does."""
        server = two_tensors()
        huge = torch.full((2,), 3e38)
        assert server.push(0, [huge, torch.zeros(2, 2)], 0) == Pushed(True, 0)
        assert torch.equal(server.parameters[0], 1.0 - huge)

    def test_a_version_of_the_future(self) -> None:
        pushed = server_at(1.0, lr=1.0, n_workers=1).push(0, gradient(1.0), 7)
        assert pushed.fault == "worker 0: version 7 does not exist yet; this is 0"

    def test_parameters_that_were_not_sent(self) -> None:
        """A correction that compares with what the worker had cannot be made without it."""
        server = server_at(1.0, lr=1.0, n_workers=2, correction=DelayCompensated())
        server.pull(1)
        fault = server.push(0, gradient(1.0), 0).fault
        assert fault == "worker 0 pushed a gradient of version 0, which it did not pull"
        server.pull(0)
        assert server.push(0, gradient(1.0), 0).accepted

    def test_a_worker_that_was_removed(self) -> None:
        server = server_at(1.0, lr=1.0, n_workers=2)
        server.remove(1)
        fault = server.push(1, gradient(1.0), 0).fault
        assert fault is not None
        assert "worker 1 does not take part" in fault
        with pytest.raises(ConfigError, match="worker 1 pulls but does not take part"):
            server.pull(1)

    @pytest.mark.parametrize("worker", [-1, 2])
    def test_a_worker_that_never_was(self, worker: int) -> None:
        server = server_at(1.0, lr=1.0, n_workers=2)
        match = f"there is no worker {worker}; this server knows workers 0 to 1"
        for act in (server.add, server.remove, server.skip):
            with pytest.raises(ConfigError, match=match):
                act(worker)
        with pytest.raises(ConfigError, match=match):
            server.push(worker, gradient(1.0), 0)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_state_is_float32_under_workers_of_less(self, dtype: torch.dtype) -> None:
        def make(parameters: list[nn.Parameter]) -> Updater:
            return Updater([("x", parameters[0])], partial(torch.optim.SGD, lr=2.0**-12))

        server = Server([torch.ones(1, dtype=dtype)], make, 1)
        server.push(0, [torch.ones(1, dtype=dtype)], 0)
        assert server.parameters[0].dtype == torch.float32
        # Lost in the worker's dtype: half of 2^-11 is the last that float16 can tell from 1.
        assert server.parameters[0].item() == 1.0 - 2.0**-12
        worker = torch.empty(1, dtype=dtype)
        torch._foreach_copy_([worker], list(server.pull(0)))
        assert worker.item() == 1.0

    def test_float64_stays(self) -> None:
        def make(parameters: list[nn.Parameter]) -> Updater:
            return Updater([("x", parameters[0])], partial(torch.optim.SGD, lr=1.0))

        server = Server([torch.ones(1, dtype=torch.float64)], make, 1)
        server.push(0, [torch.full((1,), 2.0**-40)], 0)
        assert server.parameters[0].item() == 1.0 - 2.0**-40

    def test_gradients_that_wait_are_summed_in_float32(self) -> None:
        server = server_at(0.0, lr=1.0, n_workers=1, admission=SoftSync(2))
        server.push(0, [torch.ones(1, dtype=torch.float16)], 0)
        server.push(0, [torch.full((1,), 2.0**-12, dtype=torch.float16)], 0)
        assert server.parameters[0].item() == -(1.0 + 2.0**-12) / 2


class TestState:
    def test_saved_and_restored_goes_on_alike(self) -> None:
        one, two = (server_at(1.0, lr=0.5, n_workers=2, momentum=0.9) for _ in range(2))
        one.push(0, gradient(1.0), 0)
        two.load_state_dict(one.state_dict())
        for server in (one, two):
            server.push(1, gradient(2.0), 0)
        assert equal(one.state_dict(), two.state_dict())
        assert (two.version, two.clocks) == (2, [1, 1])

    def test_gradients_that_wait_are_saved(self) -> None:
        one, two = (server_at(1.0, lr=1.0, n_workers=2, admission=SoftSync(2)) for _ in range(2))
        one.push(0, gradient(1.0), 0)
        two.load_state_dict(one.state_dict())
        two.push(1, gradient(3.0), 0)
        assert two.parameters[0].item() == -1.0  # 1 - (1 + 3) / 2
        assert (one.version, one.parameters[0].item()) == (0, 1.0)  # no memory in common

    def test_on_fewer_workers(self) -> None:
        """Those that stay do not wait for those that are gone, whose gradients are used."""
        three = server_at(1.0, lr=1.0, n_workers=3, admission=Synchronous())
        three.push(0, gradient(1.0), 0)
        three.push(2, gradient(3.0), 0)
        two = server_at(0.0, lr=1.0, n_workers=2, admission=Synchronous())
        two.load_state_dict(three.state_dict())
        two.push(1, gradient(2.0), 0)
        assert (two.version, two.parameters[0].item()) == (1, -1.0)  # 1 - (1 + 3 + 2) / 3

    def test_on_fewer_workers_that_all_waited(self) -> None:
        three = server_at(1.0, lr=1.0, n_workers=3, admission=Synchronous())
        three.push(0, gradient(1.0), 0)
        three.push(1, gradient(3.0), 0)
        two = server_at(0.0, lr=1.0, n_workers=2, admission=Synchronous())
        two.load_state_dict(three.state_dict())
        assert (two.version, two.parameters[0].item()) == (1, -1.0)  # 1 - (1 + 3) / 2
        assert two.may_go_on(0)
        assert two.may_go_on(1)

    def test_on_fewer_workers_without_the_slowest(self) -> None:
        policy = StaleSynchronous(0)
        three = server_at(1.0, lr=1.0, n_workers=3, admission=policy)
        three.push(0, gradient(1.0), 0)
        three.push(1, gradient(1.0), 0)
        two = server_at(0.0, lr=1.0, n_workers=2, admission=policy)
        two.load_state_dict(three.state_dict())
        assert two.may_go_on(0)
        assert two.may_go_on(1)

    def test_on_more_workers(self) -> None:
        """The new ones begin level with the slowest."""
        policy = StaleSynchronous(1)
        one = server_at(1.0, lr=1.0, n_workers=1, admission=policy)
        for version in range(5):
            one.push(0, gradient(1.0), version)
        two = server_at(0.0, lr=1.0, n_workers=2, admission=policy)
        two.load_state_dict(one.state_dict())
        assert two.clocks == [5, 5]
        two.push(1, gradient(1.0), 5)
        assert two.parameters[0].item() == -5.0  # 1 - 5 - 1

    def test_another_correction_is_an_error(self) -> None:
        saved = server_at(1.0, lr=1.0, n_workers=1).state_dict()
        other = server_at(1.0, lr=1.0, n_workers=1, correction=GapAware())
        with pytest.raises(ConfigError, match="go on with the correction that it was saved with"):
            other.load_state_dict(saved)


class TestMembers:
    def test_skipped_steps_count_in_the_clock_and_change_nothing_else(self) -> None:
        server = server_at(1.0, lr=1.0, n_workers=2, admission=StaleSynchronous(0))
        server.pull(0)
        before = without_counts(server.state_dict())
        server.skip(0)
        assert server.clocks == [1, 0]
        assert not server.may_go_on(0)
        assert equal(without_counts(server.state_dict()), before)
        server.skip(1)
        assert server.may_go_on(0)

    def test_what_a_dead_worker_gave_is_used(self) -> None:
        server = server_at(1.0, lr=1.0, n_workers=3, admission=Synchronous())
        server.push(0, gradient(3.0), 0)
        server.remove(0)
        server.push(1, gradient(1.0), 0)
        assert server.version == 0  # the dead worker's gradient does not stand in for worker 2's
        server.push(2, gradient(2.0), 0)
        assert server.parameters[0].item() == -1.0  # 1 - (3 + 1 + 2) / 3

    def test_the_last_one_waited_for_dies(self) -> None:
        server = server_at(1.0, lr=1.0, n_workers=3, admission=Synchronous())
        server.push(0, gradient(1.0), 0)
        server.push(1, gradient(3.0), 0)
        assert not server.may_go_on(0)
        server.remove(2)
        assert (server.version, server.parameters[0].item()) == (1, -1.0)  # 1 - (1 + 3) / 2
        assert server.may_go_on(0)
        assert server.may_go_on(1)

    def test_one_that_comes_back_is_waited_for_again(self) -> None:
        server = server_at(1.0, lr=1.0, n_workers=2, admission=Synchronous())
        server.remove(1)
        server.push(0, gradient(1.0), 0)
        server.add(1)
        server.push(0, gradient(1.0), 1)
        assert (server.version, server.members) == (1, {0, 1})
        server.push(1, gradient(3.0), 1)
        assert server.parameters[0].item() == -2.0  # 1 - 1 - (1 + 3) / 2

    def test_one_that_comes_back_before_it_was_missed(self) -> None:
        """Its death was not noticed: what it had under way is forgotten all the same."""
        server = server_at(1.0, lr=1.0, n_workers=2, admission=Ringmaster(1, stop=True))
        server.pull(1)
        server.push(0, gradient(1.0), 0)
        assert server.to_abandon() == [1]
        server.add(1)
        assert server.to_abandon() == []
        assert server.members == {0, 1}

    def test_removing_twice_is_no_error(self) -> None:
        server = server_at(1.0, lr=1.0, n_workers=2)
        server.remove(1)
        server.remove(1)
        assert server.members == {0}

    def test_all_may_leave_and_come_back(self) -> None:
        server = server_at(1.0, lr=1.0, n_workers=2, admission=StaleSynchronous(0))
        server.push(0, gradient(1.0), 0)
        server.remove(1)  # a clock of 0
        server.remove(0)  # a clock of 1
        server.add(1)
        server.add(0)
        assert server.clocks == [1, 1]
        assert server.may_go_on(0)
        assert server.may_go_on(1)


def test_a_pull_ahead_does_not_count_as_a_new_beginning() -> None:
    """With overlap a worker pulls its next parameters before it pushes what it has computed."""
    server = server_at(1.0, lr=1.0, n_workers=2, admission=Ringmaster(2, stop=True))
    server.pull(0)  # version 0
    server.push(1, gradient(0.0), 0)
    server.pull(0)  # version 1, for the step after
    server.push(0, gradient(0.0), 0)  # its first gradient; it now computes with version 1
    server.push(1, gradient(0.0), 2)
    assert server.version == 3
    assert server.to_abandon() == [0]  # 3 - 1 = 2 updates missed
