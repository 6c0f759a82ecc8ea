"""Does a run survive what happens to it? Many short runs, each with random faults.

python -m benchmarks.faults                          200 runs; results/ and README.md
python -m benchmarks.faults --runs 20 --first 40     those of seeds 40 to 59; into the same folder
python -m benchmarks.faults --quick                  does it run? 4 runs, stores nothing
python -m benchmarks.faults --table                  write README.md's table anew
python -m benchmarks.faults --check                  fail if README.md is not up to date
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command_line import add_count, carry_out, command_line
from benchmarks.fault_run import KINDS, STEPS, Outcome, Plan, Supervisor, judge
from benchmarks.harness import Report, provenance

RECOVERY_SECONDS = 10.0
PACKAGES = ("torch", "numpy")
SETTINGS = {"steps": STEPS, "threads_per_rank": 1}


@dataclass(frozen=True)
class Run:
    """One run, and what happened to it."""

    seed: int
    strategy: str
    ranks: int
    transport: str
    asynchronous: bool
    """Whether it was saved while it trained."""
    faults: list[str]
    """That happened, in the order in which they were drawn."""
    restarts: int
    steps_lost: int
    recovery_seconds: list[float]
    wrong: str
    """What was not as it has to be at the end; empty: nothing."""
    seconds: float
    load_average: float


class Campaign:
    """Runs of many seeds, each held against the undisturbed run of its kind.

    Args:
        kept: where the folders of runs go that ended wrong.
    """

    def __init__(self, kept: Path) -> None:
        self._kept = kept
        self._undisturbed: dict[Plan, Outcome] = {}

    def run(self, plan: Plan) -> Run:
        """Make one."""
        undisturbed = self._undisturbed.get(plan.undisturbed)
        if undisturbed is None:
            with tempfile.TemporaryDirectory() as folder:
                undisturbed = Supervisor(plan.undisturbed, Path(folder)).run()
            self._undisturbed[plan.undisturbed] = undisturbed
        load_average, start = os.getloadavg()[0], time.monotonic()
        folder = Path(tempfile.mkdtemp())
        try:
            outcome = Supervisor(plan, folder).run()
            wrong = judge(plan, outcome, undisturbed, folder)
            if wrong:
                shutil.copytree(folder, self._kept / f"seed-{plan.seed}", dirs_exist_ok=True)
        finally:
            shutil.rmtree(folder)
        return Run(
            plan.seed,
            plan.strategy,
            plan.ranks,
            plan.transport,
            plan.asynchronous,
            outcome.injected,
            outcome.restarts,
            outcome.steps_lost,
            outcome.recovery_seconds,
            wrong,
            time.monotonic() - start,
            load_average,
        )


# --- What is shown ----------------------------------------------------------------------------


def render(runs: Sequence[Run], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    happened, survived = Counter[str](), Counter[str]()
    for run in runs:
        kinds = [fault.partition(" (")[0] for fault in run.faults]
        happened.update(kinds)
        survived.update(kinds if not run.wrong else [])
    lines = ["| fault | happened | survived |", "|---|--:|--:|"]
    lines += [f"| {kind} | {happened[kind]} | {survived[kind]} |" for kind in KINDS]
    recoveries = [seconds for run in runs for seconds in run.recovery_seconds]
    right = sum(not run.wrong for run in runs)
    restarts, lost = sum(r.restarts for r in runs), sum(r.steps_lost for r in runs)
    text = (
        f"{len(runs)} runs of {STEPS} steps; {right} ended at the right step with the right "
        f"parameters. They were started again {restarts} times, and made {lost} steps again"
    )
    if recoveries:
        text += (
            f"; from a death to the next step it took {statistics.median(recoveries):.2f} s "
            f"(median; at most {max(recoveries):.2f} s)"
        )
    bars = [
        ("runs that ended wrong or hung = 0", f"{len(runs) - right}", right == len(runs)),
        (
            f"from a death to the next step ≤ {RECOVERY_SECONDS:g} s",
            f"{max(recoveries, default=0.0):.2f} s at most",
            max(recoveries, default=0.0) <= RECOVERY_SECONDS,
        ),
    ]
    rows = [f"| {what} | {value} | {'pass' if ok else '**MISSED**'} |" for what, value, ok in bars]
    wrong = [
        f"* seed {r.seed} ({r.strategy}, {r.ranks} ranks, {r.transport}): {r.wrong}; "
        f"{', '.join(r.faults) or 'no fault'}"
        for r in runs
        if r.wrong
    ]
    parts = [provenance(where), "\n".join(lines), f"{text}."]
    parts.append(
        "\n".join(["What it has to reach:", "", "| | measured | |", "|---|---|---|", *rows])
    )
    if wrong:
        parts.append("\n".join(["Runs that did not end as they had to:", "", *wrong]))
    return "\n\n".join(parts) + "\n"


REPORT = Report("faults", Run, render)


# --- The command ------------------------------------------------------------------------------


def campaign(seeds: Sequence[int], before: Sequence[Run], is_quick: bool) -> Iterator[Run]:
    """Make the runs of these seeds, and tell of each."""
    if is_quick:
        seeds = seeds[:4]
    made = Campaign(Path(tempfile.gettempdir()) / "scaledtrain-faults")
    for seed in seeds:
        run = made.run(Plan.of(seed))
        recovery = " ".join(f"{seconds:.2f}" for seconds in run.recovery_seconds)
        print(
            f"seed {seed:4}  {run.strategy:9} {run.ranks} {run.transport:13} "
            f"{run.seconds:5.1f} s  lost {run.steps_lost:2}  recovered in [{recovery}] s  "
            f"{run.wrong or 'right'}  {', '.join(run.faults)}",
            flush=True,
        )
        yield run


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("faults", __doc__, "4 runs")
    add_count(parser, "runs", 200, "how many")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one (default 0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    seeds = range(options.first, options.first + options.runs)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, partial(campaign, seeds))


if __name__ == "__main__":
    sys.exit(main())
