"""Real asynchronous runs, made again from their event logs: every bit is the same."""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from scaledtrain import Callback, Trainer, connect
from scaledtrain.comm.serving.event_log import Event, read_events
from scaledtrain.command_line import compose
from scaledtrain.replay import Replayed, replay
from scaledtrain.server.operations import Kind
from scaledtrain.tasks import Task, accuracy
from scaledtrain.train import run
from tests.ranks import Process, end_rank, free_port, run_ranks, start_rank


class Net(nn.Sequential):
    """Draws random numbers in every step."""

    def __init__(self, in_features: int, n_classes: int) -> None:
        super().__init__(
            nn.Linear(in_features, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(32, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.flatten(1))
        return out


def largest() -> Task:
    """Which of the first ten numbers is the largest."""
    generator = torch.Generator().manual_seed(7)
    train, test = torch.randn(1620, 64, generator=generator).split((1440, 180))
    return Task(
        TensorDataset(train, train[:, :10].argmax(1)),
        TensorDataset(test, test[:, :10].argmax(1)),
        metrics={"accuracy": accuracy},
        sizes={"in_features": 64, "n_classes": 10, "out_features": 10},
        gathers=True,
    )


OWN = "model=tests.multiprocess.test_replay.Net"
DATA = ["data=tests.multiprocess.test_replay.largest", "data.local_batch_size=32", "console=false"]
CASES = {
    # An epoch is 29 batches, so that one worker has one less than the others.
    "asgd": ["strategy=async", OWN, "max_steps=60", "data.local_batch_size=50"],
    "everything": [
        "strategy=async", "strategy/correction=dc_asgd_adaptive", "optimizer=adamw",
        "strategy.shards=2", "strategy.overlap=true", OWN, "max_steps=60",
        "strategy/compression=top_k", "strategy.compression.fraction=0.1",
    ],
    "time": [  # ends when one worker has trained for long enough
        "strategy=async", "strategy/admission=stale_synchronous", "strategy.overlap=true",
        "strategy/compression=bf16", "max_steps=null", "max_seconds=0.4", OWN,
    ],
    "backup": [
        "strategy=async", "strategy/admission=backup_workers", "strategy.admission.k=2",
        "strategy/compression=bf16", "strategy.shards=2",
        "max_steps=40", "gradient_accumulation_steps=2", OWN,
    ],
    "stopped": [
        "strategy=async", "strategy/admission=ringmaster", "strategy.admission.stop=true",
        "strategy.admission.delay_threshold=2", "slowdown.factors={2: 6}",
        "slowdown.min_compute_seconds=0.004", "max_steps=60", OWN,
    ],
    "target": [
        "strategy=async", "strategy/admission=softsync", "strategy.admission.c=2",
        "target.metric=accuracy", "target.at_least=0.3", "eval_every=5", "max_steps=400",
    ],
    "part of a round": ["strategy=async_local_sgd", "strategy.sync_every=1000", "max_steps=null",
                        "max_seconds=0.3", OWN],
    "local": ["strategy=async_local_sgd", "strategy.sync_every=5", "max_steps=42", OWN],
    "easgd": ["strategy=easgd", "strategy.sync_every=4", "max_steps=null", "max_seconds=0.3", OWN],
}  # fmt: skip


def train_cases(folder: str) -> None:
    with connect(timeout_seconds=30) as link:
        for name, overrides in CASES.items():
            run(compose([*DATA, "max_grad_norm=1.0", *overrides]), link, Path(folder) / name)


def pulled_twice(events: list[Event]) -> int:
    """How often a worker pulled without having pushed: it gave up what it computed."""
    own = [
        [e.operation.kind for e in events if e.operation.worker == w and e.operation.kind < 4]
        for w in range(3)
    ]
    return sum(kinds[i : i + 2] == [Kind.PULL] * 2 for kinds in own for i in range(len(kinds)))


def test_runs_of_three_processes_are_made_again_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(train_cases, 3, str(tmp_path))
    replayed: dict[str, Replayed] = {}
    for name in CASES:
        replayed[name] = replay(tmp_path / name)
        assert replayed[name].equal, name
        assert replayed[name].workers == 3
    assert replayed["asgd"].accepted == 60
    assert replayed["everything"].accepted == 60
    assert replayed["backup"].accepted == 2 * 40
    # 42 steps of each are 8 rounds of 5, and one of 2 that ends with the run.
    assert replayed["local"].accepted == 3 * 9
    # Each shows what it is there for.
    logs = {name: list(read_events(tmp_path / name / "events.bin")) for name in CASES}
    assert max(e.staleness for e in logs["asgd"]) >= 2
    assert max(e.staleness for e in logs["everything"]) >= 2
    assert replayed["backup"].pushes > replayed["backup"].accepted
    assert pulled_twice(logs["stopped"]) >= 2
    assert replayed["target"].accepted < 2 * 400
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    replay(tmp_path / "local")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


class StopWhenTold(Callback):
    """End the run as soon as there is a file of that name."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_step_end(self, trainer: Trainer) -> None:
        if self._file.exists():
            trainer.stop()


def train_until_told(folder: str) -> None:
    overrides = [
        "strategy=async", "max_steps=null", "max_seconds=100", *DATA, OWN,
        "slowdown.min_compute_seconds=0.01",
    ]  # fmt: skip
    with connect(timeout_seconds=30) as link:
        stop = StopWhenTold(Path(folder, "end"))
        run(compose(overrides), link, Path(folder, "run"), callbacks=[stop])


def test_a_run_in_which_one_worker_was_killed_and_came_back_and_one_died(tmp_path: Path) -> None:
    port, numbers = free_port(), itertools.count()
    log = tmp_path / "run" / "events.bin"

    def launch(rank: int) -> Process:
        folder = tmp_path / f"process-{next(numbers)}"
        return start_rank(train_until_told, rank, 3, port, folder, str(tmp_path))

    ranks = [launch(rank) for rank in range(3)]

    def has_pushed(worker: int, attempt: int) -> bool:
        """Whether the worker's process of that number has."""
        now = 0
        for event in read_events(log) if log.exists() and log.stat().st_size > 32 else []:
            kind, whose, version = event.operation
            if whose == worker and kind == Kind.ADD:
                now = max(now, version)
            elif whose == worker and kind == Kind.PUSH and now == attempt:
                return True
        return False

    def wait_until_pushed(worker: int, attempt: int) -> None:
        end = time.monotonic() + 60.0
        while not has_pushed(worker, attempt):
            assert time.monotonic() < end, f"process {attempt} of worker {worker} did not push"
            time.sleep(0.05)

    try:
        wait_until_pushed(2, 0)
        end_rank(ranks[2])
        ranks[2] = launch(2)
        wait_until_pushed(2, 1)
        ranks[1].send_signal(signal.SIGKILL)
        ranks[1].wait()
        (tmp_path / "end").touch()
        assert [rank.wait(60) for rank in ranks] == [0, -signal.SIGKILL, 0]
    finally:
        for rank in ranks:
            end_rank(rank)
    assert replay(tmp_path / "run").equal
