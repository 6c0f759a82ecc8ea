"""The server on real processes: its shards agree, its log can be replayed, workers may die."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaledtrain
from scaledtrain import ParameterServer, Replica, connect
from scaledtrain.comm.compress import TopK
from scaledtrain.comm.protocols import Link, Store
from scaledtrain.comm.serving.event_log import Event, read_events
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.connection import Transport
from scaledtrain.errors import ConfigError
from scaledtrain.run_dir import choose_run_dir
from scaledtrain.server import (
    AdaptiveDelayCompensated,
    Asynchronous,
    BackupWorkers,
    Dana,
    Ringmaster,
    Server,
    SoftSync,
    StaleSynchronous,
    Synchronous,
)
from scaledtrain.server.operations import Kind, apply
from scaledtrain.sim import simulate
from scaledtrain.train import join, run
from tests.contract.test_replicas import UNEVEN
from tests.ranks import end_rank, free_port, run_ranks, start_rank

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
        partial(ParameterServer, SoftSync(2), AdaptiveDelayCompensated(), shards=3, overlap=True),
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
    server = Server(replica.parameters, replica.updater, 3, strategy.admission, strategy.correction)
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
    end = time.monotonic() + 1.8
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


def misbehave(transport: Transport) -> dict[str, Any]:
    """Rank 1 pushes NaN, then a wrong shape; rank 2 is stuck for longer than anybody waits."""
    logging.basicConfig(level=logging.WARNING)
    link = connect(transport=transport, timeout_seconds=30)
    rank = link.group.rank
    model = nn.Linear(2, 2, bias=False)  # a row on each shard
    replica = Replica(model, PLAIN)
    strategy = ParameterServer(StaleSynchronous(0), shards=2)
    strategy.attach(replica, link)
    if rank == 0:  # starting may take longer
        host = link._serving[0].host
        assert host is not None
        host._timeout_seconds = 4.0
    strategy.start(None)
    steps = 0
    end = time.monotonic() + 10.0
    while time.monotonic() < end and strategy.before_forward():
        time.sleep(8.0 if rank == 2 and steps == 1 else 0.02)
        gradient = torch.full((2, 2), 0.01)
        if rank == 1 and steps == 0:
            gradient[0, 1] = torch.nan
        if rank == 1 and steps == 1:
            strategy._store.push([torch.ones(3)], strategy.step)
        else:
            model.weight.grad = gradient
            strategy.apply_gradients()
        strategy.after_step()
        steps += 1
    strategy.agree_to_stop(True)
    strategy.settle()
    weight = model.weight.detach().clone()
    link.close()
    return {"steps": steps, "version": strategy.step, "weight": weight}


def feedback_after(link: Link) -> list[list[list[list[float]]]]:
    """What is kept after a step, after another one, and when the first state was loaded."""
    model = nn.ModuleList([nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)])
    strategy = ParameterServer(
        Synchronous(), shards=2, cut_tensors=False, compression=TopK(fraction=0.5)
    )
    strategy.attach(Replica(model, PLAIN), link)
    states = []
    for _ in range(2):
        strategy.start(None)
        strategy.before_forward()
        for sign, p in zip([1.0, -1.0], model.parameters(), strict=True):
            p.grad = sign * (torch.arange(1.0, 5.0) + 10 * link.group.rank).view(1, 4)
        strategy.apply_gradients()
        strategy.after_step()
        strategy.settle()
        states.append(strategy.state_dict())
    strategy.load_state_dict(states[0])
    states.append(strategy.state_dict())
    kept = [state["server"]["feedback"] for state in states]
    return [[[t["kept"].flatten().tolist() for t in part] for part in shards] for shards in kept]


def feedback_of_connected() -> list[list[list[list[float]]]]:
    with connect(timeout_seconds=30) as link:
        return feedback_after(link)


@pytest.mark.parametrize("world", ["real", "simulated"])
def test_every_worker_saves_and_restores_what_it_has_not_sent_yet(world: str) -> None:
    """The two largest of four are sent of the first shard's tensor, and of the second's."""
    if world == "real":
        ranks = run_ranks(feedback_of_connected, 2)
    else:
        ranks = simulate(feedback_after, UNEVEN, 2).results
    for first, (once, twice, restored) in zip([1.0, 11.0], ranks, strict=True):
        kept = [first, first + 1, 0.0, 0.0]
        # Then rank 0 has 2, 4, 3, 4 to send, rank 1 22, 24, 13, 14.
        then = [2.0, 0.0, 3.0, 0.0] if first == 1.0 else [0.0, 0.0, 13.0, 14.0]
        assert once == [[kept], [[-each for each in kept]]]
        assert twice == [[then], [[-each for each in then]]]
        assert restored == once


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_unusable_gradients_are_rejected_and_a_stuck_worker_is_given_up_and_taken_back(
    transport: Transport, capfd: pytest.CaptureFixture[str]
) -> None:
    results = run_ranks(misbehave, 3, transport)
    # Each step is an update, but for two of rank 1, and the one of rank 2 that came after it had
    # been given up.
    assert {r["version"] for r in results} == {sum(r["steps"] for r in results) - 2 - 1}
    assert all(torch.equal(r["weight"], results[0]["weight"]) for r in results)
    assert results[0]["weight"].isfinite().all()
    told = capfd.readouterr().err
    assert "worker 1: its gradient holds NaN or infinity" in told
    assert "its gradient of parameter 0 holds NaN or infinity" in told
    assert "worker 1: its gradient does not fit the parameters" in told
    assert "its gradient of parameter 0 has shape (3,), not (2, 2)" in told
    assert "worker 2 is lost" in told
    assert "waited for it in pull, and it showed no sign of life for 4 s" in told
    assert "worker 2 is back" in told


class Watched(nn.Linear):
    """Counts forward passes, and makes rank 1 slow between forward and backward."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


