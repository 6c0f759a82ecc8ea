"""What it costs to watch a run: the table, and what is stored."""

from __future__ import annotations

from benchmarks.harness import Measurement, environment
from benchmarks.watch import LAYERS, PACKAGES, REPORT, SETTINGS, WATCHES, render


def measured(who: str, ranks: int, number: int, seconds: float) -> Measurement:
    return Measurement("gpt", ranks, who, number, 4, [4 * seconds], [1.0] * ranks, 0.0)


def test_each_part_is_held_against_no_watch() -> None:
    """Rounds of 1.000 / 1.000 and 1.018 / 1.000 s a step: the ratio's median is 1.009."""
    readings = [measured("off", 1, n, 1.0) for n in (0, 1)]
    readings += [measured("on", 1, n, s) for n, s in enumerate((1.0, 1.018))]
    readings += [measured(LAYERS, 1, n, 1.3) for n in (0, 1)]  # 0.3 / 100 of a step
    readings += [measured("off", 2, 0, 1.0), measured("on", 2, 0, 1.1)]
    text = render(readings, environment(PACKAGES, SETTINGS))
    assert "| on | 1009.0 | 1.0090 (1.0000 to 1.0180) | 1100.0 | 1.1000" in text
    assert "gpt, 1: on / off ≤ 1.01: 1.0090 pass" in text
    assert "gpt, 2: on / off ≤ 1.01: 1.1000 **MISSED**" in text
    assert "gpt, 1: layers every 100 steps / off ≤ 1.01: 1.0030 pass" in text
    assert all(f"| {who} |" in text for who in WATCHES)


def test_readme_shows_what_is_stored() -> None:
    assert REPORT.is_current()
