"""Simulated runs that something breaks in an awkward moment, and programs that are not polite."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scaledtrain import DiLoCo, ParameterServer, Strategy, Sync, Trainer, connect, simulate
from scaledtrain.callbacks import Callback
from scaledtrain.comm.compress import FP16, TopK
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ClusterError, ConfigError, PeerLostError
from scaledtrain.server import StaleSynchronous
from scaledtrain.sim import (
    Cluster,
    Constant,
    Failure,
    Gamma,
    GivenFailures,
    Nic,
    SlowWorkers,
    Topology,
    Wire,
    simulate_times,
)
from scaledtrain.simulate import command
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, LocalSGD, PushSum, SlowMo

FREE = Wire(latency_seconds=0.0, gigabits_per_second=float("inf"))
ONE_HOST = Topology(ranks_per_host=4, hosts=1, port=FREE)
FAR = Topology(nic=Nic(Wire(latency_seconds=0.4, gigabits_per_second=1.0)))  # 0.8 s for 3 ranks
BATCHES = [(torch.ones(2, 1), torch.ones(2, 1))] * 16


class StepEnds(Callback):
    """When this rank's steps ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        self.seconds.append(trainer.link.clock.now())


def training(
    make_strategy: Callable[[], Strategy], max_steps: int, batches: Sequence[Any] = BATCHES
) -> Callable[[Link], tuple[int, list[float]]]:
    """A program that returns its updates, and when its steps ended."""

    def program(link: Link) -> tuple[int, list[float]]:
        ends = StepEnds()
        trainer = Trainer(
            nn.Linear(1, 1),
            nn.functional.mse_loss,
            partial(torch.optim.SGD, lr=0.01),
            strategy=make_strategy(),
            callbacks=[ends],
            console=False,
            link=link,
        )
        return trainer.fit(batches, max_steps=max_steps).step, ends.seconds

    return program


def dying(failure: Failure, topology: Topology = FAR, slow: int = 1) -> Cluster:
    return Cluster(Constant(1.0), topology, SlowWorkers({slow: 3.0}), GivenFailures([failure]))


def ahead() -> Strategy:
    return ParameterServer(StaleSynchronous(staleness_bound=1), overlap=True)


@pytest.mark.parametrize("dies_at", [2.2, 2.6, 3.3, 4.0, 4.3, 5.1])
def test_a_pull_that_was_asked_ahead_dies_with_its_worker(dies_at: float) -> None:
    # On its way, waiting for the slow worker, or being answered: nobody waits for the dead one.
    run = simulate(training(ahead, 12), dying(Failure(2, dies_at)), 4)
    assert [result and result[0] for result in run.results] == [12, 12, None, 12]
    back = simulate(training(ahead, 12), dying(Failure(2, dies_at, 1.5)), 4)
    assert [result and result[0] for result in back.results] == [12, 12, 12, 12]


def test_a_worker_that_dies_before_there_is_a_server_is_not_awaited() -> None:
    # The first broadcast has begun at 0 and is over after 2 * 0.8 s; then rank 0 makes the server.
    run = simulate(training(ParameterServer, 6), dying(Failure(3, 0.5)), 4)
    assert [result and result[0] for result in run.results] == [6, 6, 6, None]


def test_who_dies_before_there_is_a_server_is_named_if_it_should_hold_a_part() -> None:
    with pytest.raises(PeerLostError, match="rank 0 died before it had made a server"):
        simulate(training(ParameterServer, 6), dying(Failure(0, 0.5)), 4)
    two_shards = training(lambda: ParameterServer(shards=2), 6)  # on the ranks 0 and 2
    with pytest.raises(ClusterError, match="rank 2 died .*, and a shard of the server with it"):
        simulate(two_shards, dying(Failure(2, 0.5)), 4)


