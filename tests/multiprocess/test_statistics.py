"""Statistics of sharded data by several processes: the same bits, and nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaledtrain import connect
from scaledtrain.data import ShardWriter, compute_statistics
from scaledtrain.errors import DataError
from tests.ranks import run_ranks

OPTIONS: dict[str, Any] = {"covariance": ["x"], "classes": ["label"], "save": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    random = np.random.default_rng(0)
    with ShardWriter(folder, shard_samples=100) as writer:
        x = random.normal(3, 1, (990, 40)).astype(np.float32)
        writer.write_batch({"x": x, "label": random.integers(0, 9, 990)})
    return folder


def of_rank(folder: Path) -> Any:
    with connect(transport="torch", timeout_seconds=30) as link:
        return compute_statistics(folder, **OPTIONS, group=link.group).to_json()


def test_bits_do_not_depend_on_workers_nor_on_ranks(folder: Path) -> None:
    alone = compute_statistics(folder, **OPTIONS).to_json()
    assert compute_statistics(folder, **OPTIONS, workers=2).to_json() == alone
    assert not active_children()
    assert run_ranks(of_rank, 2, folder) == [alone, alone]


def test_a_worker_that_dies_is_told(folder: Path) -> None:
    def kill(done: int, shards: int) -> None:
        for worker in active_children():
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(DataError, match="a process that read .* died"):
        compute_statistics(folder, **OPTIONS, workers=1, on_shard=kill)
    assert not active_children()


def test_workers_end_with_a_killed_parent(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from scaledtrain.data import compute_statistics\n"
        "if __name__ == '__main__':\n"
        "    def kill(done, shards):\n"
        "        print('killed', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    compute_statistics(sys.argv[1], workers=1, save=False, on_shard=kill)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(folder)]
    # The worker has the same standard output: it is at its end when both are gone.
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=100)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"killed\n")
