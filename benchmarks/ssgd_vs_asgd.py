"""What each strategy makes of unequal workers: real processes, beside other ways to do it.

python -m benchmarks.ssgd_vs_asgd                       everything; results/ and README.md
python -m benchmarks.ssgd_vs_asgd --only async,ddp      some contenders (and always the references)
python -m benchmarks.ssgd_vs_asgd --cases slept:4       some of slept:2, slept:4, real:2
python -m benchmarks.ssgd_vs_asgd --conditions gamma    some of equal, straggler, gamma
python -m benchmarks.ssgd_vs_asgd --quick               does it run? Each once, for a second
python -m benchmarks.ssgd_vs_asgd --table               write README.md's table and picture anew
python -m benchmarks.ssgd_vs_asgd --check               fail if README.md is not up to date
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    BenchmarkError,
    Report,
    Spread,
    provenance,
    python_module,
    rotated,
    run_group,
)
from benchmarks.workers import (
    CONDITIONS,
    CONTENDERS,
    GAMMA_SHAPE,
    OURS,
    PEERS,
    REFERENCES,
    SLOW,
    TARGET,
    WORKLOADS,
    Task,
    quick,
)
from scaledtrain.report.runs import read_run

PACKAGES = ("torch", "scikit-learn", "numpy")
SETTINGS = {
    "threads_per_rank": 1,
    "pinned": False,
    "optimizer": "SGD without momentum",
    "seconds": {name: workload.seconds for name, workload in WORKLOADS.items()},
    "learning_rate": {name: workload.learning_rate for name, workload in WORKLOADS.items()},
    "straggler": SLOW,
    "gamma_shape": GAMMA_SHAPE,
    "target_accuracy": TARGET,
}
CASES = (("slept", 2), ("slept", 4), ("real", 2))


@dataclass(frozen=True)
class Race:
    """One contender in one round of one case under one condition."""

    workload: str
    ranks: int
    condition: str
    contender: str
    round: int
    steps_per_second: list[float]
    """Gradients that each worker computed."""
    used_per_second: float
    """Gradients of all workers that went into the parameters."""
    batch_size: int
    accuracy: float
    seconds_to_target: float | None
    staleness: list[list[int]]
    """[staleness, pushes that had it]; empty where there is none."""
    bytes_per_step: list[float]
    """Of each worker."""
    waiting: list[float]
    """Share of each worker's time in which it waited or moved bytes; empty if not measured."""
    load_average: float
    """Of the machine over the last minute, when this began."""

    @property
    def case(self) -> tuple[str, int]:
        return self.workload, self.ranks


# --- Measuring --------------------------------------------------------------------------------


