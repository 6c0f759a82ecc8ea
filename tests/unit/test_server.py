"""The pure server: every number below can be checked by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import ConfigError, Server
from scaledtrain.replica import Updater


def server_at(x: float, *, lr: float, n_workers: int, momentum: float = 0.0) -> Server:
    """One parameter, at x, with plain SGD."""

    def make(parameters: list[nn.Parameter]) -> Updater:
        return Updater([("x", parameters[0])], partial(torch.optim.SGD, lr=lr, momentum=momentum))

    return Server([torch.tensor([x])], make, n_workers)


def gradient(g: float) -> list[Tensor]:
    return [torch.tensor([g])]


def test_asynchronous_updates_once_per_push_and_counts_staleness() -> None:
    server = server_at(1.0, lr=0.5, n_workers=3)
    # All three pull version 0 and push in turn: staleness 0, 1, 2.
    assert server.push(0, gradient(1.0), 0) == (True, 0)  # 1 - 0.5 * 1 = 0.5
    assert server.push(1, gradient(-2.0), 0) == (True, 1)  # 0.5 + 0.5 * 2 = 1.5
    assert server.push(2, gradient(4.0), 0) == (True, 2)  # 1.5 - 0.5 * 4 = -0.5
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
    assert server.push(1, gradient(5.0), 0) == (False, 1)
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


def test_saved_and_restored_goes_on_alike() -> None:
    one, two = (server_at(1.0, lr=0.5, n_workers=2, momentum=0.9) for _ in range(2))
    one.push(0, gradient(1.0), 0)
    two.load_state_dict(one.state_dict())
    for server in (one, two):
        server.push(1, gradient(2.0), 0)
    assert one.parameters[0].item() == two.parameters[0].item()
    assert (two.version, two.clocks) == (2, [1, 1])


def test_server_does_not_share_memory_with_the_model() -> None:
    x = torch.tensor([1.0])
    server = server_at(0.0, lr=1.0, n_workers=1)
    server = Server([x], lambda p: Updater([("x", p[0])], partial(torch.optim.SGD, lr=1.0)), 1)
    server.push(0, gradient(1.0), 0)
    assert x.item() == 1.0


def test_no_workers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="n_workers is 0"):
        server_at(0.0, lr=1.0, n_workers=0)
