"""A server whose workers are replicas of several ranks: one server, whatever their pieces are.

On 2 x 2 ranks: rank 0 speaks to it for replica 0, whose ranks 0 and 1 hold its shards, and rank 2
for replica 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Mesh, ParameterServer, Strategy, Trainer, connect
from scaledtrain.callbacks import Callback, StopAtTarget
from scaledtrain.comm.compress import TopK
from scaledtrain.comm.protocols import Link
from scaledtrain.comm.serving.event_log import read_events
from scaledtrain.connection import Transport
from scaledtrain.errors import ConfigError
from scaledtrain.faults import FaultInjector
from scaledtrain.replica import Updater
from scaledtrain.run_dir import EVENTS
from scaledtrain.server import (
    Admission,
    Asynchronous,
    BackupWorkers,
    Ringmaster,
    Server,
    StaleSynchronous,
    Synchronous,
)
from scaledtrain.server.operations import Kind, apply
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, Hogwild, PushSum
from tests.ranks import run_ranks

TRANSPORTS: list[Transport] = ["shared_memory", "torch"]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
POLICIES: dict[str, Admission] = {
    "asynchronous": Asynchronous(),
    "stale_synchronous": StaleSynchronous(1),
    "ringmaster": Ringmaster(1),
    "backup_workers": BackupWorkers(1),
    "synchronous": Synchronous(),
}
MAX_STEPS = 9
TIMEOUT_SECONDS = 60.0


def data(n: int = 32) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def make_trainer(link: Link, strategy: Strategy, **options: Any) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    mesh, loss = Mesh(shard=2), nn.functional.mse_loss
    return Trainer(
        model, loss, SGD, strategy=strategy, mesh=mesh, console=False, link=link, **options
    )


class Steps(Callback):
    """Notes after each step what the strategy knew, and spoils one gradient.

    After the first step all ranks wait for each other, so that none makes all updates alone.

    Args:
        spoilt: rank and step, from 1, of which one number becomes NaN.
    """

    def __init__(self, spoilt: tuple[int, int] | None = None) -> None:
        self.known: list[tuple[Any, ...]] = []
        self.spoilt = spoilt

    def on_gradients(self, trainer: Trainer) -> None:
        if self.spoilt == (trainer.link.group.rank, len(self.known) + 1):
            trainer.replica.gradients()[0][-1] = torch.nan

    def on_step_end(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        self.known.append((strategy.step, strategy.staleness, strategy.learning_rate))
        if len(self.known) == 1:
            trainer.link.group.all_reduce([torch.zeros(1)]).wait()


def locals_of(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.replica.parameters]


def noted_pushes(strategy: ParameterServer) -> list[list[Tensor]]:
    pushed: list[list[Tensor]] = []
    push = strategy._store.push

    def noting(update: Any, version: int, speed: float = 0.0) -> None:
        pushed.append([g.clone() for g in update])
        push(update, version, speed)

    strategy._store.push = noting  # type: ignore[method-assign]
    return pushed


def train_policies(transport: Transport, folder: str) -> dict[str, Any]:
    results = {}
    with connect(transport=transport, timeout_seconds=TIMEOUT_SECONDS) as link:
        for name, policy in POLICIES.items():
            steps = Steps(spoilt=(3, 1))  # piece 1 of replica 1
            strategy = ParameterServer(policy)
            options: Any = {"callbacks": [steps], "run_dir": Path(folder) / name}
            trainer = make_trainer(link, strategy, log_every=4, **options)
            begin, pushed = locals_of(trainer), noted_pushes(strategy)
            result = trainer.fit(
                DataLoader(data(), batch_size=2),
                max_steps=MAX_STEPS,
                eval=DataLoader(data(6), batch_size=2),
                eval_every=3,
            )
            results[name] = {
                "begin": begin,
                "pushed": pushed,
                "end": locals_of(trainer),
                "known": steps.known,
                "step": result.step,
                "evaluation": dict(result.evaluation),
                "ledger": strategy.state_dict()["server"].get("ledger"),
            }
            trainer.close()
    return results


def one_server(log: Path, policy: Admission, ranks: list[dict[str, Any]]) -> Server:
    """A server of one shard, in this process, with whole gradients in the order of the log."""

    def make_updater(parameters: Any) -> Updater:
        return Updater(((str(i), p) for i, p in enumerate(parameters)), SGD)

    pieces = ranks[0]["begin"] + ranks[1]["begin"]
    server = Server(pieces, make_updater, 2, policy)
    gradients: list[Iterator[list[Tensor]]] = [
        iter([a + b for a, b in zip(ranks[r]["pushed"], ranks[r + 1]["pushed"], strict=True)])
        for r in (0, 2)
    ]
    for event in read_events(log):
        kind, worker, _ = event.operation
        gradient = next(gradients[worker]) if kind in (Kind.PUSH, Kind.REJECT) else []
        if kind == Kind.REJECT:
            assert worker == 1
            assert any(g.isnan().any() for g in gradient)
        outcome = apply(server, event.operation, gradient)
        assert (outcome.accepted, outcome.staleness) == (event.accepted, event.staleness)
    assert [next(left, None) for left in gradients] == [None, None]
    return server


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pieces_have_one_server(transport: Transport, tmp_path: Path) -> None:
    """All policies: what every rank ends with is, bit for bit, what a whole server makes of it.

    The first gradient of replica 1 is not finite on rank 3 alone: it is rejected on both.
    """
    by_rank = run_ranks(train_policies, 4, transport, str(tmp_path), timeout_seconds=150)
    for name, policy in POLICIES.items():
        ranks = [of_rank[name] for of_rank in by_rank]
        server = one_server(tmp_path / name / EVENTS, policy, ranks)
        assert server.version == MAX_STEPS
        assert [rank["step"] for rank in ranks] == [MAX_STEPS] * 4
        for replica in (ranks[:2], ranks[2:]):
            assert replica[0]["known"] == replica[1]["known"], name
            end = replica[0]["end"] + replica[1]["end"]
            assert all(map(torch.equal, end, server.parameters)), name
        ledgers = [rank["ledger"] for rank in ranks]
        assert ledgers[2:] == [None, None]
        for count in ("version", "pushed", "accepted"):
            expected = getattr(server.ledger, count)
            assert ledgers[0][count] == ledgers[1][count] == expected, (name, count)
        assert server.ledger.pushed[1] > server.ledger.accepted[1]
        assert ranks[0]["evaluation"] == ranks[1]["evaluation"]
        assert ranks[0]["evaluation"]["loss"] > 0
        assert ranks[2]["evaluation"] == ranks[3]["evaluation"] == {}


class StopOn(Callback):
    """One rank alone wants to stop after its first steps."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.link.group.rank == self.rank:
            trainer.stop()