def stop_old_work(transport: Transport) -> dict[str, Any]:
    with connect(transport=transport, timeout_seconds=20) as link:
        model = Watched(2, 1)
        trainer = scaledtrain.Trainer(
            model,
            F.mse_loss,
            PLAIN,
            strategy=ParameterServer(Ringmaster(delay_threshold=2, stop=True)),
            slowdown=scaledtrain.schedule.Slowdown({1: 50.0}, min_compute_seconds=0.02),
            console=False,
            link=link,
        )
        result = trainer.fit([(torch.ones(4, 2), torch.ones(4, 1))] * 4, max_steps=60)
        return {"step": result.step, "passes": model.passes, "seconds": result.seconds}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_work_that_has_become_too_old_is_stopped_and_begun_anew(transport: Transport) -> None:
    """Rank 1 takes 1 s for what rank 0 does in 20 ms: after two of its updates it begins anew."""
    zero, one = run_ranks(stop_old_work, 2, transport)
    assert zero["step"] == one["step"] == 60
    assert zero["passes"] == 60  # all updates are rank 0's
    assert one["passes"] >= 10  # about 60 / 2 times begun; without stopping once or twice


def test_overlap_is_refused_where_it_could_not_work() -> None:
    with pytest.raises(ConfigError, match="does not accept one that is"):
        ParameterServer(Synchronous(), overlap=True)
    with pytest.raises(ConfigError, match="stops work under way"):
        ParameterServer(Ringmaster(2, stop=True), overlap=True)
    with connect() as link, pytest.raises(ConfigError, match="it is 1 to 1 here"):
        ParameterServer(shards=2).attach(Replica(net(), SGD), link)


def asynchronous(folder: Path) -> list[str]:
    """Arguments of the training command."""
    return [
        "data=tests.tasks.signs", "data.local_batch_size=32", "strategy=async", "max_steps=null",
        "max_seconds=100", "slowdown.min_compute_seconds=0.01", "log_every=5", "console=false",
        f"run_dir={folder / 'run'}", "timeout_seconds=30",
    ]  # fmt: skip


class StopWhenTold(scaledtrain.Callback):
    """End the run as soon as there is a file of that name."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_step_end(self, trainer: scaledtrain.Trainer) -> None:
        if self._file.exists():
            trainer.stop()


def train_until_told(folder: Path) -> None:
    logging.basicConfig(level=logging.WARNING)
    config = check(compose(asynchronous(folder)))
    with join(config) as link:
        run(config, link, choose_run_dir(config, link), callbacks=[StopWhenTold(folder / "end")])


def launch_torchrun(folder: Path, rank: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        "SCALEDTRAIN_RANK": str(rank),
        "SCALEDTRAIN_WORLD_SIZE": "3",
        "SCALEDTRAIN_MASTER_ADDR": "127.0.0.1",
        "SCALEDTRAIN_MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--max-restarts",
        "2", "--master-port", str(free_port()), "-m", "scaledtrain.train", *asynchronous(folder),
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_comes_back_under_its_own_torchrun(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three ranks launched one by one; torchrun starts the killed one again."""
    port = free_port()
    torchrun = launch_torchrun(tmp_path, 2, port)
    ranks = [
        start_rank(train_until_told, rank, 3, port, tmp_path / f"rank-{rank}", tmp_path)
        for rank in (0, 1)
    ]
    metrics = tmp_path / "run" / "metrics-rank2.jsonl"
    try:
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "rank 2 began")
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
        (child,) = map(int, children.split())
        os.kill(child, signal.SIGKILL)
        first_life = metrics.read_text().count("\n")
        wait_until(lambda: metrics.read_text().count("\n") > first_life, "rank 2 came back")
        (tmp_path / "end").touch()
        assert [process.wait(90) for process in (*ranks, torchrun)] == [0, 0, 0]
    finally:
        torchrun.kill()
        torchrun.wait()
        for rank in ranks:
            end_rank(rank)
    told = capfd.readouterr().err
    assert "worker 2 is lost, and the other 2 go on without it" in told
    assert "worker 2 is back" in told
    events = list(read_events(tmp_path / "run" / "events.bin"))
    of_two = [e.operation.kind for e in events if e.operation.worker == 2]
    back = of_two.index(Kind.ADD)
    assert of_two[back - 1] == Kind.REMOVE
    assert Kind.PUSH in of_two[back:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["result"]["step"] == events_accepted(events)


def events_accepted(events: Sequence[Event]) -> int:
    return sum(event.accepted for event in events)


def wait_in_the_store() -> int:
    """Rank 0 waits in the job's store while its threads still connect the server to rank 1."""
    with connect(timeout_seconds=30) as link:
        strategy = ParameterServer(SoftSync(1))
        strategy.attach(Replica(nn.Linear(2, 1), PLAIN), link)
        assert link.store is not None
        if link.group.rank == 0:
            link.store.wait(["pulled"], timedelta(seconds=20))
        else:
            assert strategy.before_forward()
            link.store.set("pulled", "1")
        return strategy.step


def test_a_rank_that_waits_in_the_store_holds_nobody_up() -> None:
    assert run_ranks(wait_in_the_store, 2) == [0, 0]
