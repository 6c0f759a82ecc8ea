"""Simulated ranks that die, return, wait for ever, and draw random numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import Callback, ParameterServer, Strategy, Sync, Trainer
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ClusterError, DeadlockError, PeerLostError
from scaledtrain.seeding import seed_everything
from scaledtrain.server import Admission, ServerView
from scaledtrain.sim import (
    Cluster,
    Constant,
    Failure,
    Gamma,
    GivenFailures,
    Simulation,
    Topology,
    Wire,
    simulate,
)
from scaledtrain.strategies import LocalSGD

PORT = Wire(latency_seconds=0.001, gigabits_per_second=1.0)
FREE = Wire(latency_seconds=0.0, gigabits_per_second=float("inf"))
HOST = Topology(ranks_per_host=8, hosts=1, port=PORT)
FREE_HOST = Topology(ranks_per_host=8, hosts=1, port=FREE)


class Moments(Callback):
    """When steps ended, by rank, also those of a rank that died."""

    def __init__(self, at: list[list[float]]) -> None:
        self._at = at

    def on_step_end(self, trainer: Trainer) -> None:
        self._at[trainer.link.group.rank].append(trainer.link.clock.now())


def trainer(link: Link, strategy: Strategy, **options: Any) -> Trainer:
    torch.manual_seed(1)
    return Trainer(
        nn.Linear(3, 1),
        F.mse_loss,
        partial(torch.optim.SGD, lr=0.05),
        strategy=strategy,
        log_every=10**6,
        console=False,
        link=link,
        **options,
    )


def batches(n: int = 8) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(2)
    inputs = [torch.randn(4, 3, generator=source) for _ in range(n)]
    return [(x, x.sum(1, keepdim=True)) for x in inputs]


def three_workers(
    failure: Failure, strategy: type[Strategy], max_steps: int
) -> tuple[Simulation[tuple[int, bool]], list[list[float]]]:
    """Steps of 1 s without other costs; what each rank came to, and when its steps ended."""
    at: list[list[float]] = [[], [], []]

    def program(link: Link) -> tuple[int, bool]:
        made = trainer(link, strategy(), callbacks=[Moments(at)])
        return made.fit(batches(3), max_steps=max_steps).step, link.returned

    cluster = Cluster(Constant(1.0), FREE_HOST, failures=GivenFailures([failure]))
    return simulate(program, cluster, 3), at


def test_others_go_on_without_a_worker_that_died() -> None:
    """It makes 5 steps and dies at 5.5 s: there are 15 updates at 5 s, 17 at 6 s, 19 at 7 s."""
    run, at = three_workers(Failure(worker=1, seconds=5.5), ParameterServer, max_steps=19)
    assert run.results == [(19, False), None, (19, False)]
    assert at[1] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert at[2] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_a_worker_that_comes_back_takes_part_again() -> None:
    """It dies at 5.5 s, and steps from 7.5 s on; at 8.5 s there are 15 + 2 * 3 + 1 updates."""
    failure = Failure(worker=1, seconds=5.5, back_after_seconds=2.0)
    run, at = three_workers(failure, ParameterServer, max_steps=22)
    assert run.results == [(22, False), (22, True), (22, False)]
    assert at[1][:6] == [1.0, 2.0, 3.0, 4.0, 5.0, 8.5]


def test_sync_ends_with_a_worker_that_died_and_names_it() -> None:
    with pytest.raises(PeerLostError, match=r"rank 1 died at 5\.5 virtual seconds"):
        three_workers(Failure(worker=1, seconds=5.5), Sync, max_steps=10)


def test_a_server_that_died_is_named() -> None:
    with pytest.raises(ClusterError, match=r"rank 0 died at 5\.5 virtual seconds, and a shard"):
        three_workers(Failure(worker=0, seconds=5.5), ParameterServer, max_steps=30)


@dataclass(frozen=True)
class OneStepEach(Admission):
    """Nobody goes on after a first step."""

    def releases(self, worker: int, server: ServerView) -> bool:
        return server.clocks[worker] == 0


def test_a_deadlock_names_who_waits_for_what() -> None:
    def program(link: Link) -> None:
        trainer(link, ParameterServer(OneStepEach())).fit(batches(), max_steps=10)

    with pytest.raises(DeadlockError) as caught:
        simulate(program, Cluster(Constant(1.0), FREE_HOST), 2)
    message = str(caught.value)
    assert "at 1 virtual seconds nobody can go on" in message
    for rank in (0, 1):
        assert f"rank {rank} waits for the admission policy to let it go on" in message


def test_a_rank_that_leaves_a_collective_out_is_named() -> None:
    def program(link: Link) -> None:
        if link.group.rank != 2:
            link.group.all_reduce([torch.ones(1)]).wait()

    with pytest.raises(DeadlockError, match=r"rank 1 waits in all_reduce for rank 2") as caught:
        simulate(program, Cluster(Constant(1.0), HOST), 3)
    assert "Already ended: rank 2." in str(caught.value)


def trained(seed: int) -> tuple[list[Tensor | None], float]:
    """Parameters of an asynchronous run, and its virtual time."""

    def program(link: Link) -> Tensor:
        made = trainer(link, ParameterServer())
        made.fit(batches(), max_steps=100)
        return nn.utils.parameters_to_vector(made.model.parameters()).detach()

    run = simulate(program, Cluster(Gamma(1.0), HOST), 4, seed=seed)
    return run.results, run.seconds


def test_a_run_is_a_function_of_its_seed() -> None:
    (one, seconds), (two, again), (other, others) = trained(0), trained(0), trained(1)
    for parameters in (*one, *two):
        assert parameters is not None
        assert torch.equal(parameters, one[0])
    assert seconds == again != others
    assert not torch.equal(one[0], other[0])


class Draws(Callback):
    """Draws from Python's and NumPy's generators after each step."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        self.drawn += [random.random(), float(np.random.random())]


class Noisy(nn.Module):
    """Keeps which inputs dropout let through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        kept = F.dropout(torch.ones_like(x), 0.5)
        self.masks.append(kept)
        out: Tensor = self.layer(x * kept)
        return out


def test_random_generators_are_each_ranks_own() -> None:
    """Dropout and draws are those of a process of its own, while ranks take turns."""

    def program(link: Link) -> tuple[list[Tensor], list[float]]:
        model, draws = Noisy(), Draws()
        made = Trainer(
            model,
            F.mse_loss,
            partial(torch.optim.SGD, lr=0.1),
            strategy=LocalSGD(sync_every=3),
            callbacks=[draws],
            seed=5,
            console=False,
            link=link,
        )
        made.fit([(torch.ones(2, 8), torch.ones(2, 1))] * 30, max_epochs=1)
        return model.masks, draws.drawn

    before = torch.get_rng_state()
    results = simulate(program, Cluster(Gamma(1.0, shape=4.0), HOST), 3).results
    assert torch.equal(torch.get_rng_state(), before)  # the caller's is left alone
    with torch.random.fork_rng():
        for rank, result in enumerate(results):
            assert result is not None
            masks, drawn = result
            seed_everything(5, rank)
            assert len(masks) == 10
            assert all(torch.equal(m, F.dropout(torch.ones(2, 8), 0.5)) for m in masks)
            numbers = [(random.random(), float(np.random.random())) for _ in range(10)]
            assert drawn == [number for pair in numbers for number in pair]
