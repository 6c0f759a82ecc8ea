"""What ``scaledtrain.evaluate`` found of a run: figures and tables for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d

from scaledtrain.evaluate.results import Calibration, Evaluated
from scaledtrain.report.charts import COLOURS, LEVEL_COLOUR, base_figure

__all__ = ["EvaluationSection", "section"]

_MAX_CELLS = 32
"""Rows and columns of a table that are shown."""


@dataclass(frozen=True)
class EvaluationSection:
    """For the template; the figures are in the order of the page."""

    about: str
    values: Sequence[tuple[str, str]]
    sentences: Sequence[str]
    figures: Sequence[Any]
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]] = field(default_factory=list)


def section(found: Evaluated) -> EvaluationSection:
    """What is shown of it."""
    calibration = found.calibration
    of = "" if found.samples is None else f", {found.samples:,} test samples"
    return EvaluationSection(
        about=f"{found.checkpoint}{of}",
        values=[(name, f"{value:.4f}") for name, value in found.values.items()],
        sentences=[] if calibration is None else _sentences(calibration),
        figures=[] if calibration is None else [_reliability(calibration), _coverage(calibration)],
        tables=[
            (name.replace("_", " "), [[_cell(value) for value in row] for row in _rows(table)])
            for name, table in found.tables.items()
            if len(table) <= _MAX_CELLS
        ],
    )


def _rows(table: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """One, if it has but one dim, as a value for each class."""
    return table if all(isinstance(row, list) for row in table) else [table]


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _sentences(calibration: Calibration) -> list[str]:
    more = calibration.mean_confidence - calibration.accuracy
    how = "over" if more > 0 else "under"
    said = (
        f"It says {calibration.mean_confidence:.1%} on average and is right in "
        f"{calibration.accuracy:.1%}: {how}confident by {abs(more):.1%}. Expected calibration "
        f"error {calibration.expected_error:.4f}, of {calibration.n_bins} bins."
    )
    return [said, *(f"{str(t)[0].upper()}{str(t)[1:]}." for t in calibration.thresholds)]


def _reliability(calibration: Calibration) -> Any:
    """Accuracy over confidence: on the diagonal a model is right as often as it says."""
    bins = calibration.bins
    plot = base_figure(
        title="reliability",
        x_axis_label="confidence",
        y_axis_label="accuracy",
        x_range=Range1d(0, 1),
        y_range=Range1d(0, 1.02),
    )
    source = ColumnDataSource(
        {
            "low": [b.low for b in bins],
            "high": [b.high for b in bins],
            "confidence": [b.confidence for b in bins],
            "accuracy": [b.accuracy for b in bins],
            "count": [b.count for b in bins],
            "share": [b.count / calibration.answers for b in bins],
        }
    )
    bars = plot.quad(
        left="low", right="high", top="accuracy", bottom=0, source=source,
        fill_color=COLOURS[1], fill_alpha=0.35, line_color=COLOURS[1],
    )  # fmt: skip
    plot.line([0, 1], [0, 1], color=LEVEL_COLOUR, line_dash="dashed")
    plot.scatter("confidence", "accuracy", source=source, color=COLOURS[0], size=7)
    tooltips = [
        ("confidence", "@confidence{0.000}"),
        ("accuracy", "@accuracy{0.000}"),
        ("answers", "@count{0,0} (@share{0.0%})"),
    ]
    plot.add_tools(HoverTool(renderers=[bars], tooltips=tooltips))
    return plot


def _coverage(calibration: Calibration) -> Any:
    """The accuracy of the answers that are given, over how many are."""
    plot = base_figure(
        title="answering only when confident",
        x_axis_label="share of the cases that are answered",
        y_axis_label="accuracy of the answers",
        x_range=Range1d(0, 1),
    )
    confidence, coverage, accuracy = zip(*calibration.curve, strict=True)
    source = ColumnDataSource(
        {"confidence": confidence, "coverage": coverage, "accuracy": accuracy}
    )
    line = plot.line("coverage", "accuracy", source=source, color=COLOURS[1], line_width=2)
    chosen = [t for t in calibration.thresholds if t.confidence is not None]
    marks = ColumnDataSource(
        {
            "confidence": [t.confidence for t in chosen],
            "coverage": [t.coverage for t in chosen],
            "accuracy": [t.accuracy for t in chosen],
        }
    )
    points = plot.scatter("coverage", "accuracy", source=marks, color=COLOURS[0], size=9)
    tooltips = [
        ("confidence at least", "@confidence{0.0000}"),
        ("answered", "@coverage{0.0%}"),
        ("accuracy", "@accuracy{0.00%}"),
    ]
    plot.add_tools(HoverTool(renderers=[line, points], tooltips=tooltips))
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    plot.yaxis.formatter = NumeralTickFormatter(format="0.0%")
    return plot