ENDS: dict[str, tuple[Callable[[], Strategy], list[Callback], dict[str, Any]]] = {
    "callback": (ParameterServer, [StopOn(3)], {}),
    "callback of EASGD": (partial(EASGD, sync_every=2), [StopOn(1)], {}),
    "target": (ParameterServer, [StopAtTarget("loss", at_most=1e9)], {"eval_every": 3}),
    "seconds": (ParameterServer, [], {"max_seconds": 0.1}),
    "local steps": (partial(AsyncLocalSGD, 4, proportional_steps=True), [], {"max_steps": 14}),
    "gossip": (Gossip, [], {"max_steps": 14}),
    "push-sum": (PushSum, [], {"max_steps": 14}),
}


class Uneven(Callback):
    """Counts steps, and makes the ranks of a replica measure different times."""

    steps = 0

    def on_gradients(self, trainer: Trainer) -> None:
        self.steps += 1
        seconds = trainer.timeline.now() + 0.002 * trainer.link.group.rank
        while trainer.timeline.now() < seconds:
            pass


def end_runs(transport: Transport) -> dict[str, tuple[str, int, int]]:
    results = {}
    with connect(transport=transport, timeout_seconds=TIMEOUT_SECONDS) as link:
        for name, (make, callbacks, limits) in ENDS.items():
            uneven = Uneven()
            trainer = make_trainer(link, make(), callbacks=[uneven, *callbacks], log_every=2)
            evaluated = DataLoader(data(6), batch_size=2)
            result = trainer.fit(
                DataLoader(data(), batch_size=2), **{"max_steps": 10**6, **limits}, eval=evaluated
            )
            results[name] = (result.stopped_by, result.step, uneven.steps)
            trainer.close()
    return results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_one_rank_wants_ends_the_run_of_all(transport: Transport) -> None:
    ranks = run_ranks(end_runs, 4, transport, timeout_seconds=150)
    for name in ENDS:
        results = [rank[name] for rank in ranks]
        assert results[0] == results[1], name  # of a replica: why, version, steps made
        assert results[2] == results[3], name
    stopped_by = {name: (ranks[0][name][0], ranks[2][name][0]) for name in ENDS}
    assert stopped_by["callback"] == ("another replica", "callback")
    assert stopped_by["callback of EASGD"] == ("callback", "another replica")
    assert stopped_by["target"] == ("callback", "another replica")
    assert "max_seconds" in stopped_by["seconds"]
    assert stopped_by["local steps"] == ("max_steps", "max_steps")
    for name in ("local steps", "gossip", "push-sum"):
        assert [rank[name][1:] for rank in ranks] == [(14, 14)] * 4


