"""Ranks that hang, ranks that are silent, ranks that are slow: named, within the limit."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import ParameterServer, Strategy, Sync, Trainer, Watch
from scaledtrain.comm.notes import Notes
from scaledtrain.comm.protocols import Link
from scaledtrain.faults import FaultInjector
from scaledtrain.schedule import Slowdown
from scaledtrain.watch import watchdog
from scaledtrain.watch.messenger import Messenger
from scaledtrain.watch.paces import Table
from scaledtrain.watch.position import Position, Stage
from scaledtrain.watch.watchdog import Watchdog
from tests.ranks import drop_connections
from tests.worlds import World

BATCHES = [(torch.ones(4, 2), torch.ones(4, 1))] * 8


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which processes would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(watchdog, "_end", codes.append)
    return codes


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reports(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("stuck-*.txt"))]


def test_a_step_that_takes_too_long_is_told_with_its_stack(
    tmp_path: Path, ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    faults = FaultInjector().stall_at(0, 3, seconds=1.0)
    trainer = Trainer(
        nn.Linear(2, 1), F.mse_loss, partial(torch.optim.SGD, lr=0.1), callbacks=[faults],
        watch=Watch(step_seconds=0.3), run_dir=tmp_path, console=False,
    )  # fmt: skip
    trainer.fit(BATCHES, max_steps=5)
    trainer.close()
    assert ended == [70]
    (report,) = reports(tmp_path)
    assert report.startswith("watchdog: step 3 of rank 0 has taken 0.")
    assert "in 'compute'; the limit is 0.3 s; all ranks end (exit code 70)" in report
    assert "     0         2       0  compute" in report
    assert "thread MainThread" in report
    assert "time.sleep(seconds)" in report  # the line of the stall
    assert report in capsys.readouterr().err


def test_what_is_in_time_is_left_alone(ended: list[int]) -> None:
    """Steps of 20 ms, 30 of them, with workers that are forked while the threads are there."""
    data = DataLoader(TensorDataset(*BATCHES[0]), batch_size=2, num_workers=1)
    trainer = Trainer(
        nn.Linear(2, 1), F.mse_loss, partial(torch.optim.SGD, lr=0.1),
        watch=Watch(step_seconds=20.0, step_times=5.0), console=False,
        slowdown=Slowdown({}, min_compute_seconds=0.02),
    )  # fmt: skip
    for epochs in (1, 2):  # two fits, the threads of each end with it
        trainer.fit(data, max_epochs=epochs, eval=data)
        assert not [t for t in threading.enumerate() if t.name.startswith("watch")]
    assert not ended


class Ranks:
    """Watchdogs of several ranks over one store, without training.

    On a busy machine they may raise the alarm before this has returned: where the ranks are is
    told before, by ``stages``.
    """

    def __init__(self, folder: Path, *stages: Stage, lockstep: bool = True) -> None:
        store, size = dist.HashStore(), len(stages)
        self.positions = [Position(lambda: (7, 1)) for _ in stages]
        options = Watch(step_seconds=0.4)
        self.watchdogs = []
        self.messengers: list[Messenger | None] = []
        for position, stage in zip(self.positions, stages, strict=True):
            position.enter("data")
            position.enter(stage)
        for rank, position in enumerate(self.positions):
            notes = Notes(store, rank, size)
            dog = Watchdog(options, position, notes, folder, lockstep)
            self.watchdogs.append(dog)
            self.messengers.append(Messenger(notes, [dog.exchange], 0.04))

    def go_on(self, *ranks: int) -> None:
        for rank in ranks:
            self.positions[rank].enter("data")

    def stop(self, rank: int) -> None:
        """As if its process had been stopped: neither thread runs."""
        self.watchdogs[rank].close()
        messenger = self.messengers[rank]
        assert messenger is not None
        self.watchdogs[rank]._over.clear()  # it does not say that it has ended
        messenger.close()

    def close(self) -> None:
        for dog, messenger in zip(self.watchdogs, self.messengers, strict=True):
            dog.close()
            if messenger is not None:
                messenger.close()


def test_all_ranks_tell_where_they_are_and_end(tmp_path: Path, ended: list[int]) -> None:
    """Rank 2 reads data; the others wait in the reduction of the same step."""
    ranks = Ranks(tmp_path, "reduce", "reduce", "data")
    wait_until(lambda: len(ended) == 3 and reports(tmp_path))  # a busy disk takes its time
    ranks.close()
    assert ended == [70] * 3
    (report,) = reports(tmp_path)
    assert "ranks 0, 1 wait for rank 2" in report
    rows = [line.split()[:4] for line in report.splitlines()[3:6]]
    assert rows == [["0", "7", "1", "reduce"], ["1", "7", "1", "reduce"], ["2", "7", "1", "data"]]
    for rank in range(3):
        assert f"--- rank {rank} ---" in report


@pytest.mark.alone
def test_a_silent_rank_is_named_by_the_others(tmp_path: Path, ended: list[int]) -> None:
    ranks = Ranks(tmp_path, "data", "data", "data")
    ranks.stop(1)

    def others_ended() -> bool:
        ranks.go_on(0, 2)  # they are in time: it is the silence that is noticed
        return len(ended) == 2

    wait_until(others_ended)
    ranks.close()
    (report,) = reports(tmp_path)
    assert report.startswith("watchdog: rank 1 has not reported to rank 0 for 0.")
    assert "rank 1 does not answer; the others wait for it" in report
    assert "then silent" in report
    assert "--- rank 1 does not answer: stopped, dead, or held in C code ---" in report


@pytest.mark.alone
def test_without_lockstep_a_silent_rank_is_only_warned_of(
    tmp_path: Path, ended: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(tmp_path, "data", "data", lockstep=False)
    ranks.stop(1)

    def warned() -> bool:
        ranks.go_on(0)
        return "the others go on without it" in caplog.text

    wait_until(warned)
    ranks.close()
    assert not ended
    assert not reports(tmp_path)


class StuckStore:
    """A store whose process has been stopped: whoever asks it waits."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def clone(self) -> StuckStore:
        return self

    def compare_set(self, *_: str) -> bytes:
        self.free.wait(20)
        raise RuntimeError("it has gone")


