"""The interactive figures of a report page, made with Bokeh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, Legend, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from scaledtrain.report.findings import RankRow
from scaledtrain.report.picture import PHASE_COLOURS
from scaledtrain.report.progress import Point
from scaledtrain.report.runs import Evaluation
from scaledtrain.timeline import PHASES

__all__ = [
    "AGAINST",
    "COLOURS",
    "LEVEL_COLOUR",
    "base_figure",
    "curves",
    "evaluation_curves",
    "rank_bars",
    "staleness_curves",
]

# Okabe and Ito's colours without black: each is seen on a light and on a dark page.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8F99"]

AGAINST = {"seconds": "seconds since the run began", "step": "updates", "samples": "samples"}
"""What curves can be drawn over: the column, and the words on the axis."""

LEVEL_COLOUR = "#8A8F99"
"""Of baselines; runs get it only where there are seven of them."""

_HEIGHT = 300
_DASHES = ["solid", "dashed", "dotted", "dashdot"]  # where there are more runs than colours


def base_figure(**options: Any) -> Any:
    """With transparent ground: the page's script colours what is on it."""
    plot = figure(
        height=_HEIGHT,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    return plot


def _legend(plot: Any, items: Sequence[tuple[str, list[Any]]]) -> None:
    """Above the plot, a name in a line: names of runs are long."""
    if len(items) > 1:
        legend = Legend(
            items=list(items),
            orientation="vertical",
            click_policy="hide",
            background_fill_alpha=0,
            border_line_alpha=0,
            padding=0,
            margin=0,
        )
        plot.add_layout(legend, "above")


def _lines(
    title: str,
    series: Mapping[str, Mapping[str, Any]],
    markers: bool,
    levels: Mapping[str, float] = MappingProxyType({}),
) -> Any:
    """One line a run: the columns of `AGAINST`, and ``value``; and one a level."""
    plot = base_figure(title=title, x_axis_label=AGAINST["seconds"], tags=["against"])
    items = []
    for i, (name, columns) in enumerate(series.items()):
        if not len(columns["value"]):
            continue
        source = ColumnDataSource({**columns, "run": [name] * len(columns["value"])})
        colour = COLOURS[i % len(COLOURS)]
        dash = _DASHES[i // len(COLOURS) % len(_DASHES)]
        drawn = [
            plot.line("seconds", "value", source=source, color=colour, line_dash=dash, line_width=2)
        ]
        if markers:
            drawn.append(plot.scatter("seconds", "value", source=source, color=colour, size=5))
        items.append((name, drawn))
    of_runs = [renderer for _, drawn in items for renderer in drawn]
    items += _level_lines(plot, series, levels)
    plot.add_tools(
        HoverTool(
            renderers=of_runs,
            tooltips=[
                ("run", "@run"),
                (title, "@value{0.0000}"),
                ("seconds", "@seconds{0.00}"),
                ("update", "@step"),
                ("samples", "@samples{0,0}"),
            ],
        )
    )
    _legend(plot, items)
    return plot


def _level_lines(
    plot: Any, series: Mapping[str, Mapping[str, Any]], levels: Mapping[str, float]
) -> list[tuple[str, list[Any]]]:
    """Horizontal lines with their names at the right end, as long as the longest run.

    They are lines like those of runs, so that the axes make room for them, and make less where one
    is hidden.
    """
    there = [columns for columns in series.values() if len(columns["value"])]
    if not there or not levels:
        return []
    ends = {x: [0, max(columns[x].max() for columns in there)] for x in AGAINST}
    items = []
    for i, (label, value) in enumerate(levels.items()):
        source = ColumnDataSource({**ends, "value": [value, value]})
        line = plot.line(
            "seconds", "value", source=source, color=LEVEL_COLOUR, line_width=1.5,
            line_dash=_DASHES[1 + i % (len(_DASHES) - 1)],
        )  # fmt: skip
        end = ColumnDataSource({**{x: [last] for x, (_, last) in ends.items()}, "value": [value]})
        text = plot.text(
            "seconds", "value", text={"value": label}, source=end, text_color=LEVEL_COLOUR,
            text_font_size="11px", text_align="right", text_baseline="bottom",
        )  # fmt: skip
        items.append((f"{label}: {value:.4g}", [line, text]))
    plot.y_range.only_visible = True
    plot.height = _HEIGHT + 23 * len(items)  # their names are above the plot
    return items


def curves(title: str, value: str, runs: Mapping[str, Sequence[Point]], scale: float = 1.0) -> Any:
    """A quantity of `Point` over time; the page's choice draws it over steps or samples.

    Args:
        title: of the figure, with the unit.
        value: the attribute.
        runs: name -> its points.
        scale: what values are multiplied by.
    """
    series = {}
    for name, points in runs.items():
        known = [p for p in points if getattr(p, value) is not None]
        series[name] = {
            **{x: np.array([getattr(p, x) for p in known]) for x in AGAINST},
            "value": np.array([getattr(p, value) for p in known]) * scale,
        }
    return _lines(title, series, markers=False)


def evaluation_curves(
    metric: str,
    runs: Mapping[str, Sequence[Evaluation]],
    progress: Mapping[str, Sequence[Point]],
    levels: Mapping[str, float] | None = None,
) -> Any:
    """A metric of the evaluations; their samples are those of the records before them.

    Args:
        metric: its name.
        runs: name -> its evaluations.
        progress: name -> its points.
        levels: label -> value of a baseline, drawn as a line over the whole width.
    """
    series = {}
    for name, evaluations in runs.items():
        known = [e for e in evaluations if metric in e.values]
        points = progress[name]
        seconds = np.array([e.seconds for e in known])
        steps = np.array([e.step for e in known])
        samples = np.interp(
            steps, [0, *(p.step for p in points)], [0, *(p.samples for p in points)]
        ).round()
        values = np.array([e.values[metric] for e in known])
        series[name] = {"seconds": seconds, "step": steps, "samples": samples, "value": values}
    return _lines(f"evaluation: {metric}", series, markers=True, levels=levels or {})


def staleness_curves(runs: Mapping[str, Mapping[int, int]]) -> Any:
    """How large a share of the gradients had which staleness; runs without any are left out."""
    plot = base_figure(
        title="staleness of gradients",
        x_axis_label="updates since the parameters were pulled",
        y_axis_label="share of the gradients",
    )
    items = []
    for i, (name, counts) in enumerate(runs.items()):
        if not counts:
            continue
        total = sum(counts.values())
        staleness = np.arange(max(counts) + 1)
        share = np.array([counts.get(int(s), 0) / total for s in staleness])
        source = ColumnDataSource(
            {
                "staleness": staleness,
                "share": share,
                "left": staleness - 0.5,
                "right": staleness + 0.5,
                "run": [name] * len(share),
            }
        )
        colour = COLOURS[i % len(COLOURS)]
        bars = plot.quad(
            left="left", right="right", top="share", bottom=0, source=source,
            fill_color=colour, fill_alpha=0.35, line_color=colour,
        )  # fmt: skip
        items.append((name, [bars]))
    plot.y_range.start = 0
    plot.yaxis.formatter = NumeralTickFormatter(format="0%")
    tooltips = [("run", "@run"), ("staleness", "@staleness"), ("share", "@share{0.0%}")]
    plot.add_tools(HoverTool(tooltips=tooltips))
    _legend(plot, items)
    return plot


def rank_bars(rows: Sequence[RankRow]) -> Any:
    """What each rank did with its time, a bar a rank, the first at the top."""
    ranks = [f"rank {row.rank}" for row in rows]
    columns: dict[str, Any] = {"rank": ranks}
    for phase in PHASES:
        columns[phase] = [row.shares[phase] for row in rows]
    plot = base_figure(
        y_range=ranks[::-1],
        x_range=Range1d(0, 1, bounds=(0, 1)),
        x_axis_label="share of the rank's time",
    )
    plot.height = 80 + 22 * len(rows)
    bars = plot.hbar_stack(
        list(PHASES),
        y="rank",
        height=0.75,
        color=[PHASE_COLOURS[phase] for phase in PHASES],
        source=ColumnDataSource(columns),
        name=list(PHASES),
        line_color=None,
    )
    for phase, bar in zip(PHASES, bars, strict=True):
        tooltip = [("rank", "@rank"), (phase, f"@{phase}{{0.0%}}")]
        plot.add_tools(HoverTool(renderers=[bar], tooltips=tooltip, description=phase))
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    return plot
