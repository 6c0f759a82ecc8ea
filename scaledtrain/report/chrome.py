"""Timelines in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

A run is a process (from 1: viewers treat process 0 as the idle one), a rank a thread of it.
References: "Trace Event Format", The Chromium Project.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledtrain.report.traces import WHOLE, Arrival, Trace, Window

__all__ = [
    "complete_event",
    "named_event",
    "trace_events",
    "write_chrome_trace",
    "write_events",
]


def write_chrome_trace(path: Path, traces: Sequence[Trace], window: Window = WHOLE) -> int:
    """Write the timelines of runs into one file; no more than a line of it is in memory.

    Args:
        path: a new file; an old one is replaced.
        traces: of the runs.
        window: spans and events outside are left out.

    Returns:
        How many events there are in the file.
    """
    return write_events(path, trace_events(traces, window))


def write_events(path: Path, events: Iterable[dict[str, Any]]) -> int:
    """Write events into a file that viewers open; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for event in events:
            file.write(f"{',' if count else ''}\n{json.dumps(event)}")
            count += 1
        file.write("\n]}\n")
    return count


def trace_events(traces: Sequence[Trace], window: Window = WHOLE) -> Iterator[dict[str, Any]]:
    """The events, one after the other; times in microseconds, to the nanosecond.

    * Complete events (``X``) for spans, and for the passes of a pipeline; those that lie inside
      another one are drawn below it.
    * Instant events (``i``) on a worker's row where its push reached the server, with ``version``,
      ``staleness`` and ``accepted``, and where it left or joined.
    * A counter (``C``) of the staleness of each push.
    """
    for process, trace in enumerate(traces, start=1):
        yield named_event(process, 0, "process_name", name=trace.name)
        yield named_event(process, 0, "process_sort_index", sort_index=process)
        for rank in trace.paths:
            yield named_event(process, rank, "thread_name", name=f"rank {rank}")
            yield named_event(process, rank, "thread_sort_index", sort_index=rank)
            for phase, start, end in trace.spans(rank, window):
                yield complete_event(process, rank, phase, "phase", start, end)
            for name, start, end in trace.actions(rank):
                if end > window.start and start < window.end:
                    yield complete_event(process, rank, name, "pipeline", start, end)
        for arrival in trace.arrivals(window):
            yield from _arrival(process, arrival)


def complete_event(
    process: int, thread: int, name: str, category: str, start: float, end: float, **args: Any
) -> dict[str, Any]:
    """Something that was done from ``start`` to ``end``, in seconds."""
    times = {"ts": _microseconds(start), "dur": _microseconds(end - start)}
    event = {"name": name, "cat": category, "ph": "X", **times, "pid": process, "tid": thread}
    return {**event, "args": args} if args else event


def named_event(process: int, thread: int, what: str, **args: Any) -> dict[str, Any]:
    """A name, or another property, of a process or of a thread in it."""
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": args}


def _arrival(process: int, arrival: Arrival) -> Iterator[dict[str, Any]]:
    place = {"ts": _microseconds(arrival.seconds), "pid": process, "tid": arrival.rank}
    args: dict[str, Any] = {}
    if arrival.version >= 0:
        args = {
            "version": arrival.version,
            "staleness": arrival.staleness,
            "accepted": arrival.accepted,
        }
    yield {"name": arrival.what, "cat": "server", "ph": "i", "s": "t", **place, "args": args}
    if arrival.staleness >= 0:
        args = {"staleness": arrival.staleness}
        yield {"name": "staleness", "cat": "server", "ph": "C", **place, "args": args}


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)
