"""Strategies side by side: the table, the textbook's expectation, the conclusion, the picture.

Everything is computed from the folders of the runs, so a report can be made again at any time::

    python -m scaledtrain.report.comparison DIR       # DIR holds comparison.json
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaledtrain.errors import ConfigError
from scaledtrain.report.picture import draw
from scaledtrain.report.runs import RunLog, read_run
from scaledtrain.report.summary import Goal, Summary, equally_spaced, summarise

__all__ = ["Comparison", "main", "report"]

FILE_NAME = "comparison.json"
PICTURE_NAME = "comparison.png"

_WORKERS_SHOWN = 8  # those of higher rank are in comparison.json only
_CLEARLY_SLOWER = 1.2
_LINE_WIDTH = 100


@dataclass(frozen=True)
class Comparison:
    """What is compared. Saved before the first run, so that a report needs nothing else.

    Args:
        goal: the time to it is compared.
        runs: name -> folder of its run, relative to that of the comparison.
        note: what a reader has to know about the set-up.
        configs: name -> the run's config.
        environment: where it was made.
    """

    goal: Goal
    runs: Mapping[str, str]
    note: str
    configs: Mapping[str, Any]
    environment: Mapping[str, Any]

    def save(self, folder: Path, **results: Any) -> None:
        """Write ``comparison.json``, with results if there are some."""
        text = json.dumps({**asdict(self), **results}, indent=2)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Comparison:
        """Read what ``save`` wrote.

        Raises:
            ConfigError: the folder has no such file, or it is not whole.
        """
        path = folder / FILE_NAME
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            values = {name: saved[name] for name in cls.__dataclass_fields__}
            return cls(**{**values, "goal": Goal(**saved["goal"])})
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}); give the folder that "
                "scaledtrain.compare wrote to"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not what scaledtrain.compare writes ({type(error).__name__}: {error}); "
                "run the comparison again"
            ) from error


def table(summaries: Sequence[Summary], goal: Goal) -> str:
    """Lay the results out for a terminal."""
    head = ["strategy", "samples/s", f"seconds to {goal}", f"final {goal.metric}"]
    rows = [[*head, "staleness: mean", "max"]]
    rows += [
        [
            s.name,
            f"{s.samples_per_second:,.0f}",
            "never" if s.seconds_to_goal is None else f"{s.seconds_to_goal:.1f}",
            "-" if s.final is None else f"{s.final:.3f}",
            "-" if s.staleness_mean is None else f"{s.staleness_mean:.2f}",
            "-" if s.staleness_max is None else str(s.staleness_max),
        ]
        for s in summaries
    ]
    n_workers = min(_WORKERS_SHOWN, len(summaries[0].waiting_seconds))
    waiting = [["time waited", *(f"worker {rank}" for rank in range(n_workers))]]
    for s in summaries:
        cells = zip(s.waiting_shares, s.waiting_seconds, strict=True)
        shown = [f"{share:.0%} ({seconds:.1f} s)" for share, seconds in cells]
        waiting.append([s.name, *shown[:n_workers]])
    return f"{_aligned(rows)}\n\n{_aligned(waiting)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def expectation(summary: Summary) -> str:
    """The textbook's samples/s, with its arithmetic, beside the measured ones."""
    batches, times = summary.batch_sizes, [1000 * s for s in summary.compute_seconds]
    if summary.lockstep:
        words = "all wait for the slowest"
        mean = sum(batches) / len(batches)
        terms = f"{len(batches)} x {mean:.3g} / {max(times):.1f} ms"
    else:
        words = "nobody waits"
        pairs = list(zip(batches, times, strict=True))
        terms = " + ".join(f"{batch:.3g} / {ms:.1f}" for batch, ms in pairs[:_WORKERS_SHOWN])
        terms += " + ... ms" if len(pairs) > _WORKERS_SHOWN else " ms"
    expected, measured = summary.expected_samples_per_second, summary.samples_per_second
    return (
        f"{summary.name}, if {words}: {terms} = {expected:,.0f} samples/s; "
        f"measured {measured:,.0f} ({measured / expected:.2f})"
    )


