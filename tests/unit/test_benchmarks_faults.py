"""What the campaign of faults judges, and what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults as bench
from benchmarks.fault_run import KINDS, STEPS, Outcome, Plan, damage, judge
from benchmarks.faults import Run, render
from benchmarks.harness import README
from scaledtrain.checkpoint.folder import saved_steps
from tests.checkpoints import fit
from tests.unit.test_benchmarks import WHERE


def run(seed: int, faults: list[str], recovery: list[float], wrong: str = "") -> Run:
    restarts = len(recovery)
    return Run(
        seed, "sync", 2, "torch", False, faults, restarts, 3 * restarts, recovery, wrong, 2.0, 0.5
    )


def test_the_table_counts_faults_and_what_they_cost() -> None:
    kill, slow = "kill (rank 1, step 3, 0.500)", "slow (rank 0, step 9, 0.100)"
    right = [run(0, [kill], [0.5]), run(1, [kill, slow], [1.5, 1.0])]
    text = render(right, WHERE)
    assert "| kill | 2 | 2 |" in text
    assert "| stop | 0 | 0 |" in text
    assert "2 runs of 30 steps; 2 ended" in text
    assert "started again 3 times, and made 9 steps again" in text
    assert "1.00 s (median; at most 1.50 s)" in text
    assert text.count("pass |") == 2
    text = render([*right, run(7, [kill], [12.0], "it hangs")], WHERE)
    assert "| kill | 3 | 2 |" in text
    assert text.count("**MISSED** |") == 2
    assert "* seed 7 (sync, 2 ranks, torch): it hangs; kill (rank 1" in text


def test_a_run_is_right_if_its_end_is(tmp_path: Path) -> None:
    end = {"step": STEPS, "sha256": "a", "loss": 0.5}
    lockstep = Plan(0, "sync", 2, "torch", False)
    undisturbed = Outcome(ends=[end, end])
    full = ["full disk (rank 0, step 3, 0.5)"]  # the last checkpoint may not be there
    good = Outcome(injected=full, ends=[end, end])
    assert judge(lockstep, good, undisturbed, tmp_path) == ""
    assert "of step None" in judge(lockstep, Outcome(ends=[end, end]), undisturbed, tmp_path)
    for wrong, told in (
        (Outcome(wrong="it hangs"), "it hangs"),
        (Outcome(ends=[end]), "only 1 of 2 ranks"),
        (Outcome(ends=[end, {**end, "step": 29}]), "at step 29 instead of 30"),
        (Outcome(ends=[end, {**end, "sha256": "b"}]), "others than those of the undisturbed"),
    ):
        assert told in judge(lockstep, wrong, undisturbed, tmp_path)
    served = Plan(0, "async", 2, "torch", False)
    for wrong, told in (
        (Outcome(ends=[{**end, "loss": float("nan")}]), "the loss is nan"),
        (Outcome(ends=[{**end, "step": 31}]), "version 31"),
        (Outcome(ends=[]), "only 0 of 2"),
    ):
        assert told in judge(served, wrong, undisturbed, tmp_path)


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_damage_is_damage(amount: float, tmp_path: Path) -> None:
    fit(tmp_path, 5)
    damage(tmp_path / "checkpoints", amount)
    assert saved_steps(tmp_path / "checkpoints")[-1].damage()
    damage(tmp_path / "nowhere", amount)


def test_the_readme_shows_the_newest_results() -> None:
    assert bench.REPORT.is_current()
    for kind in KINDS:
        assert f"*{kind}*" in README.read_text(encoding="utf-8")
