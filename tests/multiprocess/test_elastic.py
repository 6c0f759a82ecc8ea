"""A job under torchrun of which a host dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from scaledtrain.checkpoint.folder import saved_steps
from scaledtrain.command_line import compose
from scaledtrain.connection import connect
from scaledtrain.train import run
from tests.ranks import free_port

SCRIPT = Path(__file__).parents[2] / "launch" / "elastic.sh"
# Four batches of 16 a step: two on each of two hosts, then four on the one that is left.
ELASTIC = ["elastic=true", "data.global_batch_size=64", "data.local_batch_size=16"]
COMMON = ["data=tests.tasks.signs", "device=cpu", "max_steps=60", "log_every=10"]
SECONDS = 120.0


@pytest.mark.skipif(sys.platform != "linux", reason="hosts' memory is /dev/shm")
@pytest.mark.timeout(240)
def test_a_job_goes_on_without_a_host_that_died(tmp_path: Path) -> None:
    """With equal global batches it comes to what one process does, up to rounding."""
    endpoint, run_dir = f"127.0.0.1:{free_port()}", tmp_path / "run"
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "LOCAL_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (tmp_path / name).open("wb") as log:
            line = [SCRIPT, "-n", "1:2", "-e", endpoint, *arguments]
            started.append(subprocess.Popen(line, env=environment, stdout=log, stderr=log))
        return started[-1]

    try:
        start("meeting", "-s")  # else the first launcher is the place, and all ends with it
        until(lambda: "hosts meet here" in (tmp_path / "meeting").read_text(), "the place to meet")
        training = [
            *(f"run_dir={run_dir}", "slowdown.min_compute_seconds=0.05", *COMMON, *ELASTIC),
            *("checkpointing=steps", "checkpointing.every_steps=20"),
            f"checkpointing.memory_folder={tmp_path}",
            "checkpointing.memory_every_steps=1",
        ]
        hosts = [start(f"host-{i}", *training) for i in range(2)]
        until(lambda: bool(saved_steps(run_dir / "checkpoints")), "the first checkpoint")
        kill_host(hosts[1])
        assert hosts[0].wait(SECONDS) == 0, (tmp_path / "host-0").read_text()[-3000:]
    finally:
        for process in started:
            if process.poll() is None:
                kill_host(process)
    told = "".join((tmp_path / f"host-{i}").read_text() for i in (0, 1))
    assert "2 replicas on cpu" in told
    assert "resumed at step " in told
    assert "1 replica on cpu" in told
    result = json.loads((run_dir / "result.json").read_text())
    assert result["environment"]["world_size"] == 1
    with connect() as link:
        alone = run(compose([*COMMON, "data.local_batch_size=64", "console=false"]), link)
    loss = result["result"]["evaluation"]["loss"]
    assert loss == pytest.approx(alone.evaluation["loss"], rel=1e-4)


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def kill_host(process: subprocess.Popen[bytes]) -> None:
    """A launcher and what it has started, at once."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