def test_where_the_store_does_not_answer_each_tells_about_itself(
    tmp_path: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_STORE_SECONDS", 0.2)
    store: Any = StuckStore()
    position = Position(lambda: (7, 1))
    position.enter("pull")
    dog = Watchdog(Watch(step_seconds=0.2), position, Notes(store, 1, 2), tmp_path, True)
    wait_until(lambda: ended)
    dog.close()
    store.free.set()
    (report,) = reports(tmp_path)
    assert "rank 1 tells this about itself alone: the job's store, which is on rank 0" in report
    assert "--- rank 0" not in report
    assert "thread MainThread" in report


def test_a_limit_in_usual_steps_is_for_steps_only() -> None:
    position = Position(lambda: (0, 0))
    for _ in range(9):
        position.enter("data")
        position.enter("apply")
    assert position.usual_seconds is None
    position.enter("data")
    position.enter("apply")
    position.enter("save")
    assert position.usual_seconds is not None
    assert not position.place.in_step
    began = position.place.began
    position.enter("data")
    position.enter("compute")
    assert position.place.in_step
    assert began <= position.place.began <= position.place.since


def test_the_alarm_of_a_step_does_not_go_off_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """faulthandler's, which ends the process: set in a step, it is off in a long save."""
    set_for: list[float | None] = []
    fake = SimpleNamespace(
        dump_traceback_later=lambda seconds, **_: set_for.append(seconds),
        cancel_dump_traceback_later=lambda: set_for.append(None),
    )
    monkeypatch.setattr(watchdog, "faulthandler", fake)
    monkeypatch.setattr(watchdog, "_ROUND_SECONDS", 0.01)
    position = Position(lambda: (0, 0))
    for _ in range(10):
        position.enter("data")
        position.enter("apply")
    position.enter("data")
    notes = Notes(None, 0, 1)
    dog = Watchdog(Watch(step_times=2.0), position, notes, None, lockstep=True)
    wait_until(lambda: set_for and set_for[-1] == 2 * 10.0 + 30.0)  # 10 s is the least limit
    position.enter("save")
    wait_until(lambda: set_for[-1] is None)
    dog.close()


def test_waiting_for_one_that_evaluates_alone_is_no_step() -> None:
    position = Position(lambda: (0, 0))
    for _ in range(10):
        position.enter("data")
        position.enter("apply")
    position.enter("data")
    for lockstep in (False, True):
        dog = Watchdog(Watch(step_times=2.0), position, Notes(None, 0, 1), None, lockstep=lockstep)
        try:
            for stage, expected in (("pull", 10.0 if lockstep else None), ("compute", 10.0)):
                position.enter(stage)
                assert dog._limit() == expected
        finally:
            dog.close()


@pytest.mark.skipif(sys.platform != "linux", reason="finds sockets in /proc")
def test_a_lost_connection_is_made_again_and_nobody_is_taken_for_dead() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one, other = (Notes(store, rank, 2) for rank in range(2))
    words = itertools.count()
    messenger = Messenger(one, [lambda: one.write("word", str(next(words)))], 0.01)
    wait_until(lambda: other.read("word"))
    drop_connections(store.port)
    assert other.connect_again()
    before = other.read("word")
    wait_until(lambda: other.read("word") != before)
    messenger.close()


def straggling(link: Link, make: Callable[[], Strategy], run_dir: Path) -> None:
    # 30 ms instead of 3: far enough for a busy machine.
    slowdown = Slowdown({1: 10.0}, min_compute_seconds=0.003)
    trainer = Trainer(
        nn.Linear(2, 1), F.mse_loss, partial(torch.optim.SGD, lr=0.1), strategy=make(), link=link,
        watch=Watch(ranks_every=4), slowdown=slowdown, run_dir=run_dir, console=False,
    )  # fmt: skip
    trainer.fit(BATCHES * 3, max_epochs=1)
    trainer.close()


@pytest.mark.alone
@pytest.mark.parametrize("make", [Sync, ParameterServer])
def test_a_straggler_is_named(
    make: Callable[[], Strategy], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    World(3).run(straggling, make, tmp_path)
    lines = map(json.loads, (tmp_path / "metrics-rank0.jsonl").read_text().splitlines())
    tables = [line for line in lines if line["kind"] == "ranks"]
    assert tables
    assert list(tables[-1]["slow"]) == ["1"]
    assert len(tables[-1]["rank_seconds"]) == 3
    assert "rank 1 is slow" in caplog.text
    assert "rank 0 is slow" not in caplog.text


def test_the_rule_for_slow_ranks() -> None:
    rows = [{"compute": 0.010}, {"compute": 0.010, "data": 0.005}, {"compute": 0.0151}]
    table = Table([*rows, {"waiting": 1.0, "compute": 0.010}], factor=1.5)
    # The lower median of 10, 15, 15.1 and 10 is 10, and 15 is not more than 1.5 of it.
    assert table.slow == {2: 1.51}
    assert Table([{"compute": 0.01}, {"compute": 0.02}], factor=1.5).slow == {1: 2.0}
    assert Table([{"compute": 0.01}], factor=1.5).slow == {}
    assert Table([{}, {}], factor=1.5).slow == {}
    assert "1.5 x the median" in str(table)
