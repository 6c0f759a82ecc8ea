"""How the benchmark of data measures, and how it makes its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import data as bench
from benchmarks.data import CASES, READERS, WRITERS, Reading, rate_ratio, render
from benchmarks.harness import README
from tests.unit.test_benchmarks import WHERE

MIB = bench.MIB


def reading(contender: str, seconds: float, round: int = 0, **options: Any) -> Reading:
    """A pass over 64 MiB in samples of 64 KiB."""
    values = {
        "case": "64KiB",
        "cache": "cold",
        "n_bytes": 64 * MIB,
        "samples": 1024,
        "first_seconds": 0.02,
        "anonymous_bytes": 100 * MIB,
        "cached_share": 0.0,
        "load_average": 0.0,
        **options,
    }
    return Reading(contender=contender, seconds=seconds, round=round, **values)


def test_ratios_of_rates_are_taken_within_rounds() -> None:
    readings = [
        reading("ours", 1.0),
        reading("sequential read", 0.9),
        reading("ours", 2.0, round=1),
        reading("sequential read", 1.0, round=1),
        reading("ours", 9.0, round=2),
    ]
    spread = rate_ratio(readings, "64KiB", "cold", "ours", "sequential read")
    assert spread == pytest.approx((0.7, 0.5, 0.9, 2))  # 0.9 / 1 and 1 / 2
    assert rate_ratio(readings, "64KiB", "warm", "ours", "sequential read") is None


def test_the_table_shows_rates_and_bars() -> None:
    text = render(
        [
            reading("ours", 0.1),
            reading("sequential read", 0.05),
            reading("ours, last tenth", 0.1, first_seconds=0.08),
        ],
        WHERE,
    )
    assert "| 64KiB, cold, ours | 640 | 10,240 | 20.0 |" in text  # 64 MiB in 0.1 s
    assert "cold: ours / sequential read ≥ 0.85 | 0.50 (0.50 to 0.50) | **MISSED** |" in text
    assert "cold: first batch, ms ≤ 50 | 20.00 (20.00 to 20.00) | pass |" in text
    assert "of an epoch, ms ≤ 50 | 80.00 (80.00 to 80.00) | **MISSED** |" in text
    assert "page cache, MiB ≤ 400 | 100.00 (100.00 to 100.00) | pass |" in text
    assert "1KiB, warm: ours / batched memory map ≥ 0.9 | not measured | |" in text
    assert "at most 0.0% were in the page cache" in text


@pytest.mark.parametrize("name", list(CASES))
def test_everyone_reads_what_was_written(name: str, tmp_path: Path) -> None:
    case, n_bytes = CASES[name], 3 * MIB
    for writer in WRITERS:
        assert bench.write(writer, case, n_bytes, tmp_path)["n_bytes"] == n_bytes
    assert (tmp_path / "raw.bin").stat().st_size == n_bytes
    for reader in READERS:
        told = bench.read(reader, case, "warm", tmp_path)
        assert told["cached_share"] == 1.0
        if reader == "sequential read":  # with headers
            assert 0 <= told["n_bytes"] - n_bytes < 100_000
        elif reader == "ours, last tenth":
            assert 0 < told["n_bytes"] <= n_bytes / 10 + case.sample_bytes * case.batch_size
        else:
            assert told["n_bytes"] == n_bytes
        assert 0 < told["first_seconds"] <= told["seconds"]


def test_contenders_of_the_readme_are_those_of_the_benchmark() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    for name in (*READERS, *WRITERS):
        assert f"*{name}*" in text
    assert bench.REPORT.is_current()


def test_a_wrong_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "2KiB"])
    assert "--only 2KiB: it can be some of 64KiB, 1KiB" in capsys.readouterr().err