def test_nobody_returns_to_a_job_that_has_ended() -> None:
    """Its server would let it train, and wait for the others at the end of that for ever."""

    def program(link: Link) -> float:
        training(ParameterServer, 3)(link)
        if link.group.rank == 1:
            link.clock.sleep_until(100.0)  # its process lives on
        return link.clock.now()

    run = simulate(program, dying(Failure(2, 2.0, 60.0)), 4)
    assert run.results[2] is None
    assert run.seconds == 100.0


def test_what_a_dying_rank_does_at_last_takes_no_time() -> None:
    def program(link: Link) -> float:
        try:
            link.clock.sleep_until(5.0 if link.group.rank == 1 else 60.0)
        finally:
            if link.group.rank == 1:
                link.clock.sleep_until(50.0)
                late.append(link.clock.now())
        return link.clock.now()

    late: list[float] = []
    run = simulate(program, dying(Failure(1, 2.0), ONE_HOST), 2)
    assert run.results == [60.0, None]
    assert late == []


def test_a_server_takes_no_push_of_a_worker_that_it_lets_wait_for_a_pull() -> None:
    """The pull that was asked ahead comes first, as over a wire, where a push waits behind it.

    Rank 0 takes 10 s, rank 1 1 s, the bound is 0. Rank 1 pushes after 1 s (its clock is 1) and asks
    ahead, which waits for rank 0's first push at 10 s; what it pushes at 2 s is taken after that,
    and so on: steps end after 1, 2, 11, 21 s. Were it taken before, its clock would be 2 already,
    and the pull would wait until 20 s.
    """
    program = training(lambda: ParameterServer(StaleSynchronous(0), overlap=True), 6)
    run = simulate(program, Cluster(Constant(1.0), ONE_HOST, SlowWorkers({0: 10.0})), 2)
    fast = run.results[1]
    assert fast is not None
    assert fast[1][:4] == [1.0, 2.0, 11.0, 21.0]


def test_more_replicas_than_batches_of_a_list() -> None:
    # Nothing costs anything but a step: one that had no batch would go round for ever at 0 s. Of 4
    # steps a second the 8th update is made at 2 s, when all but those that are late have begun.
    run = simulate(training(ParameterServer, 8, BATCHES[:3]), Cluster(Constant(1.0), ONE_HOST), 4)
    assert run.seconds == 3.0
    assert all(result is not None and result[1][:2] == [1.0, 2.0] for result in run.results)


def test_every_rank_begins_with_the_callers_random_generators_and_goes_on_alone() -> None:
    def program(link: Link) -> list[float]:
        drawn = []
        for _ in range(2):
            drawn += [torch.rand(1).item(), random.random(), float(np.random.rand())]
            link.clock.sleep_until(link.clock.now() + 1.0)
        return drawn

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    one, *others = simulate(program, Cluster(Constant(1.0), ONE_HOST), 3).results
    assert others == [one, one]
    # What the ranks drew is not drawn from the caller's.
    drawn = [f() for _ in range(2) for f in (torch.rand(1).item, random.random, np.random.rand)]
    assert one is not None
    assert drawn[1:3] + drawn[4:] == one[1:3] + one[4:]


def test_the_inference_mode_of_a_rank_that_waits_is_its_own() -> None:
    def program(link: Link) -> bool:
        if link.group.rank == 0:
            with torch.inference_mode():
                link.clock.sleep_until(2.0)
                return torch.is_inference_mode_enabled()
        link.clock.sleep_until(1.0)
        weight = torch.ones(1, requires_grad=True)
        (2.0 * weight).sum().backward()
        assert weight.grad is not None
        return weight.grad.item() == 2.0

    assert simulate(program, Cluster(Constant(1.0), ONE_HOST), 2).results == [True, True]


TIMED: dict[str, Callable[[], Strategy]] = {
    "sync": Sync,
    "sync_buckets": lambda: Sync(bucket_bytes=1000),
    "diloco": lambda: DiLoCo(4, fragments=2, overlap_steps=1),
    "async_shards": lambda: ParameterServer(shards=2, overlap=True, compression=FP16()),
    "easgd": lambda: EASGD(sync_every=2),
    "push_sum": lambda: PushSum(overlap=True),
    "async_local_sgd": lambda: AsyncLocalSGD(sync_every=2),
    "local_sgd": lambda: LocalSGD(sync_every=2),
    "slow_mo": lambda: SlowMo(sync_every=2),
    "gossip": Gossip,
}


