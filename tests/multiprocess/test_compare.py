"""The comparison command on real processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scaledtrain import compare
from scaledtrain.report.runs import read_run
from tests.ranks import run_ranks

STEP_SECONDS = 0.02


def run_command(arguments: list[str]) -> None:
    sys.argv = ["scaledtrain.compare", *arguments]
    compare.main()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(90)
def test_sync_keeps_the_pace_of_the_slowest_and_async_does_not(tmp_path: Path) -> None:
    arguments = [
        f"run_dir={tmp_path}",
        "workers=2",
        "slowdown.factors={1: 4.0}",
        f"slowdown.min_compute_seconds={STEP_SECONDS}",
        "max_seconds=1.2",
        "log_every=5",
        "target.at_least=0.2",
    ]
    run_ranks(run_command, 2, arguments)

    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "comparison.json").read_text())
    sync, asynchronous = saved["results"]
    assert [sync["name"], asynchronous["name"]] == ["sync", "async"]
    for result in saved["results"]:
        # Worker 0 computes for 0.02 s, worker 1 four times as long: at least, since both are busy.
        assert 1.0 * STEP_SECONDS <= result["compute_seconds"][0] < 3 * STEP_SECONDS
        assert 4.0 * STEP_SECONDS <= result["compute_seconds"][1] < 12 * STEP_SECONDS
        assert result["seconds_to_goal"] is not None
        # The textbook leaves out messages, so it is an upper bound, up to the ends of the run.
        ratio = result["samples_per_second"] / result["expected_samples_per_second"]
        assert 0.3 < ratio < 1.1
    # In the time of a step of worker 1, worker 0 makes four: (4 + 1) / 2 = 2.5 times sync's pace.
    assert asynchronous["samples_per_second"] > 1.5 * sync["samples_per_second"]
    assert sync["lockstep"]
    assert sync["staleness_mean"] is None
    # Worker 0 of two waits for three of the four parts that worker 1 takes.
    assert sync["waiting_shares"][0] > 0.5 > sync["waiting_shares"][1]
    assert not asynchronous["lockstep"]
    assert asynchronous["staleness_max"] >= 1

    # The spans of all workers of a run lie on one axis.
    for name in ("sync", "async"):
        workers = read_run(tmp_path / name).workers
        starts = [worker.spans[0].start for worker in workers]
        assert max(starts) - min(starts) < 1.0
