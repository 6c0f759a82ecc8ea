"""Baselines as lines for people to read."""

from __future__ import annotations

from collections.abc import Mapping

from scaledtrain.baselines.results import Baselines, verdict

__all__ = ["to_text"]


def to_text(found: Baselines, values: Mapping[str, float] | None = None) -> str:
    """A table, what it is of, and how a run with these values compares."""
    metrics = found.metrics
    head = ["baseline", *metrics, "learnt from", ""]
    rows = [
        [
            row.name,
            *(f"{row.values[m]:.4f}" if m in row.values else "–" for m in metrics),
            f"{row.samples:,}" if row.samples else "–",
            f"{row.says}{f' ({row.note})' if row.note else ''}",
        ]
        for row in found.rows
    ]
    if values:
        shown = [f"{values[m]:.4f}" if m in values else "–" for m in metrics]
        rows.append(["the run", *shown, "", "its last evaluation"])
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = [_line(row, widths) for row in [head, *rows]]
    lines += [f"{name} is left out: {why}" for name, why in found.left_out.items()]
    lines.append(_about(found))
    if values:
        lines.append(verdict(found, values))
    return "\n".join(line for line in lines if line)


def _line(cells: list[str], widths: list[int]) -> str:
    first, *numbers, words = cells
    middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join([first.ljust(widths[0]), *middle, words]).rstrip()


def _about(found: Baselines) -> str:
    whole = found.train_samples is None or found.counted_samples >= found.train_samples
    of = "" if whole else f" of {found.train_samples:,}"
    return (
        f"{found.kind.replace('_', ' ')}: frequencies and means of {found.counted_samples:,}{of} "
        f"training samples; values on {found.test_samples:,} test samples"
    )