@pytest.mark.parametrize("make_strategy", TIMED.values(), ids=TIMED.keys())
def test_times_alone_are_those_of_training(make_strategy: Callable[[], Strategy]) -> None:
    """Also of what goes on during the backward pass: buckets of 1,000 bytes over 1 Mb/s."""

    def program(link: Link) -> float:
        model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
        optimizer = partial(torch.optim.SGD, lr=0.01)
        loss_fn = nn.functional.mse_loss
        strategy = make_strategy()
        trainer = Trainer(model, loss_fn, optimizer, strategy=strategy, console=False, link=link)
        return trainer.fit([(torch.ones(2, 8), torch.ones(2, 8))] * 64, max_steps=12).seconds

    card = Nic(Wire(latency_seconds=1e-3, gigabits_per_second=1e-3))
    cluster = Cluster(Gamma(0.02, 4.0), Topology(nic=card), SlowWorkers({2: 2.0}))
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
    times = simulate_times(make_strategy, cluster, 3, max_steps=12, parameters=model)
    trained = simulate(program, cluster, 3).results
    assert [worker and worker.ended - worker.began for worker in times.workers] == pytest.approx(
        trained, rel=1e-12
    )


def test_what_looks_at_values_cannot_be_timed_without() -> None:
    cluster = Cluster(Constant(1.0), ONE_HOST)
    with pytest.raises(ConfigError, match="looks at values.*simulate it with real gradients"):
        simulate_times(
            lambda: Sync(compression=TopK(0.5)), cluster, 2, max_steps=1, parameters=8000
        )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("gradients=none slowdown.factors={0:4.0}", "cluster.speeds .* how long steps take"),
        ("gradients=none drop_compute.threshold_seconds=1.0", "act on microbatches"),
        ("parameter_bytes=1000", "it is the model"),
        ("workers=9", "9 workers do not fit"),
        ("run_dir=/proc/no", "set run_dir to one that can"),
    ],
)
def test_a_command_that_is_refused_leaves_nothing(
    said: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "guarded", lambda main: main())
    monkeypatch.setattr("sys.argv", ["simulate", "max_steps=4", *said.split()])
    with pytest.raises(ConfigError, match=message):
        command.main()
    assert list(tmp_path.glob("runs/*")) == []


def test_a_simulation_in_a_simulated_rank() -> None:
    def program(link: Link) -> float:
        link.clock.sleep_until(1.0 + link.group.rank)
        inner = simulate(training(ParameterServer, 4), Cluster(Constant(1.0), ONE_HOST), 2)
        return inner.seconds + link.clock.now()

    # Inside: 2 updates a second, the last of 4 at 2 s, when the other one begins a step in vain.
    run = simulate(program, Cluster(Constant(1.0), ONE_HOST), 2)
    assert run.results == [4.0, 5.0]
    assert run.seconds == 2.0


def test_a_program_that_forgets_its_link_has_it_nevertheless() -> None:
    def program(link: Link) -> int:
        sgd = partial(torch.optim.SGD, lr=0.01)
        trainer = Trainer(nn.Linear(1, 1), nn.functional.mse_loss, sgd, console=False)
        trainer.fit(BATCHES, max_steps=2)
        assert trainer.link is link
        return trainer.link.group.size

    run = simulate(program, Cluster(Constant(1.0), ONE_HOST), 2)
    assert run.results == [2, 2]
    assert run.seconds == 2.0
    with pytest.raises(ConfigError, match="use the one that the program is called with"):
        simulate(lambda link: connect(), Cluster(Constant(1.0), ONE_HOST), 2)
    assert connect().group.size == 1
