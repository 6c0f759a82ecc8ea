"""A rank that dies or hangs: the others end within seconds and say who it was."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaledtrain import DiLoCo, ParameterServer, Strategy, Sync, Trainer, connect
from scaledtrain.connection import Transport
from scaledtrain.errors import ClusterError, ConfigError
from scaledtrain.faults import FaultInjector
from scaledtrain.schedule import Slowdown
from tests.ranks import run_ranks

TRANSPORTS: list[Transport] = ["shared_memory", "torch"]
BATCHES = [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))] * 8
SGD = partial(torch.optim.SGD, lr=0.1)
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "sync": Sync,
    "async": ParameterServer,
    "diloco": lambda: DiLoCo(4, overlap_steps=2),
}


def train_with_a_victim(name: str, transport: Transport, victim: int) -> tuple[str, str, float]:
    """Returns the error of a survivor, and the seconds it took after the victim's last step."""
    strategy = STRATEGIES[name]()
    link = connect(transport=transport, timeout_seconds=60)
    trainer = Trainer(
        nn.Linear(3, 2), F.cross_entropy, SGD, strategy=strategy,
        callbacks=[FaultInjector().fail_at(victim, 20)],
        slowdown=Slowdown({}, min_compute_seconds=0.01), log_every=1000, console=False, link=link,
    )  # fmt: skip
    start = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        trainer.fit(BATCHES, max_seconds=60)
    seconds = time.monotonic() - start
    link.abandon()
    return type(caught.value).__name__, str(caught.value), seconds


@pytest.mark.parametrize(
    ("name", "transport", "victim"),
    [
        ("sync", "shared_memory", 0),
        ("sync", "torch", 2),
        ("diloco", "torch", 1),
        ("async", "shared_memory", 0),
        ("async", "torch", 0),
    ],
)
def test_killed_rank_is_noticed_and_named(name: str, transport: Transport, victim: int) -> None:
    results = run_ranks(
        train_with_a_victim, 3, name, transport, victim, killed=[victim], timeout_seconds=90
    )
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        kind, message, seconds = result
        # 20 steps of 10 ms, at most 0.1 s to notice, 4 s to compare notes (a busy machine takes its
        # time for all of them); not the timeout of 60 s.
        assert seconds < 40, message
        assert kind in ("PeerLostError", "ClusterError"), message
        # On a busy machine the other survivor may not have noticed by then: "ranks 0, 2".
        assert re.search(rf"ranks? (\d+, )*{victim}\b", message), message


def wait_for_one_that_never_comes(transport: Transport) -> str:
    link = connect(transport=transport, timeout_seconds=3)
    assert link.store is not None
    message = ""
    if link.group.rank == 0:
        with pytest.raises(ClusterError) as caught:
            link.group.all_reduce([torch.zeros(3)]).wait()
        message = str(caught.value)
        link.store.set("waited", "1")
    else:
        link.store.wait(["waited"], timedelta(seconds=30))
    link.abandon()
    return message


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_wait_times_out_and_names_both(transport: Transport) -> None:
    message, _ = run_ranks(wait_for_one_that_never_comes, 2, transport)
    assert "rank 0 waited" in message
    assert "rank 1" in message
    assert "timeout_seconds" in message


def failing_server(transport: Transport) -> str:
    """A push that the server cannot use: rank 0 hears why, the others that it ended."""
    link = connect(transport=transport, timeout_seconds=10)

    def make_optimizer(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)

        def fail(*_: Any) -> None:
            raise ConfigError("the optimizer broke")

        optimizer.register_step_pre_hook(fail)
        return optimizer

    trainer = Trainer(
        nn.Linear(3, 2), F.cross_entropy, make_optimizer, strategy=ParameterServer(),
        console=False, link=link,
    )  # fmt: skip
    with pytest.raises((ConfigError, ClusterError)) as caught:
        trainer.fit(BATCHES, max_steps=10)
    link.abandon()
    return str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_error_on_the_server_ends_all(transport: Transport) -> None:
    zero, one = run_ranks(failing_server, 2, transport)
    assert "the optimizer broke" in zero
    assert "the parameter server stopped" in one or "rank 0" in one


def meet_with_one_missing() -> None:
    os.environ["WORLD_SIZE"] = "3"
    connect(timeout_seconds=2)


def test_missing_rank_is_named() -> None:
    with pytest.raises(ClusterError, match="for rank 2 of 3, which did not come"):
        run_ranks(meet_with_one_missing, 2)


def test_environment_of_slurm() -> None:
    from scaledtrain.ranks import RankInfo

    env = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-04,7],login1",
        "SLURM_JOB_ID": "123456",
    }
    info = RankInfo.from_environment(env)
    assert (info.rank, info.size, info.local_rank) == (5, 8, 1)
    assert info.master_address == "gpu03"
    assert info.master_port == 15000 + 3456
    alone = RankInfo.from_environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"})  # no srun
    assert alone.size == 1
    with pytest.raises(ConfigError, match="rank 4 of 4 cannot be"):
        RankInfo.from_environment({"RANK": "4", "WORLD_SIZE": "4"})


def test_port_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ClusterError, match="is in use by another program"):
            connect(timeout_seconds=2)