def work(
    contender: str, workload_name: str, condition: str, number: int, is_quick: bool, folder: Path
) -> None:
    """One rank of a fresh job: train as one contender, write down what happened."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    workload = WORKLOADS[workload_name]
    chosen = CONTENDERS[contender]
    task = Task(
        workload=quick(workload) if is_quick else workload,
        condition=condition,
        rank=rank,
        ranks=ranks,
        seed=number,
        learning_rate=workload.learning_rate * chosen.scale(ranks),
        folder=folder,
    )
    chosen.loop(task)
    report = task.watch.report()
    if rank == 0:
        report |= task.watch.evaluate()
    (folder / f"rank{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
    # A module in DDP keeps gloo's threads alive, and some then abort the interpreter at its end.
    os._exit(0)


def measure(
    contender: str, case: tuple[str, int], condition: str, number: int, is_quick: bool
) -> Race:
    """Run one contender in fresh processes; a reference is one worker by itself."""
    workload, workers = case
    ranks = 1 if contender in REFERENCES else workers
    is_fast = contender == "alone" and condition == "straggler"
    own_condition = "equal" if is_fast else condition
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = [contender, workload, own_condition, str(number), name]
        flags = ["--quick"] if is_quick else []
        run_group(
            python_module("benchmarks.ssgd_vs_asgd", "--work", *arguments, *flags),
            ranks,
            pinned=False,
        )
        reports = [
            json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(ranks)
        ]
        staleness, waiting = [], []
        if CONTENDERS[contender].writes_metrics:
            log = read_run(folder / "run")
            staleness = [list(item) for item in sorted(log.staleness.items())]
            spent = [w.seconds_in("waiting") + w.seconds_in("communication") for w in log.workers]
            waiting = [s / w.elapsed for s, w in zip(spent, log.workers, strict=True)]
    return Race(
        workload=workload,
        ranks=workers,
        condition=condition,
        contender=contender,
        round=number,
        steps_per_second=[r["steps_per_second"] for r in reports],
        used_per_second=used_per_second(reports),
        batch_size=WORKLOADS[workload].batch_size,
        accuracy=reports[0]["accuracy"],
        seconds_to_target=reports[0]["seconds_to_target"],
        staleness=staleness,
        bytes_per_step=[r["bytes_per_step"] for r in reports],
        waiting=waiting,
        load_average=load_average,
    )


def used_per_second(reports: Sequence[Mapping[str, Any]]) -> float:
    """Of all workers: the mean of what each saw, or the sum where each knows only of its own."""
    used = [r["used_per_second"] for r in reports]
    return statistics.fmean(used) if reports[0]["knows_all"] else sum(used)


def able(contender: str, case: tuple[str, int], condition: str) -> bool:
    """Whether it has something to show: the slow worker alone only where there is one."""
    return contender != "alone_slow" or condition == "straggler"


# --- What follows from it ---------------------------------------------------------------------


def own_rates(races: Sequence[Race], case: tuple[str, int], condition: str, number: int) -> float:
    """Sum of the gradients per second of all workers, each by itself, in one round.

    Raises:
        BenchmarkError: they were not measured.
    """
    rates = {
        r.contender: r.used_per_second
        for r in races
        if (r.case, r.condition, r.round) == (case, condition, number)
    }
    wanted = [name for name in REFERENCES if able(name, case, condition)]
    if missing := [name for name in wanted if name not in rates]:
        raise BenchmarkError(
            f"round {number} of {case[0]}:{case[1]}, {condition} lacks {', '.join(missing)}"
        )
    slow = rates.get("alone_slow", rates["alone"])
    return (case[1] - 1) * rates["alone"] + slow


def of(races: Sequence[Race], case: tuple[str, int], condition: str, contender: str) -> list[Race]:
    """Its rounds."""
    key = (case, condition, contender)
    return [r for r in races if (r.case, r.condition, r.contender) == key]


def share(
    races: Sequence[Race], case: tuple[str, int], condition: str, contender: str
) -> Spread | None:
    """Used gradients per second over the sum of the workers' own rates, within each round."""
    return Spread.of(
        [
            r.used_per_second / own_rates(races, case, condition, r.round)
            for r in of(races, case, condition, contender)
        ]
    )


def to_target(
    races: Sequence[Race], case: tuple[str, int], condition: str, contender: str
) -> float | None:
    """Median seconds; infinite if it was not reached in half of the rounds, None if not run."""
    rounds = of(races, case, condition, contender)
    reached = [float("inf") if (s := r.seconds_to_target) is None else s for r in rounds]
    return statistics.median_high(reached) if reached else None


@dataclass(frozen=True)
class Bar:
    """What a share has to reach with one straggler."""

    case: tuple[str, int]
    contender: str
    limit: float

    def line(self, races: Sequence[Race]) -> str:
        """A row of the table: what, how much, and whether it holds."""
        what = f"{self.case[0]}, {self.case[1]} workers: {self.contender} ≥ {self.limit:g}"
        spread = share(races, self.case, "straggler", self.contender)
        if spread is None:
            return f"| {what} | not measured | |"
        verdict = "pass" if spread.median >= self.limit else "**MISSED**"
        shown = f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"
        return f"| {what} | {shown} | {verdict} |"


