"""Pipelines against the ideal of their schedule."""

from __future__ import annotations

import pytest

from benchmarks.harness import Measurement, environment
from benchmarks.layouts import CASES, PACKAGES, SETTINGS, Case, render, share_of_ideal


def test_an_ideal_pipeline_of_two_ranks_idles_as_its_schedule_does() -> None:
    """Half of one rank's time over what is not idle: (p - 1) / (m + p - 1) for 1F1B, and so on."""
    assert Case("1F1B", 4).ideal_share == pytest.approx(0.5 / (1 - 1 / 5))
    assert Case("Interleaved1F1B", 8).ideal_share == pytest.approx(0.5 / (1 - 1 / 17))
    assert Case("ZBVZeroBubble", 16).ideal_share == pytest.approx(0.5 / (1 - 1 / 97))


def measured(case: Case, who: str, seconds: float, number: int = 0) -> Measurement:
    return Measurement(case.name, 2, who, number, 1, [seconds], [], 0.0)


def test_shares_and_bars() -> None:
    case = CASES["1F1B m=4"]
    readings = [measured(case, "whole model", 8.0), measured(case, "ours", 5.0)]
    found = share_of_ideal(readings, case, "ours")  # 0.625 x 8 s is all that there is to reach
    assert found is not None
    assert found.median == pytest.approx(1.0)
    assert share_of_ideal(readings, case, "torch") is None
    text = render([*readings, measured(case, "torch", 4.0)], environment(PACKAGES, SETTINGS))
    assert "| 1F1B m=4: share of ideal ≥ 0.95 | 1.000 (1.000 to 1.000) | pass |" in text
    assert "| 1F1B m=4: torch / ours ≥ 1 | 0.800 (0.800 to 0.800) | **MISSED** |" in text
