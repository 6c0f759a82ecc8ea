"""How the benchmark of saving compares, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks import saving as bench
from benchmarks.harness import README
from benchmarks.saving import Saving, ratio, render, work
from tests.unit.test_benchmarks import WHERE


def one(case: str, contender: str, milliseconds: float, round: int = 0) -> Saving:
    """Three savings, the first of which is slow."""
    seconds = [1.0, milliseconds / 1e3, milliseconds / 1e3]
    return Saving(case, contender, round, 400_000_000, seconds, 0.0)


def test_ratios_are_taken_within_rounds_without_the_first_saving() -> None:
    savings = [
        one("asynchronous", "ours", 110.0),
        one("asynchronous", "copy", 100.0),
        one("asynchronous", "ours", 130.0, round=1),
        one("asynchronous", "copy", 100.0, round=1),
        one("synchronous", "ours", 1250.0),
        one("synchronous", "write", 1000.0),
    ]
    assert ratio(savings, "asynchronous", "ours", "copy") == pytest.approx((1.2, 1.1, 1.3, 2))
    text = render(savings, WHERE)
    assert "| asynchronous: *ours* | 400 | 120 | 3333 | 1000 |" in text  # 400 MB in 0.12 s
    assert "one copy of the memory ≤ 1.2 | 1.20 (1.10 to 1.30) | pass |" in text
    assert "writing one file ≥ 0.8 | 0.80 (0.80 to 0.80) | pass |" in text
    assert "≥ 0.8 | not measured | |" in render(savings[:4], WHERE)


@pytest.mark.parametrize("case", bench.CASES)
def test_each_saving_is_timed_beside_its_contender(case: str, tmp_path: Path) -> None:
    with patch("os.fsync"):
        work(case, 4, 2, tmp_path)
    told = json.loads((tmp_path / "seconds.json").read_text())
    assert told["n_bytes"] == 2 * 4 * 4 * 4
    assert [len(seconds) for seconds in told["seconds"].values()] == [bench.SAVINGS] * 2
    assert sorted(told["seconds"]) == sorted(["ours", bench.against(case)])


def test_the_readme_shows_the_newest_results() -> None:
    assert bench.REPORT.is_current()
    for name in (*bench.CASES, "ours", "copy", "write"):
        assert f"*{name}*" in README.read_text(encoding="utf-8")
