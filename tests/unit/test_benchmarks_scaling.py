"""What the benchmark of the simulated clusters computes, and how it makes its tables."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import simulated_scaling as bench
from benchmarks.simulated_scaling import (
    FASTEST,
    PRESETS,
    STRATEGIES,
    Outcome,
    best,
    efficiency,
    own_rates,
    preset,
    render,
)
from scaledtrain.sim import Cluster, Constant, SlowWorkers, Topology, Wire
from tests.unit.test_benchmarks import WHERE

FREE = Topology(ranks_per_host=4, hosts=1, port=Wire(0.0, gigabits_per_second=float("inf")))
STRAGGLER = Cluster(Constant(1.0), FREE, SlowWorkers({3: 4.0}))


def outcome(strategy: str, value: float | None, part: str = "target", **more: Any) -> Outcome:
    values: dict[str, Any] = {
        "cluster": "unequal",
        "workers": 16,
        "learning_rate": 0.1,
        "cpu_seconds": 1.0,
        "peak_bytes": 2**30,
        **more,
    }
    return Outcome(part=part, strategy=strategy, value=value, **values)


def test_own_rates_add_up() -> None:
    assert own_rates(STRAGGLER, 4, steps=10) == pytest.approx(3 * 1.0 + 0.25)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("sync", 1.0 / 3.25),  # 4 gradients in 4 s, of 3.25 a second
        ("local_sgd", 1.0 / 3.25),
        ("async", 1.0),
        ("ssp", 1.0 / 3.25),  # all at the pace of the slowest
    ],
)
def test_the_efficiency_with_a_straggler(strategy: str, expected: float) -> None:
    assert efficiency(STRATEGIES[strategy], STRAGGLER, 4) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_room_for_any_number_of_workers(name: str) -> None:
    preset(name).network(4096)


def test_the_table_shows_the_best_learning_rate_beside_the_fastest_worker() -> None:
    made = [
        outcome(FASTEST, 200.0, workers=1),
        outcome("sync", 400.0),
        outcome("sync", 100.0, learning_rate=1.0),
        outcome("sync", None, learning_rate=3.0),
        outcome("async", None),
        outcome("async", 0.5, part="efficiency", cluster="sites_4x1g", workers=8),
        outcome("async", 51.0, part="size", workers=4096, cpu_seconds=301.0),
    ]
    found = best(made, "sync")
    assert found is not None
    assert found.learning_rate == 1.0
    text = render(made, WHERE)
    assert f"| {FASTEST} | 200 | 1.00 | 0.1 |" in text
    assert "| sync | 100 | 2.00 | 1 |" in text
    assert "| async | never | | |" in text
    assert "| async | 0.50 |" in text
    assert "| 4,096 workers x 50 steps, real gradients | 300 s | 301 s | **MISSED** |" in text
    assert "| 4,096 workers x 50 steps, real gradients | 4 GiB | 1.00 GiB | pass |" in text


def test_the_readme_shows_the_newest_results() -> None:
    assert bench.main(["--check"]) == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SystemExit):
        bench.main(["--parts", "sizes"])
