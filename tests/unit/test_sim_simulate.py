"""What a simulated run must come to, where it can be told beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaledtrain import Callback, LocalSGD, ParameterServer, Strategy, Sync, Trainer
from scaledtrain.comm.protocols import Link
from scaledtrain.server import BackupWorkers, StaleSynchronous
from scaledtrain.sim import (
    Cluster,
    ComputeModel,
    Constant,
    Gamma,
    Nic,
    ShiftedExponential,
    SlowWorkers,
    Topology,
    Wire,
    best_count,
    order_statistics,
    simulate,
    simulate_times,
)

MEGABYTE = (500, 500)  # inputs and outputs of a layer without bias: 250,000 numbers of 4 bytes
CARD = Nic(Wire(latency_seconds=0.001, gigabits_per_second=1.0))  # 1 MB takes it 8 ms
NETWORK = Topology(nic=CARD, algorithm="ring")
# A ring of 4 sends 2 * 3/4 of 1 MB at 125 MB/s, in 6 messages of 1 ms: 12 ms + 6 ms.
ALL_REDUCE = 0.018


def free(workers: int) -> Topology:
    """Communication costs nothing."""
    return Topology(ranks_per_host=workers, hosts=1, port=Wire(0.0, gigabits_per_second=math.inf))


class Ended(NamedTuple):
    """What one worker saw."""

    at: list[float]
    """Virtual seconds since fit began, at the end of each of its steps."""
    staleness: list[int]
    updates: int


class Watch(Callback):
    def __init__(self, stop_after: int | None, steps: list[int]) -> None:
        self.at: list[float] = []
        self.staleness: list[int] = []
        self._stop_after = stop_after
        self._steps = steps

    def on_step_end(self, trainer: Trainer) -> None:
        self.at.append(trainer.metrics.seconds)
        if trainer.strategy.staleness is not None:
            self.staleness.append(trainer.strategy.staleness)
        self._steps[trainer.link.group.rank] += 1
        if len(self.at) == self._stop_after:
            trainer.stop()


def train(
    cluster: Cluster,
    workers: int,
    strategy: Callable[[], Strategy],
    max_steps: int | None = None,
    stop_after: dict[int, int] | None = None,
    shapes: tuple[tuple[int, int], ...] = ((1, 1),),
) -> list[Ended]:
    """Train linear layers; ``stop_after``: a worker ends the run after so many of its own steps."""
    batch = torch.zeros(1, shapes[0][0]), torch.zeros(1, shapes[-1][1])
    steps = [0] * workers

    def program(link: Link) -> Ended:
        watch = Watch((stop_after or {}).get(link.group.rank), steps)
        trainer = Trainer(
            nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes)),
            F.mse_loss,
            partial(torch.optim.SGD, lr=0.0),
            strategy=strategy(),
            callbacks=[watch],
            log_every=10**6,
            console=False,
            link=link,
        )
        updates = trainer.fit([batch] * workers, max_steps=max_steps, max_epochs=10**6).step
        return Ended(watch.at, watch.staleness, updates)

    results = simulate(program, cluster, workers, own_generators=False).results
    return [ended for ended in results if ended is not None]


def lengths(moments: list[float]) -> torch.Tensor:
    return torch.tensor([0.0, *moments], dtype=torch.float64).diff()


# --- Computing --------------------------------------------------------------------------------


def test_a_straggler_of_four_makes_sync_a_quarter_as_fast() -> None:
    for factor in (1.0, 4.0):
        cluster = Cluster(Constant(1.0), free(4), SlowWorkers({3: factor}))
        for ended in train(cluster, 4, Sync, max_steps=10):
            assert ended.at == [factor * step for step in range(1, 11)]


def test_the_rate_of_asgd_is_the_sum_of_the_rates() -> None:
    """Steps of 1, 2, 4 and 8 s; in 8 s 8 + 4 + 2 + 1 gradients, and none of them waits."""
    cluster = Cluster(Constant(1.0), free(4), SlowWorkers({1: 2.0, 2: 4.0, 3: 8.0}))
    ended = train(cluster, 4, ParameterServer, stop_after={0: 8})
    for worker, seconds in enumerate((1, 2, 4, 8)):
        assert ended[worker].at == list(range(seconds, 9, seconds))
        assert ended[worker].updates == 15


def test_the_staleness_of_equal_workers_is_one_less_than_their_number() -> None:
    """Worker i pulls again behind i + 1 pushes, and pushes when all 8 have pushed: 7 others.

    In the first round all have version 0: worker i is i stale.
    """
    ended = train(Cluster(Constant(1.0), free(8)), 8, ParameterServer, max_steps=80)
    for worker, seen in enumerate(ended):
        assert seen.updates == 80
        assert seen.staleness[:9] == [worker] + [7] * 8


@pytest.mark.parametrize("workers", [8, 32])
def test_sync_waits_for_the_largest_of_gamma_times(workers: int) -> None:
    """E[max of n] = integral of 1 - F(t)^n, with F(t) = P(100, 100 t), P the regularised gamma."""
    t = torch.linspace(0.0, 3.0, 30_001, dtype=torch.float64)
    below = torch.special.gammainc(torch.full_like(t, 100.0), 100.0 * t)
    expected = torch.trapezoid(1.0 - below**workers, t).item()
    assert expected == pytest.approx({8: 1.147, 32: 1.218}[workers], abs=0.001)
    _agree(Gamma(1.0, shape=100.0), workers, 200, expected)


def test_sync_waits_for_the_harmonic_number_of_exponential_times() -> None:
    """H_8 = 1 + 1/2 + ... + 1/8 = 2.71786 times the mean."""
    _agree(ShiftedExponential(0.0, 1.0), 8, 400, 2.71786)


def _agree(compute: ComputeModel, workers: int, steps: int, expected: float) -> None:
    """The mean of the steps is at most 3 of its standard errors away."""
    times = lengths(train(Cluster(compute, free(workers)), workers, Sync, steps)[0].at)
    error = times.std().item() / math.sqrt(steps)
    assert len(times) == steps
    assert error < 0.03 * expected
    assert abs(times.mean().item() - expected) < 3.0 * error


def test_four_backup_workers_are_best_for_a_hundred_and_gamma_times() -> None:
    """k gradients in the time of the k-th fastest: the best k is 96, give or take one.

    By the times of the cluster, and by runs with each k, whose rates differ by half a percent
    around the best. There a worker that is late begins its next step late.
    """
    cluster = Cluster(Gamma(1.0, shape=100.0), free(100))
    assert 95 <= best_count(order_statistics(cluster.pace, 100, n_steps=500)) <= 97
    rates = {k: _rate_of_backup_workers(cluster, k) for k in (93, 95, 96, 97, 100)}
    assert 95 <= max(rates, key=lambda k: rates[k]) <= 97


def _rate_of_backup_workers(cluster: Cluster, k: int) -> float:
    """Gradients of 100 workers that are used in a second."""
    policy = BackupWorkers(k=k)
    run = simulate_times(lambda: ParameterServer(policy), cluster, 100, max_steps=60, parameters=4)
    return k * 60 / run.seconds


# --- Communication ----------------------------------------------------------------------------


def test_sync_pays_the_ring_in_every_step() -> None:
    """Behind the computing; the first step also finds out which parameters have gradients."""
    at = train(
        Cluster(Constant(1.0), NETWORK), 4, partial(Sync, overlap=False), 6, shapes=(MEGABYTE,)
    )[0].at
    assert lengths(at)[1:].tolist() == pytest.approx([1.0 + ALL_REDUCE] * 5)
    # One flag of one byte: 2 * 3/4 of it at 125 MB/s, and 6 ms.
    assert at[0] == pytest.approx(1.0 + ALL_REDUCE + 1.5 / 125e6 + 0.006)


@pytest.mark.parametrize(
    ("seconds", "step"),
    [
        # Two layers of 0.5 MB each: 6 ms + 6 ms for each. The last layer's gradient is there after
        # 1/3 + 2/3 * 1/2 = 2/3 of the time, and has come at 0.2 + 0.012 s, before the end at 0.3 s.
        (0.3, 0.3 + 0.012),
        # It comes at 0.012 + 0.012 s, after the end at 0.018 s; the first layer's comes after it.
        (0.018, 0.012 + 0.012 + 0.012),
    ],
)
def test_buckets_of_sync_overlap_with_backward(seconds: float, step: float) -> None:
    at = train(
        Cluster(Constant(seconds), NETWORK),
        4,
        partial(Sync, overlap=True, bucket_bytes=500_000),
        6,
        shapes=((250, 500), (500, 250)),
    )[0].at
    assert lengths(at)[1:].tolist() == pytest.approx([step] * 5)


def test_local_sgd_pays_the_ring_once_a_period() -> None:
    at = train(
        Cluster(Constant(1.0), NETWORK), 4, lambda: LocalSGD(sync_every=5), 20, shapes=(MEGABYTE,)
    )[0].at
    assert lengths(at).tolist() == pytest.approx(([1.0] * 4 + [1.0 + ALL_REDUCE]) * 4)


@pytest.mark.parametrize(("shards", "rate"), [(1, 125.0), (4, 500.0)])
def test_a_servers_network_card_bounds_the_rate(shards: int, rate: float) -> None:
    """1 MB goes down through 125 MB/s for each gradient; four cards give a quarter of it each.

    Workers on the server's own hosts are left out: they need its cards less, or for other things.
    """
    homes = {shard * 32 // shards: 1e6 for shard in range(shards)}
    ended = train(
        Cluster(Constant(0.001), Topology(nic=CARD), SlowWorkers(homes)),
        32,
        partial(ParameterServer, shards=shards),
        stop_after={1: 12},
        shapes=(MEGABYTE,),
    )
    begin, end = ended[1].at[3], ended[1].at[-1]
    counted = sum(begin < at <= end for seen in ended for at in seen.at)
    assert counted / (end - begin) == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(("overlap", "step"), [(False, 0.118), (True, 0.1)])
def test_pulling_while_computing_hides_the_transfer(overlap: bool, step: float) -> None:
    """Else: 8 ms up, behind it 1 ms to the server, 8 ms down and 1 ms: 18 ms beside 100."""
    ended = train(
        Cluster(Constant(0.1), Topology(nic=CARD), SlowWorkers({0: 1e6})),
        2,
        partial(ParameterServer, overlap=overlap),
        stop_after={1: 6},
        shapes=(MEGABYTE,),
    )
    assert lengths(ended[1].at)[1:].tolist() == pytest.approx([step] * 5)


# --- Policies ---------------------------------------------------------------------------------


def test_stale_synchronous_workers_lead_by_no_more_than_the_bound() -> None:
    """s = 3: with 4 steps done and the slowest at 0 one waits; then all go as fast as that one."""
    cluster = Cluster(Constant(1.0), free(4), SlowWorkers({3: 10.0}))
    policy = StaleSynchronous(staleness_bound=3)
    ended = train(cluster, 4, lambda: ParameterServer(policy), stop_after={3: 3})
    assert ended[3].at == [10.0, 20.0, 30.0]
    for fast in ended[:3]:
        # Steps 1 to 4 at once; 5 begins when the slow one has made its first, 6 its second.
        assert fast.at[:6] == [1.0, 2.0, 3.0, 4.0, 11.0, 21.0]
