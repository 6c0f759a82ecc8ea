"""How the benchmark of the strategies turns what workers saw into shares, tables and a picture."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import ssgd_vs_asgd as bench
from benchmarks.harness import README, BenchmarkError
from benchmarks.ssgd_vs_asgd import BARS, CASES, Race, able, own_rates, render, share, to_target
from benchmarks.workers import (
    CONDITIONS,
    CONTENDERS,
    OURS,
    PEERS,
    WORKLOADS,
    Step,
    Task,
    Watch,
    quick,
    rates,
    slowdown,
)
from scaledtrain.schedule import Slowdown
from tests.unit.test_benchmarks import WHERE

SLEPT = ("slept", 2)


def race(
    contender: str,
    used: float,
    condition: str = "straggler",
    round: int = 0,
    case: tuple[str, int] = SLEPT,
    **more: Any,
) -> Race:
    values: dict[str, Any] = {
        "steps_per_second": [used / 2, used / 2],
        "batch_size": 32,
        "accuracy": 0.96,
        "seconds_to_target": 2.0,
        "staleness": [],
        "bytes_per_step": [0.0, 0.0],
        "waiting": [],
        "load_average": 0.0,
        **more,
    }
    return Race(
        case[0],
        case[1],
        condition=condition,
        contender=contender,
        round=round,
        used_per_second=used,
        **values,
    )


def two_rounds() -> list[Race]:
    """The machine is slower in the second round; what is compared was slowed with it."""
    own = {"staleness": [[0, 1], [1, 2], [4, 1]], "waiting": [0.01, 0.05]}
    return [
        race("alone", 50.0),
        race("alone_slow", 12.5),
        race("async", 61.25, bytes_per_step=[90_000.0, 110_000.0], **own),
        race("sync", 25.0, seconds_to_target=None, waiting=[0.75, 0.0]),
        race("async", 40.0, round=1, seconds_to_target=3.0, **own),
        race("alone", 40.0, round=1),
        race("alone_slow", 10.0, round=1),
    ]


def test_own_rates_add_up_those_of_fast_and_slow_workers() -> None:
    races = two_rounds()
    assert own_rates(races, SLEPT, "straggler", 0) == 62.5  # 50 + 12.5
    equal = [race("alone", 50.0, "equal", case=("slept", 4))]
    assert own_rates(equal, ("slept", 4), "equal", 0) == 200.0  # 4 x 50
    slow = [race(n, r, case=("slept", 4)) for n, r in (("alone", 50.0), ("alone_slow", 12.5))]
    assert own_rates(slow, ("slept", 4), "straggler", 0) == 162.5  # 3 x 50 + 12.5
    with pytest.raises(BenchmarkError, match="round 0 of slept:2, gamma lacks alone"):
        own_rates(races, SLEPT, "gamma", 0)


def test_shares_are_taken_within_rounds() -> None:
    spread = share(two_rounds(), SLEPT, "straggler", "async")
    # 61.25 / 62.5 = 0.98 and 40 / 50 = 0.8
    assert spread is not None
    assert spread == pytest.approx((0.89, 0.8, 0.98, 2))
    assert share(two_rounds(), SLEPT, "straggler", "ddp") is None


def test_a_target_counts_as_reached_if_it_was_in_most_rounds() -> None:
    assert to_target(two_rounds(), SLEPT, "straggler", "sync") == float("inf")
    assert to_target(two_rounds(), SLEPT, "straggler", "ddp") is None
    seconds = [1.0, None, 3.0]
    races = [race("async", 1.0, round=r, seconds_to_target=s) for r, s in enumerate(seconds)]
    assert to_target(races, SLEPT, "straggler", "async") == 3.0  # of 1, 3 and infinity
    assert to_target(races[:2], SLEPT, "straggler", "async") == float("inf")


def test_the_table_shows_three_conditions_and_the_details_of_one() -> None:
    text = render(two_rounds(), WHERE)
    assert "2 workers**" in text
    # share 0.89 and 2.5 s with the straggler only; (61.25 + 40) / 2 x 32 = 1,620 samples/s;
    # staleness (0 + 2 x 1 + 4) / 4 = 1.5; (100 + 0) / 2 = 50 KB; waiting of each worker
    assert "| async | – / 0.89 / – | – / 3.0 / – | 1,620 | 0.960 | 1.50, 4 | 50 | 1 5 |" in text
    assert "| sync | – / 0.40 / – | – / never / – | 800 | 0.960 |  |  | 75 0 |" in text
    assert "Medians over 1 to 2 rounds" in text


def test_bars_are_passed_missed_or_not_measured() -> None:
    text = render(two_rounds(), WHERE)
    assert "| slept, 2 workers: async ≥ 0.97 | 0.890 (0.800 to 0.980) | **MISSED** |" in text
    assert "| slept, 4 workers: async ≥ 0.97 | not measured | |" in text
    assert "0.980 (0.980 to 0.980) | pass |" in render(two_rounds()[:4], WHERE)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    bench.draw(two_rounds(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_used_gradients_are_the_mean_of_what_all_saw_or_the_sum_of_each_ones_own() -> None:
    reports = [{"used_per_second": 10.0, "knows_all": True}, {"used_per_second": 12.0}]
    assert bench.used_per_second(reports) == 11.0
    assert bench.used_per_second([{**reports[0], "knows_all": False}, reports[1]]) == 22.0


def test_rates_are_those_between_the_first_and_the_last_step() -> None:
    steps = [Step(1.0, 10.0, 100.0), Step(1.5, 14.0, 150.0), Step(3.0, 18.0, 200.0)]
    # 2 steps, 8 gradients and 100 bytes in 2 seconds
    assert rates(steps) == {
        "steps_per_second": 1.0,
        "used_per_second": 4.0,
        "bytes_per_step": 50.0,
    }
    assert rates(steps[:1])["steps_per_second"] == 0.0


def test_a_watch_evaluates_the_copies_that_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    workload = quick(WORKLOADS["slept"])  # 1 s, the first 0.2 s not counted, copies 0.1 s apart
    model = nn.Linear(64, 10)
    watch = Watch(workload, model)
    watch.start()
    for step in range(13):
        now[0] = 100.0 + 0.1 * step + 0.001
        watch.step()
        if step % 5 == 0:
            watch.copy()
            watch.copy()  # too soon
    assert watch.late
    report = watch.report()
    assert report["steps_per_second"] == pytest.approx(10.0)
    assert not report["knows_all"]
    ended = watch.evaluate()
    assert ended["seconds_to_target"] is None
    assert ended["accuracy"] is not None
    assert ended["accuracy"] < 0.5


def test_the_straggler_is_the_last_worker() -> None:
    slept = WORKLOADS["slept"]
    assert slowdown(slept, "straggler", 3) == Slowdown({3: 4.0}, 0.02)
    assert slowdown(slept, "equal", 3) == Slowdown({}, 0.02)
    assert slowdown(WORKLOADS["real"], "gamma", 1) == Slowdown({}, gamma_shape=4.0)


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_workers_share_the_batches_evenly(name: str) -> None:
    batches = WORKLOADS[name].batches(seed=0)
    assert len(batches) % 4 == 0
    assert {len(targets) for _, targets in batches} == {WORKLOADS[name].batch_size}
    assert torch.equal(batches[0][0], WORKLOADS[name].batches(seed=0)[0][0])


def test_the_model_of_real_computing_has_1_2_million_parameters() -> None:
    n = sum(p.numel() for p in WORKLOADS["real"].model().parameters())
    assert n == 65 * 1056 + 1057 * 1056 + 1057 * 10


def test_contenders_are_named_in_the_readme_and_scale_their_learning_rate() -> None:
    text = README.read_text(encoding="utf-8")
    for name, contender in {**OURS, **PEERS}.items():
        assert f"| `{name}` | {contender.about} |" in text
    scales = {name: CONTENDERS[name].scale(4) for name in ("sync", "async", "softsync", "backup")}
    assert scales == {"sync": 4, "async": 1, "softsync": 2, "backup": 3}
    assert all(bar.case in CASES for bar in BARS)
    assert not able("alone_slow", SLEPT, "equal")
    assert all(able("alone", SLEPT, condition) for condition in CONDITIONS)


def test_the_shipped_readme_shows_the_shipped_results() -> None:
    assert bench.REPORT.is_current()


@pytest.mark.skipif(sys.platform != "linux", reason="ranks run in a terminal")
def test_a_reference_runs_in_a_process_of_its_own() -> None:
    found = bench.measure("alone", ("real", 2), "straggler", number=0, is_quick=True)
    assert (found.ranks, found.condition, len(found.steps_per_second)) == (2, "straggler", 1)
    assert found.used_per_second > 0
    assert found.accuracy > 0


def test_each_rank_starts_from_the_same_parameters(tmp_path: Path) -> None:
    one, other = (
        Task(quick(WORKLOADS["slept"]), "equal", rank, 2, 5, 0.1, tmp_path) for rank in (0, 1)
    )
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.batches())[0][0][0], next(other.batches())[0][0][0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "alone"], "--only alone: it can be some of sync, sync_top_k"),
        (["--cases", "slept:3"], "--cases slept:3: it can be some of slept:2, slept:4, real:2"),
        (["--conditions", "rain"], "--conditions rain: it can be some of equal, straggler, gamma"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_a_wrong_option_is_explained(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert text in capsys.readouterr().err
