"""A Gantt chart of what each rank did, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaledtrain.report.picture import PHASE_COLOURS, require_matplotlib
from scaledtrain.report.traces import Trace, Window, flatten
from scaledtrain.timeline import PHASES, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MAX_RANKS", "draw_gantt", "readable_window"]

MAX_RANKS = 64
"""Rows of a chart, unless ranks are chosen."""

_SPANS = 80  # of the busiest rank that can be told apart across a page
_WIDTH_INCHES = 12.0
_ACCEPTED, _REJECTED = "#000000", "#CC0000"
_MAX_MARKS = 1500  # pushes in one panel; more would hide the rows


def draw_gantt(path: Path, traces: Sequence[Trace], windows: Sequence[Window]) -> None:
    """Draw the runs below each other: a row for each rank, a colour for each phase.

    Pushes to a server are marked with their staleness where there is room for numbers, those that
    were not used in red.

    Args:
        path: where the PNG goes.
        traces: of the runs.
        windows: which part of each run, with an end.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    heights = [0.9 + _row_inches(len(trace.paths)) * len(trace.paths) for trace in traces]
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1)
    figure = Figure(figsize=(_WIDTH_INCHES, 0.6 + sum(heights)), layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(traces), 1, squeeze=False, height_ratios=heights)[:, 0]
    pushed = False
    for axes, trace, window in zip(panels, traces, windows, strict=True):
        _rows(axes, trace, window)
        pushed |= _marks(axes, trace, window)
    handles: list[Patch | Line2D] = [
        Patch(facecolor=c, edgecolor="0.6", linewidth=0.5, label=p)
        for p, c in PHASE_COLOURS.items()
    ]
    if pushed:
        for colour, what in ((_ACCEPTED, "push (staleness)"), (_REJECTED, "push, not used")):
            marker = Line2D(
                [], [], color=colour, marker="v", markersize=5, linestyle="", label=what
            )
            handles.append(marker)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=130)


def readable_window(trace: Trace, start: float | None, end: float | None) -> Window:
    """The part of a run to draw: what is asked for, or a part of its middle.

    The part is so short that the busiest rank has about 80 spans in it.

    Args:
        trace: of the run.
        start: in seconds; None with an end: 0.
        end: in seconds; None with a start: so short that it is readable.
    """
    if end is not None:
        return Window(start or 0.0, end)
    shortest = Window()
    middle = _end(trace) / 2 if start is None else None
    for rank in trace.paths:
        spans = flatten(trace.spans(rank, Window(start or 0.0)), Window(start or 0.0))
        if not spans:
            continue
        first = 0
        if middle is not None:
            before = sum(span.end <= middle for span in spans)
            first = max(0, min(before - _SPANS // 2, len(spans) - _SPANS))
        window = Window(spans[first].start, spans[first : first + _SPANS][-1].end)
        shortest = min(shortest, window, key=lambda w: w.end - w.start)
    return shortest if shortest != Window() else Window(start or 0.0, (start or 0.0) + 1.0)


def _end(trace: Trace) -> float:
    return max((span.end for rank in trace.paths for span in trace.spans(rank)), default=0.0)


def _row_inches(n_ranks: int) -> float:
    return 0.42 if n_ranks <= 4 else 0.3 if n_ranks <= 16 else 0.17


def _rows(axes: Axes, trace: Trace, window: Window) -> None:
    unit, per_second = _unit(window)
    for row, rank in enumerate(trace.paths):
        spans = flatten(trace.spans(rank, window), window)
        for phase in PHASES:
            _bars(axes, [s for s in spans if s.phase == phase], row, per_second)
    n_ranks = len(trace.paths)
    axes.set_xlim(window.start * per_second, window.end * per_second)
    axes.set_ylim(n_ranks - 0.5, -0.6)
    axes.set_yticks(range(n_ranks), [f"rank {rank}" for rank in trace.paths])
    axes.tick_params(axis="y", length=0, labelsize=9 if n_ranks <= 16 else 7)
    axes.tick_params(axis="x", labelsize=9)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(f"{unit} since the run began", fontsize=9)
    shown = f"{window.start * per_second:.4g} to {window.end * per_second:.4g} {unit}"
    title = f"{trace.name}: what each rank did, {shown} of {_end(trace) * per_second:.4g}"
    if n_ranks < trace.n_ranks:
        title += f" ({n_ranks} of {trace.n_ranks} ranks)"
    axes.set_title(title, loc="left", fontsize=11)


def _bars(axes: Axes, spans: Sequence[Span], row: int, per_second: float) -> None:
    if spans:
        bars = [(s.start * per_second, (s.end - s.start) * per_second) for s in spans]
        colour = PHASE_COLOURS[spans[0].phase]
        axes.broken_barh(bars, (row - 0.26, 0.66), color=colour, linewidth=0)


def _marks(axes: Axes, trace: Trace, window: Window) -> bool:
    """Mark the pushes; returns whether there were any."""
    _, per_second = _unit(window)
    rows = {rank: row for row, rank in enumerate(trace.paths)}
    pushes = [a for a in trace.arrivals(window) if a.staleness >= 0]
    if len(pushes) > _MAX_MARKS:
        return False
    numbers = len(pushes) <= 40 * len(rows) and len(rows) <= 16
    for accepted, colour in ((True, _ACCEPTED), (False, _REJECTED)):
        chosen = [a for a in pushes if a.accepted == accepted]
        times = [a.seconds * per_second for a in chosen]
        tops = [rows[a.rank] - 0.31 for a in chosen]
        size = 18 if numbers else 5
        axes.scatter(times, tops, s=size, c=colour, marker="v", linewidths=0, clip_on=False)
    for push in pushes if numbers else []:
        axes.annotate(
            str(push.staleness),
            (push.seconds * per_second, rows[push.rank] - 0.31),
            xytext=(0, 2.5),
            textcoords="offset points",
            fontsize=7,
            ha="center",
            color=_ACCEPTED if push.accepted else _REJECTED,
        )
    return bool(pushes)


def _unit(window: Window) -> tuple[str, float]:
    return ("ms", 1000.0) if window.end < 2.0 else ("seconds", 1.0)
