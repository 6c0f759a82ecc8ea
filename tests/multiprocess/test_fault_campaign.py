"""The campaign of random faults, shorter: most runs are of one process, which starts fast."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest.mock import patch

from benchmarks.fault_run import KINDS, Plan
from benchmarks.faults import Campaign, Run
from tests.ranks import run_ranks

ONE_RANK, TWO_RANKS = range(16), range(1000, 1004)


def campaign(folder: Path) -> list[Run]:
    made = Campaign(folder)
    plans = [Plan.of(seed, ranks=(1,)) for seed in ONE_RANK]
    plans += [Plan.of(seed, ranks=(2,)) for seed in TWO_RANKS]
    no_sync = patch("os.fsync", lambda descriptor: None)  # which only a power cut would need
    with no_sync, patch("benchmarks.fault_run.STEP_SECONDS", 0.002):
        return [made.run(plan) for plan in plans]


def test_runs_with_random_faults_end_as_those_without(tmp_path: Path) -> None:
    """In a process that has no threads, since ranks are forked from it."""
    (runs,) = run_ranks(campaign, 1, tmp_path, timeout_seconds=200)
    assert [(run.seed, run.wrong, run.faults) for run in runs if run.wrong] == []
    assert len(runs) == 20
    happened = Counter(fault.partition(" (")[0] for run in runs for fault in run.faults)
    assert all(happened[kind] for kind in KINDS), happened
    assert sum(run.restarts for run in runs) >= 5


def test_of_a_seed_the_plan_is_always_the_same() -> None:
    plans = [Plan.of(seed) for seed in range(50)]
    assert plans == [Plan.of(seed) for seed in range(50)]
    assert len({str(plan) for plan in plans}) == 50
    assert {fault.kind for plan in plans for fault in plan.faults} == set(KINDS)
