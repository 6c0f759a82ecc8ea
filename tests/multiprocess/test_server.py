"""The server on real processes: its shards agree, its log can be replayed, workers may die."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaledtrain
from scaledtrain import Asynchronous, ConfigError, ParameterServer, Replica, connect
from scaledtrain.comm.event_log import read_events
from scaledtrain.comm.protocols import Store
from scaledtrain.rendezvous import Transport
from scaledtrain.server import (
    AdaptiveDelayCompensated,
    BackupWorkers,
    Dana,
    Ringmaster,
    Server,
    SoftSync,
    StaleSynchronous,
    Synchronous,
)
from scaledtrain.server.operations import Kind, apply
from tests.ranks import run_ranks

TRANSPORTS: list[Transport] = ["shared_memory", "torch"]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
PLAIN = partial(torch.optim.SGD, lr=0.05)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 2))


def gradients_of(store: Store) -> list[list[Tensor]]:
    """What this worker pushes from now on."""
    pushed: list[list[Tensor]] = []
    push = store.push

    def noting(update: Any, version: int, speed: float = 0.0) -> None:
        pushed.append([g.clone() for g in update])
        push(update, version, speed)

    store.push = noting  # type: ignore[method-assign]
    return pushed


def train(link: Any, strategy: ParameterServer, optimizer: Any, steps: int) -> dict[str, Any]:
    """A plain loop of steps on random batches."""
    model = net()
    replica = Replica(model, optimizer)
    strategy.attach(replica, link)
    pushed = gradients_of(strategy._store)
    generator = torch.Generator().manual_seed(link.group.rank)
    strategy.start(None)
    staleness = []
    for _ in range(steps):
        assert strategy.before_forward()
        staleness.append(strategy.staleness)
        x = torch.randn(8, 20, generator=generator)
        replica.zero_grad()
        F.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        strategy.reduce_gradients()
        strategy.apply_gradients()
        strategy.after_step()
    strategy.settle()
    final = [p.detach().clone() for p in model.parameters()]
    return {"pushed": pushed, "final": final, "step": strategy.step, "staleness": staleness}


CASES = {
    "one shard": (partial(ParameterServer), SGD),
    "three shards": (partial(ParameterServer, shards=3), SGD),
    "overlap": (partial(ParameterServer, overlap=True), SGD),
    "all": (
        partial(
            ParameterServer, SoftSync(2), AdaptiveDelayCompensated(), shards=3, overlap=True
        ),
        partial(torch.optim.Adam, lr=1e-3),
    ),
    "dana": (partial(ParameterServer, StaleSynchronous(1), Dana(), shards=2), PLAIN),
}


def train_cases(transport: Transport, folder: str) -> dict[str, Any]:
    results = {}
    with connect(transport=transport, timeout_seconds=30) as link:
        for name, (make, optimizer) in CASES.items():
            link.event_log = Path(folder) / name
            results[name] = train(link, make(), optimizer, 25)
    return results


def replay(log: Path, name: str, pushed: list[list[list[Tensor]]]) -> tuple[Server, int]:
    """One server in one process is told what the log says; returns it, and the accepted."""
    make, optimizer = CASES[name]
    replica, strategy = Replica(net(), optimizer), make()
    server = Server(
        replica.parameters, replica.updater, 3, strategy.admission, strategy.correction
    )
    waiting = [iter(gradients) for gradients in pushed]
    accepted = 0
    for event in read_events(log):
        push = event.operation.kind == Kind.PUSH
        gradient = next(waiting[event.operation.worker]) if push else ()
        outcome = apply(server, event.operation, gradient)
        assert (outcome.accepted, outcome.staleness) == (event.accepted, event.staleness)
        accepted += outcome.accepted
    return server, accepted


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_shards_and_overlap_are_one_server_bit_for_bit(
    transport: Transport, tmp_path: Path
) -> None:
    """The event log, with the gradients, gives the parameters that every rank ended with."""
    ranks = run_ranks(train_cases, 3, transport, str(tmp_path))
    for name in CASES:
        results = [rank[name] for rank in ranks]
        server, accepted = replay(tmp_path / name, name, [r["pushed"] for r in results])
        assert accepted == 3 * 25
        for result in results:
            assert result["step"] == server.version
            for mine, theirs in zip(result["final"], server.parameters, strict=True):
                assert torch.equal(mine, theirs), name
        told = [s for r in results for s in r["staleness"] if s is not None]
        assert max(told) >= 1, name


class Fuse:
    """kill -9 for this process at a random moment, whatever it is doing then."""

    def __init__(self, seed: int, earliest: float, latest: float) -> None:
        seconds = random.Random(seed).uniform(earliest, latest)
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


DEADLY = {
    "asynchronous": (Asynchronous(), 2),
    "stale synchronous": (StaleSynchronous(2), 1),
    "synchronous": (Synchronous(), 1),
    "backup workers": (BackupWorkers(3), 2),
}


def outlive_all(transport: Transport, name: str, seed: int) -> dict[str, Any]:
    """Ranks 3, 2 and 1 die, one after another, at random moments; rank 0 goes on to the end."""
    logging.basicConfig(level=logging.WARNING)
    policy, shards = DEADLY[name]
    link = connect(transport=transport, timeout_seconds=20)
    rank = link.group.rank
    model = net()
    replica = Replica(model, SGD)
    # With two shards the second is on rank 2, which therefore lives.
    strategy = ParameterServer(policy, shards=shards, overlap=name == "asynchronous")
    strategy.attach(replica, link)
    strategy.start(None)
    victims = [3, 1] if shards == 2 else [3, 2, 1]
    if rank in victims:
        Fuse(seed + rank, 0.3 * victims.index(rank), 0.3 * victims.index(rank) + 0.6)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        assert strategy.before_forward()
        x = torch.randn(8, 20)
        replica.zero_grad()
        F.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        strategy.apply_gradients()
        strategy.after_step()
        time.sleep(0.001)
    alone = strategy.step
    for _ in range(20):
        assert strategy.before_forward()
        replica.zero_grad()
        F.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        strategy.apply_gradients()
        strategy.after_step()
    strategy.settle()
    final = [p.detach().clone() for p in model.parameters()]
    link.close()
    return {"alone": alone, "step": strategy.step, "final": final}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DEADLY)
def test_workers_killed_at_random_moments_do_not_stop_the_others(
    name: str, transport: Transport, capfd: pytest.CaptureFixture[str]
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)  # shown if it fails
    victims = [3, 1] if DEADLY[name][1] == 2 else [3, 2, 1]
    results = run_ranks(outlive_all, 4, transport, name, seed, killed=victims)
    survivors = [result for result in results if result is not None]
    assert len(survivors) == 4 - len(victims)
    for result in survivors:
        assert result["step"] > result["alone"]
        assert all(p.isfinite().all() for p in result["final"])
        assert all(map(torch.equal, result["final"], survivors[0]["final"]))
    told = capfd.readouterr().err
    for victim in victims:
        assert f"worker {victim} is lost" in told
