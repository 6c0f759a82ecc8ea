"""Timelines as one HTML file that needs no network: zoom, play, step from event to event."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from scaledtrain.report.traces import WHOLE, Trace, Window, flatten
from scaledtrain.timeline import PHASES, Span

__all__ = ["write_timeline_page"]

MAX_SPANS = 120_000
"""In one page, of all ranks together: about 4 MB, which a browser draws without delay."""


_NAME_LENGTH = 14  # of a run, beside the rows


def write_timeline_page(
    path: Path, traces: Sequence[Trace], window: Window = WHOLE, max_spans: int = MAX_SPANS
) -> Window:
    """Write a page with the rows of all ranks of some runs, on one axis of time.

    Args:
        path: a new file; an old one is replaced.
        traces: of the runs.
        window: what is outside is left out.
        max_spans: the window is made to end earlier if there are more in it.

    Returns:
        What is in the page. The page says so, too, where that is not all.
    """
    rows, window, whole = _rows(traces, window, max_spans)
    index = {(row["run"], row["rank"]): i for i, row in enumerate(rows)}
    arrivals = [
        (_short(a.seconds), index[run, a.rank], a.what, a.version, a.staleness, a.accepted)
        for run, trace in enumerate(traces)
        for a in islice(trace.arrivals(window), max_spans)
    ]
    data = {
        "title": f"Timeline of {', '.join(trace.name for trace in traces)}",
        "about": _about(traces, window, whole),
        "phases": PHASES,
        "start": window.start,
        "end": window.end,
        "rows": rows,
        "arrivals": sorted(arrivals),
    }
    template = (files("scaledtrain.report") / "timeline.html").read_text(encoding="utf-8")
    # A name in the data must not be able to end the script element that holds them.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(template.replace("$DATA", text), encoding="utf-8")
    return window


def _rows(
    traces: Sequence[Trace], window: Window, max_spans: int
) -> tuple[list[dict[str, Any]], Window, bool]:
    places = [(run, rank) for run, trace in enumerate(traces) for rank in trace.paths]
    each = max(1, max_spans // len(places))
    kept: list[list[Span]] = []
    end, whole = window.end, True
    for run, rank in places:
        # One more than fits tells whether there are more; then what is after it is unknown.
        spans = list(islice(traces[run].spans(rank, Window(window.start, end)), each + 1))
        if len(spans) > each:
            end, whole = spans[each - 1].end, False
        kept.append(spans)
    last = max((span.end for spans in kept for span in spans), default=window.start)
    shown = Window(window.start, max(min(end, last), window.start + 1e-6))
    rows = []
    for (run, rank), spans in zip(places, kept, strict=True):
        name = f"rank {rank}" if len(traces) == 1 else f"{_cut(traces[run].name)}: {rank}"
        flat = [
            value
            for phase, begin, until in flatten(spans, shown)
            for value in (PHASES.index(phase), _short(begin), _short(until))
        ]
        rows.append({"name": name, "run": run, "rank": rank, "spans": flat})
    return rows, shown, whole


def _about(traces: Sequence[Trace], window: Window, whole: bool) -> str:
    text = f"{window.start:.4g} to {window.end:.4g} seconds since the run began"
    if not whole:
        text += ", as much as fits into a page; from_seconds and to_seconds show another part"
    for trace in traces:
        if len(trace.paths) < trace.n_ranks:
            text += f"; {len(trace.paths)} of the {trace.n_ranks} ranks of {trace.name}"
    return f"{text}."


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"


def _short(seconds: float) -> float:
    """To 0.1 microseconds."""
    return round(seconds, 7)