REFUSED: dict[str, tuple[Callable[[], Strategy], str]] = {
    "shards": (partial(ParameterServer, shards=2), r"shards=2 of a parameter server cannot be"),
    "overlap": (partial(ParameterServer, overlap=True), r"overlap of a parameter server cannot be"),
    "both": (
        partial(ParameterServer, overlap=True, compression=TopK(0.5)),
        r"overlap and compression=.*divided already, over the 2 ranks.*leave them out",
    ),
    "stops work": (partial(ParameterServer, Ringmaster(1, stop=True)), "abandon a step"),
    "hogwild": (Hogwild, "each needs a whole replica in it"),
}


def refuse_and_go_on() -> tuple[list[Tensor], list[Tensor]]:
    """A replica of two ranks; then it trains with a server of its own, saved and resumed."""
    with connect(transport="torch", timeout_seconds=TIMEOUT_SECONDS) as link:
        for make, message in REFUSED.values():
            with pytest.raises(ConfigError, match=message):
                make_trainer(link, make())

        def train(*limits: int, state: Any = None) -> tuple[list[Tensor], Any]:
            trainer = make_trainer(link, ParameterServer())
            if state is not None:
                trainer.load_state_dict(state)
            for limit in limits:
                trainer.fit(DataLoader(data(), batch_size=2), max_steps=limit)
            trainer.close()
            return locals_of(trainer), trainer.state_dict()

        straight, _ = train(9)
        _, state = train(4, 6)
        resumed, _ = train(9, state=state)
    return straight, resumed


def test_what_pieces_cannot_have_is_refused_and_a_replica_alone_resumes() -> None:
    for straight, resumed in run_ranks(refuse_and_go_on, 2):
        assert all(map(torch.equal, straight, resumed))


def train_with_a_death(transport: Transport, victim: int) -> tuple[str, int]:
    logging.basicConfig(level=logging.WARNING)
    faults = FaultInjector().fail_at(victim, 3)
    link = connect(transport=transport, timeout_seconds=TIMEOUT_SECONDS)
    trainer = make_trainer(link, ParameterServer(), callbacks=[faults])
    try:
        trainer.fit(DataLoader(data(), batch_size=2), max_steps=60)
    except Exception as error:
        link.abandon()
        return str(error), -1
    link.close()
    return "", trainer.step_count


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_rank_takes_its_replica_with_it(
    transport: Transport, capfd: pytest.CaptureFixture[str]
) -> None:
    results = run_ranks(train_with_a_death, 4, transport, 3, killed=[3], timeout_seconds=90)
    assert results[:2] == [("", 60)] * 2
    # Inside of fully_shard the error is torch's own, which knows no ranks.
    assert "rank 3" in results[2][0] or "onnection closed" in results[2][0]
    assert "worker 1 is lost, and the other 1 go on without it" in capfd.readouterr().err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_with_a_shard_ends_the_run_of_all(victim: int) -> None:
    results = run_ranks(train_with_a_death, 4, "torch", victim, killed=[victim], timeout_seconds=90)
    assert all(result[0] != "" for result in results if result is not None)
