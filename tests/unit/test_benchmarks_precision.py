"""How the benchmark of precisions makes its tables, and that its curves are what they say."""

from __future__ import annotations

import pytest

from benchmarks import precision as bench
from benchmarks import precision_curve
from benchmarks.harness import BenchmarkError
from benchmarks.precision import REPORT, Run, render
from benchmarks.precision_curve import Curve, render_curve, train_curve
from tests.unit.test_benchmarks import WHERE


def a_run(contender: str, milliseconds: float, round: int = 0, case: str = "gpt") -> Run:
    losses = [] if case == "matmul" else [5.5]
    return Run(case, 1, contender, round, 1, [milliseconds / 1e3], losses, 0.0, 3 * 2**20)


def test_the_table_compares_within_rounds_and_with_the_fastest_peer() -> None:
    runs = [
        a_run("fp32", 100.0),
        a_run("autocast_bf16_fused", 40.0),
        a_run("fabric_bf16-mixed", 50.0),
        a_run("ours_bf16-mixed", 42.0),
        a_run("matmul_fp32", 6.0, case="matmul"),
        a_run("matmul_bf16", 1.0, case="matmul"),
    ]
    table = render(runs, WHERE)
    # 100 / 42 = 2.38; 42 / 40 = 1.05
    assert (
        "| ours_bf16-mixed | 42 | 2.38 (2.38 to 2.38) | 1.050 (1.050 to 1.050), "
        "autocast_bf16_fused | 3 |" in table
    )
    assert "6.00 (6.00 to 6.00) times as fast in bfloat16" in table


def test_contenders_must_compute_about_the_same() -> None:
    other = Run("gpt", 1, "ours_bf16-mixed", 0, 1, [1.0], [5.0], 0.0)
    with pytest.raises(BenchmarkError, match="did not compute the same"):
        render([a_run("fp32", 100.0), other], WHERE)


def test_curves_are_repeatable_and_begin_alike() -> None:
    first, again = (train_curve("bf16-true, stochastic", 0, 4, 2) for _ in range(2))
    assert first == again
    assert first.steps == [0, 2, 4]
    assert train_curve("fp32", 0, 0, 2).losses[0] == pytest.approx(first.losses[0], rel=0.01)


def test_the_table_of_curves_shows_every_seed() -> None:
    curves = [Curve("fp32", seed, [0, 1, 2], [2.3, 1.0, 0.5 + seed]) for seed in range(2)]
    assert "| fp32 | 2.300 | 1.0000 | 0.5000, 1.5000 |" in render_curve(curves, WHERE)


def test_readme_shows_what_is_stored() -> None:
    assert REPORT.is_current()
    assert precision_curve.REPORT.is_current()


def test_a_misspelt_contender_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "fp23"])
    assert "--only fp23: it can be some of gpt, deep, fp32" in capsys.readouterr().err
