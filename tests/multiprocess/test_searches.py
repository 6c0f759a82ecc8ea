"""A search with the processes that it starts, and that are killed with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scaledtrain

TIMEOUT_SECONDS = 110.0  # for a command on a busy machine
SIGNS = ("data=tests.tasks.signs", "data.local_batch_size=32", "device=cpu")


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(scaledtrain.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_search_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two at once; one has a learning rate that cannot be, one would take for ever."""
    command = (
        "-m", "scaledtrain.tune", *SIGNS, "tune.sampler=grid", "tune.at_once=2", "eval_every=5",
        "run_dir=search", "optimizer.lr=0.1,-1,0.2", "max_steps=${oc.env:STEPS}",
    )  # fmt: skip
    search = start(tmp_path, *command, STEPS="100000000")
    first = tmp_path / "search/trials/0000/metrics-rank0.jsonl"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (first.exists() and first.read_text().count("evaluation") > 2):
        assert time.monotonic() < deadline
        assert search.poll() is None, search.communicate()
        time.sleep(0.05)
    os.kill(search.pid, signal.SIGKILL)
    _, told = search.communicate(timeout=TIMEOUT_SECONDS)
    search = start(tmp_path, *command, STEPS="10")
    out, err = search.communicate(timeout=TIMEOUT_SECONDS)
    assert search.returncode == 0, err
    assert "trial 0: it was interrupted, and is run again" in err
    assert "trial 1 crashed" in told + err  # in one of the two, and once
    assert (told + err).count("Invalid learning rate: -1") == 1  # its last lines
    results = {
        number: json.loads((tmp_path / f"search/trials/{number:04}/result.json").read_text())
        for number in (0, 2)
    }
    assert {r["result"]["step"] for r in results.values()} == {10}
    ended_how = {line.split()[0]: line.split()[3] for line in out.splitlines()[2:5]}
    assert ended_how == {"0": "complete", "1": "crashed", "2": "complete"}
    assert not (tmp_path / "search/trials/0003").exists()
