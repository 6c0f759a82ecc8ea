"""Runs read against the baselines of their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaledtrain.baselines.results import Baselines, compare, lower_is_better, verdict
from scaledtrain.report.runs import RunLog

__all__ = ["AgainstTable", "against_table", "levels", "sentences"]

MAX_LINES = 8
"""Of baselines in a figure."""


@dataclass(frozen=True)
class AgainstTable:
    """A run's last evaluation beside the baselines."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def levels(metric: str, found: Mapping[str, Baselines | None]) -> dict[str, float]:
    """Label -> value of a metric, of the baselines of all runs; those that runs share are one.

    The best come first; where there are too many, the worst are left out.

    Example:
        >>> from scaledtrain.baselines import Row
        >>> of = lambda value: Baselines("regression", [Row("mean", "", {"loss": value}, 3)],
        ...                              {}, 3, 3, 3, 0)
        >>> levels("loss", {"a": of(2.0), "b": of(2.0)})
        {'mean': 2.0}
        >>> levels("loss", {"a": of(2.0), "b": of(1.0)})
        {'mean, b': 1.0, 'mean, a': 2.0}
    """
    by_name: dict[str, dict[float, str]] = {}
    for run, baselines in found.items():
        for row in baselines.rows if baselines is not None else ():
            if metric in row.values:
                by_name.setdefault(row.name, {}).setdefault(row.values[metric], run)
    lines = {
        name.replace("_", " ") + (f", {run}" if len(values) > 1 else ""): value
        for name, values in by_name.items()
        for value, run in values.items()
    }
    best_first = sorted(lines, key=lines.__getitem__, reverse=not lower_is_better(metric))
    return {label: lines[label] for label in best_first[:MAX_LINES]}


def sentences(log: RunLog, baselines: Baselines | None) -> list[str]:
    """How the run compares; none if it has no evaluation, or no baselines."""
    if baselines is None or not log.evaluations:
        return []
    return [text for text in [verdict(baselines, log.evaluations[-1].values)] if text]


def against_table(log: RunLog, baselines: Baselines) -> AgainstTable:
    """Each baseline's values, and by how much the run is better."""
    values = log.evaluations[-1].values if log.evaluations else {}
    metrics = baselines.metrics
    shown = [m for m in metrics if m in values]
    columns = ["", *metrics, *(f"run better by: {m}" for m in shown), "learnt from"]
    rows = [
        ["this run", *(f"{values[m]:.4f}" if m in values else "–" for m in metrics)]
        + ["–"] * (len(shown) + 1)
    ]
    for row, better in compare(baselines, values):
        rows.append(
            [
                row.name.replace("_", " "),
                *(f"{row.values[m]:.4f}" if m in row.values else "–" for m in metrics),
                *(f"{better[m]:+.4f}" if m in better else "–" for m in shown),
                f"{row.samples:,}" if row.samples else "–",
            ]
        )
    notes = [
        f"{row.name.replace('_', ' ')}: {row.says}, {row.note}"
        for row in baselines.rows
        if row.note
    ]
    notes += [f"{name.replace('_', ' ')}: {why}" for name, why in baselines.left_out.items()]
    return AgainstTable(columns, rows, notes)
