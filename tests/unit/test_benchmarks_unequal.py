"""How the benchmarks of unequal workers take rates and make their tables."""

from __future__ import annotations

import itertools

from benchmarks.harness import environment
from benchmarks.straggler_cures import Bursts, together
from benchmarks.unequal_workers import Rate, rate_of, render

WHERE = environment((), {})


def test_rates_begin_with_the_first_record_after_the_warm_up() -> None:
    records = [{"seconds": t, "samples": 6} for t in (1.0, 2.0, 3.5, 5.0)]
    assert rate_of(records, warmup=1.5) == 12 / 3.0
    assert rate_of(records, warmup=4.0) == 0.0  # of one moment there is no rate


def test_the_table_has_shares_of_the_sum_of_the_rates() -> None:
    """Alone 100, 50 and 50: 196 of 200 samples a second are 98 %."""
    alone = [100.0, 50.0, 50.0]
    made = [Rate("auto", i, rate, alone, 0.1) for i, rate in enumerate((196.0, 190.0, 198.0))]
    made.append(Rate("even", 0, 150.0, alone, 0.1))
    table = render(made, WHERE)
    assert "Ranks alone: 100, 50, 50 samples/s, together 200." in table
    assert "| even | 150 | 75.0 % (75.0 to 75.0) |" in table
    assert "| auto | 196 | 98.0 % (95.0 to 99.0) |" in table
    assert "Bar: auto ≥ 95 %: 98.0 %, pass." in table
    assert "**MISSED**" in render([Rate("auto", 0, 100.0, alone, 0.1)], WHERE)


def test_bursts_and_what_workers_do_together() -> None:
    draws = list(itertools.islice(Bursts().draws(0, seed=0), 20_000))
    assert set(draws) == {1.0, 4.0}
    # On average 10.5 slow steps follow 70.5 others, for lengths are rounded up: 0.13 of all.
    assert 0.11 < draws.count(4.0) / len(draws) < 0.15
    # 7 workers with a step a second and one with a step in 4 s, of 16 samples.
    assert together("persistent: one of 8 is 4x slower") == 16 * (7 + 0.25)
