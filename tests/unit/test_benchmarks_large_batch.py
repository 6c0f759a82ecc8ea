"""How the benchmarks of large batches and of optimizers make their tables."""

from __future__ import annotations

import pytest

from benchmarks import large_batch, optimizers
from benchmarks.large_batch import Trained, critical_batch, train
from benchmarks.optimizers import Timed
from tests.unit.test_benchmarks import WHERE


def test_the_fit_finds_the_curve_that_points_lie_on() -> None:
    """S = 100 (1 + 64 / B): S_min 100, E_min 6400, and (S/100 - 1)(S B/6400 - 1) = 1."""
    points = [(b, 100.0 * (1.0 + 64.0 / b)) for b in (4, 32, 256)]
    for batch, steps in points:
        assert (steps / 100 - 1) * (steps * batch / 6400 - 1) == pytest.approx(1.0)
    assert critical_batch(points) == pytest.approx((100.0, 6400.0))
    assert critical_batch(points[:2]) is None


def test_the_table_of_batches_says_what_did_not_reach_the_target() -> None:
    runs = [
        Trained("digits", "linear", 16, seed, steps, "", scale)
        for seed, (steps, scale) in enumerate([(30, 90.0), (10, 110.0)])
    ]
    runs += [Trained("digits", "linear", 64, seed, None, "diverged") for seed in range(2)]
    assert "| linear | 20 (320) | diverged |  | 100 |" in large_batch.render(runs, WHERE)


def test_a_run_is_repeatable() -> None:
    run = train("digits", "LARS", 1024, 1)
    assert run == train("digits", "LARS", 1024, 1)
    assert run.steps is not None
    assert run.noise_scale is not None


def test_the_table_of_optimizers_compares_within_rounds() -> None:
    records = [
        Timed("gpt", name, number, seconds * (number + 1), 0.0)
        for number in range(2)
        for name, seconds in (("SGD", 0.01), ("LARS", 0.02), ("AdamW", 0.04), ("LAMB", 0.05))
    ]
    table = optimizers.render(records, WHERE)
    assert "| LARS | 30.00 | SGD | 2.00 (2.00 to 2.00) | **MISSED** |" in table
    assert "| LAMB | 75.00 | AdamW | 1.25 (1.25 to 1.25) | pass |" in table


def test_readme_shows_what_is_stored() -> None:
    assert large_batch.REPORT.is_current()
    assert optimizers.REPORT.is_current()
