"""How the benchmark of the predictions calibrates, takes rates and makes its table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import prediction as bench
from benchmarks.prediction import MESSAGE_BYTES, Machine, Prediction, durations, error, rate, render
from scaledtrain.schedule import Slowdown
from tests.unit.test_benchmarks import WHERE


def prediction(predicted: float, measured: float, round: int = 0, **more: Any) -> Prediction:
    values: dict[str, Any] = {
        "workers": 2,
        "strategy": "sync",
        "condition": "equal",
        "predicted_waiting": 0.1,
        "measured_waiting": 0.2,
        "overhead_seconds": 0.0005,
        "latency_seconds": 5e-5,
        "bytes_per_second": 2e9,
        "load_average": 0.0,
        **more,
    }
    return Prediction(round=round, predicted_rate=predicted, measured_rate=measured, **values)


def test_a_collective_lasts_from_the_last_arrival_to_the_last_result() -> None:
    # The second rank comes at 3, the first has the result at 5.
    assert durations([[(1.0, 5.0)], [(3.0, 4.0)]]) == [2.0]


def test_the_calibration_solves_the_formulas_of_the_network() -> None:
    """Of 4 ranks: 2 log2(4) = 4 latencies; 2 * 3/4 of the bytes through each link."""
    steps = [[0.021], [0.022], [0.0195], [0.025]]
    machine = Machine.of(steps, small=[4e-4, 4e-4, 1.0], large=[4e-4 + 0.003] * 3)
    assert machine.latency_seconds == pytest.approx(1e-4)
    assert machine.bytes_per_second == pytest.approx(1.5 * MESSAGE_BYTES / 0.003)
    assert machine.overheads == pytest.approx((0.001, 0.002, 0.0, 0.005))  # never less than none
    network = machine.cluster(Slowdown({}, min_compute_seconds=0.02), 4).network(4)
    assert network.all_reduce_seconds(0, range(4)) == pytest.approx(4e-4)


def test_a_step_takes_what_is_slept_and_an_overhead() -> None:
    slowed = Slowdown({1: 4.0}, min_compute_seconds=0.02)
    cluster = Machine((0.001,), 0.0, 1e9).cluster(slowed, 2)
    paces = [cluster.pace(worker, seed=0) for worker in (0, 1)]
    for pace in paces:
        pace.begin_step()
    assert [pace.seconds(0.0, 1.0) for pace in paces] == pytest.approx([0.021, 0.081])


def test_rates_are_taken_between_the_first_and_the_last_step_that_count() -> None:
    # 6 gradients in 2 s on one rank, 4 in 1 s on the other.
    ranks = [[(0.5, 1), (1.0, 2), (2.0, 5), (3.0, 8), (4.5, 20)], [(2.0, 4), (3.0, 8)]]
    assert rate(ranks, warmup=1.0, end=4.0) == 3.5


def test_errors_are_taken_within_rounds_and_held_to_the_bars() -> None:
    made = [
        prediction(1040.0, 1000.0),
        prediction(980.0, 1000.0, round=1),
        prediction(1120.0, 1000.0, strategy="async"),
    ]
    spread = error(made, (2, "sync", "equal"))
    assert spread is not None
    assert spread == pytest.approx((0.01, -0.02, 0.04, 2))
    assert error(made, (4, "sync", "equal")) is None
    text = render(made, WHERE)
    assert "| 2 | sync | no straggler | 1,010 | 1,000 | +1.0 % (-2.0 to +4.0) |" in text
    assert "| median over the cases ≤ 5 % | 6.5 % | **MISSED** |" in text  # of 1 % and 12 %
    assert "| the worst case ≤ 10 % | 12.0 % | **MISSED** |" in text


def test_the_readme_shows_the_newest_results() -> None:
    assert bench.main(["--check"]) == 0


@pytest.mark.parametrize("arguments", [["--only", "syncc"], ["--rounds", "0"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