BARS = (
    Bar(("slept", 2), "async", 0.97),
    Bar(("slept", 4), "async", 0.97),
    Bar(("slept", 2), "async_overlap", 0.99),
    Bar(("slept", 4), "async_overlap", 0.99),
    Bar(("real", 2), "async", 0.90),
    Bar(("real", 2), "async_overlap", 0.90),
    Bar(("real", 2), "async_shards_overlap", 0.90),
)


# --- What is shown ----------------------------------------------------------------------------


def render(races: Sequence[Race], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = [provenance(where)]
    for case in CASES:
        if any(r.case == case for r in races):
            parts.append(_table(races, case))
    rows = "\n".join(bar.line(races) for bar in BARS)
    head = "Share of the sum of the workers' own rates, with one straggler"
    parts.append(f"What it has to reach:\n\n| {head} | measured | |\n|---|---|---|\n{rows}")
    return "\n\n".join(parts) + "\n"


def _table(races: Sequence[Race], case: tuple[str, int]) -> str:
    conditions = " / ".join(CONDITIONS.values())
    lines = [
        f"**{WORKLOADS[case[0]].title}, {case[1]} workers**",
        "",
        f"Three numbers are for: {conditions}. The rest is with the straggler, the last worker.",
        "",
        "| | share of own rates | seconds to target | samples/s | accuracy at the end "
        "| staleness: mean, most | KB a step | % of its time that each worker waits |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in (*OURS, *PEERS):
        if any(r.case == case and r.contender == name for r in races):
            lines.append(_row(races, case, name))
    counts = [
        len(of(races, case, condition, name))
        for condition in CONDITIONS
        for name in (*OURS, *PEERS)
    ]
    present = [count for count in counts if count]
    ends = " to ".join(map(str, dict.fromkeys([min(present), max(present)])))
    lines += ["", f"Medians over {ends} rounds."]
    return "\n".join(lines)


def _row(races: Sequence[Race], case: tuple[str, int], name: str) -> str:
    shares = [share(races, case, c, name) for c in CONDITIONS]
    times = [to_target(races, case, c, name) for c in CONDITIONS]
    cells = [
        " / ".join("–" if s is None else f"{s.median:.2f}" for s in shares),
        " / ".join(
            "–" if t is None else "never" if t == float("inf") else f"{t:.1f}" for t in times
        ),
    ]
    slow = of(races, case, "straggler", name)
    if slow:
        samples = statistics.median(r.used_per_second * r.batch_size for r in slow)
        accuracy = statistics.median(r.accuracy for r in slow)
        n_bytes = statistics.median(statistics.fmean(r.bytes_per_step) for r in slow)
        cells += [f"{samples:,.0f}", f"{accuracy:.3f}", _staleness(slow)]
        cells += [f"{n_bytes / 1000:,.0f}" if n_bytes else "", _waiting(slow)]
    else:
        cells += [""] * 5
    return f"| {name} | {' | '.join(cells)} |"


def _staleness(races: Sequence[Race]) -> str:
    pairs = [(s, n) for r in races for s, n in r.staleness]
    pushes = sum(n for _, n in pairs)
    if not pushes:
        return ""
    return f"{sum(s * n for s, n in pairs) / pushes:.2f}, {max(s for s, _ in pairs)}"


def _waiting(races: Sequence[Race]) -> str:
    measured = [r.waiting for r in races if r.waiting]
    if not measured:
        return ""
    medians = [statistics.median(worker) for worker in zip(*measured, strict=True)]
    return " ".join(f"{100 * m:.0f}" for m in medians)


_COLOURS = {"equal": "#0072B2", "straggler": "#D55E00", "gamma": "#009E73"}
_MARKERS = {"equal": "o", "straggler": "D", "gamma": "^"}


def draw(races: Sequence[Race], path: Path) -> None:
    """Shares above, times to the target below; a column for each case, a row for each contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in CASES if any(r.case == case for r in races)]
    names = [n for n in (*OURS, *PEERS) if any(r.contender == n for r in races)]
    figure = Figure(
        figsize=(1.5 + 4.2 * max(1, len(cases)), 2.4 + 0.5 * len(names)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, max(1, len(cases)), sharey=True, sharex="row", squeeze=False)
    for column, case in enumerate(cases):
        above, below = axes[0][column], axes[1][column]
        for offset, condition in zip((-0.22, 0.0, 0.22), CONDITIONS, strict=True):
            shares = [share(races, case, condition, n) for n in names]
            times = [to_target(races, case, condition, n) for n in names]
            style = {"color": _COLOURS[condition], "marker": _MARKERS[condition], "linestyle": ""}
            for panel, values in (
                (above, [None if s is None else s.median for s in shares]),
                (below, [None if t == float("inf") else t for t in times]),
            ):
                points = [(v, y + offset) for y, v in enumerate(values) if v is not None]
                panel.plot(
                    [v for v, _ in points],
                    [y for _, y in points],
                    markersize=5,
                    label=CONDITIONS[condition],
                    **style,
                )
        short = WORKLOADS[case[0]].title.split(" (")[0]
        above.set_title(f"{short},\n{case[1]} workers", loc="left", fontsize=10.5)
        above.axvline(1.0, color="0.35", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        above.set(xlabel="share of the sum of the workers' own rates", xlim=(0, 1.12))
        below.set(xlabel=f"seconds to {TARGET:g} test accuracy (log)", xscale="log")
        below.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        below.minorticks_off()
        for panel in (above, below):
            panel.set_yticks(range(len(names)), names)
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
            if len(names) > len(OURS) or names[-1] in PEERS:
                first_peer = sum(name in OURS for name in names) - 0.5
                panel.axhline(first_peer, color="0.6", linewidth=0.8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


REPORT = Report("ssgd_vs_asgd", Race, render, draw)


# --- The command ------------------------------------------------------------------------------


def rounds(
    cases: Sequence[tuple[str, int]],
    conditions: Sequence[str],
    contenders: Sequence[str],
    count: int,
    before: Sequence[Race],
    is_quick: bool,
) -> Iterator[Race]:
    """Each round begins with another contender; a later command adds rounds.

    If it is to be quick each contender runs once, where it can first.
    """
    count = 1 if is_quick else count
    done = set[str]()
    first = {
        (case, c): max((r.round for r in before if (r.case, r.condition) == (case, c)), default=-1)
        + 1
        for case in cases
        for c in conditions
    }
    for number in range(count):
        for case in cases:
            for condition in conditions:
                this = number + first[case, condition]
                taking_part = [c for c in contenders if able(c, case, condition)]
                if is_quick:
                    taking_part = [c for c in taking_part if c not in done]
                    done.update(taking_part)
                for contender in rotated(taking_part, this):
                    race = measure(contender, case, condition, this, is_quick)
                    print(
                        f"round {number + 1}/{count}  {case[0]}:{case[1]}  {condition:9}  "
                        f"{contender:13} {race.used_per_second:8.1f} gradients/s  "
                        f"accuracy {race.accuracy:.3f}",
                        flush=True,
                    )
                    yield race


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("ssgd_vs_asgd", __doc__, "each once, for a second", rounds=3)
    add_some(parser, "only", (*OURS, *PEERS))
    add_some(parser, "cases", {f"{workload}:{n}": (workload, n) for workload, n in CASES})
    add_some(parser, "conditions", list(CONDITIONS))
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        torch.set_num_threads(1)
        contender, workload, condition, number, folder = options.work
        work(contender, workload, condition, int(number), options.quick, Path(folder))
        return 0
    contenders = [*options.only, *REFERENCES]
    measure_all = partial(rounds, options.cases, options.conditions, contenders, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