def conclusion(summaries: Sequence[Summary], goal: Goal) -> str:
    """One sentence: the best of the other strategies against the first."""
    first = summaries[0]
    times = first.compute_seconds
    slowdown = max(times) / min(times)
    if slowdown > _CLEARLY_SLOWER:
        slowest = f"worker {times.index(max(times))} computing {slowdown:.1f} times as long"
        text = f"With {slowest} as the fastest, "
    else:
        text = f"With {len(times)} equally fast worker{'s' if len(times) > 1 else ''}, "
    if len(summaries) == 1:
        text += f"{first.name} trained {first.samples_per_second:,.0f} samples per second"
        return f"{text} and reached {goal} {_when(first)}."
    best = min(summaries[1:], key=lambda s: (_time_to_goal(s), -s.samples_per_second))
    ratio = best.samples_per_second / first.samples_per_second
    return (
        f"{text}{best.name} trained {ratio:.1f} times as many samples per second as {first.name} "
        f"({best.samples_per_second:,.0f} against {first.samples_per_second:,.0f}); "
        f"{goal} was reached by {best.name} {_when(best)}, by {first.name} {_when(first)}."
    )


def _time_to_goal(summary: Summary) -> float:
    return float("inf") if summary.seconds_to_goal is None else summary.seconds_to_goal


def _when(summary: Summary) -> str:
    seconds = summary.seconds_to_goal
    return "never" if seconds is None else f"after {seconds:.1f} s"


def report(folder: str | Path) -> str:
    """Read the runs of a comparison, draw the picture, add the results to ``comparison.json``.

    Args:
        folder: where ``comparison.json`` is.

    Returns:
        The text to print: the table, the expectations, the conclusion and where the files lie.

    Raises:
        ConfigError: the folder or a run in it is not whole, or matplotlib is missing.
    """
    folder = Path(folder)
    comparison = Comparison.load(folder)
    goal = comparison.goal
    runs = {name: read_run(folder / place) for name, place in comparison.runs.items()}
    _check_metric(runs, goal.metric)
    evaluations = equally_spaced(runs)
    summaries = [summarise(name, log, evaluations[name], goal) for name, log in runs.items()]
    verdict = conclusion(summaries, goal)
    results = [
        {**asdict(s), "expected_samples_per_second": s.expected_samples_per_second}
        for s in summaries
    ]
    comparison.save(folder, results=results, conclusion=verdict)
    draw(folder / PICTURE_NAME, runs, summaries, evaluations, goal, verdict)
    return "\n".join(
        [
            table(summaries, goal),
            "",
            "By the textbook, from the compute times of this run:",
            *(f"  {expectation(s)}" for s in summaries),
            "",
            textwrap.fill(verdict, _LINE_WIDTH),
            textwrap.fill(comparison.note, _LINE_WIDTH),
            "",
            f"picture      {_shown(folder / PICTURE_NAME)}",
            f"raw numbers  {_shown(folder / FILE_NAME)}",
            f"TensorBoard  {_shown(sys.executable)} -m tensorboard.main --logdir {_shown(folder)}",
        ]
    )


def _shown(path: str | Path) -> Path:
    """A path as one would type it here."""
    path, here = Path(path), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _check_metric(runs: Mapping[str, RunLog], metric: str) -> None:
    for name, log in runs.items():
        for evaluation in log.evaluations:
            if metric not in evaluation.values:
                raise ConfigError(
                    f"the goal is about {metric!r}, but the evaluations of {name} have: "
                    f"{', '.join(evaluation.values)}"
                )


def main(folders: Sequence[str] | None = None) -> None:
    """Make the reports of the given folders again (default: those on the command line)."""
    folders = sys.argv[1:] if folders is None else folders
    if not folders or folders[0].startswith("-"):
        raise SystemExit("usage: python -m scaledtrain.report.comparison DIR...")
    try:
        for folder in folders:
            print(report(folder))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
