"""Searches, ablations and multiruns with the processes that they start."""

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


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, out, err


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
    search.communicate(timeout=TIMEOUT_SECONDS)
    code, out, err = ended(start(tmp_path, *command, STEPS="10"))
    assert code == 0, err
    assert "trial 0: it was interrupted, and is run again" in err
    assert "trial 1 crashed" in err
    assert "Invalid learning rate: -1" in err  # its last lines
    results = {
        number: json.loads((tmp_path / f"search/trials/{number:04}/result.json").read_text())
        for number in (0, 2)
    }
    assert {r["result"]["step"] for r in results.values()} == {10}
    ended_how = {line.split()[0]: line.split()[3] for line in out.splitlines()[2:5]}
    assert ended_how == {"0": "complete", "1": "crashed", "2": "complete"}
    assert not (tmp_path / "search/trials/0003").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_multirun_trains_each_combination_in_a_folder_of_its_own(tmp_path: Path) -> None:
    command = ("-m", "scaledtrain.train", "--multirun", *SIGNS, "max_steps=2", "run_dir=many")
    code, out, err = ended(start(tmp_path, *command, "seed=0,1"))
    assert code == 0, err
    assert "2 trainings: " in out
    seeds = {}
    for folder in (tmp_path / "many").iterdir():
        if folder.is_dir():
            text = (folder / "config.yaml").read_text()
            seeds[folder.name] = text.partition("\nseed: ")[2].partition("\n")[0]
            assert (folder / "result.json").exists()
    assert seeds == {"0": "0", "1": "1"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_ablation_measures_real_trainings(tmp_path: Path) -> None:
    command = ("-m", "scaledtrain.ablate", *SIGNS, "max_steps=10", "run_dir=ablation")
    code, out, err = ended(start(tmp_path, *command, "ablate.seeds=[0]", "ablate.at_once=2"))
    assert code == 0, err
    lines = (tmp_path / "ablation/ablation.jsonl").read_text().splitlines()
    rows = {row["without"]: row for row in map(json.loads, lines)}
    assert rows.keys() == {"full", "momentum"}
    assert rows["full"]["quality"] != rows["momentum"]["quality"]
    assert all(
        row["samples_per_second"] > 0 and row["memory_bytes"] > 2**20 for row in rows.values()
    )
    assert "momentum: one seed gives no error bar" in out
