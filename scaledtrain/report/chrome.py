"""Timelines in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

A run is a process (from 1: viewers treat process 0 as the idle one), a rank a thread of it.
References: "Trace Event Format", The Chromium Project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledtrain.report.traces import WHOLE, Arrival, Trace, Window

__all__ = ["trace_events", "write_chrome_trace"]


def write_chrome_trace(path: Path, traces: Sequence[Trace], window: Window = WHOLE) -> int:
    """Write the timelines of runs into one file; no more than a line of it is in memory.

    Args:
        path: a new file; an old one is replaced.
        traces: of the runs.
        window: spans and events outside are left out.

    Returns:
        How many events there are in the file.
    """
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for event in trace_events(traces, window):
            file.write(f"{',' if count else ''}\n{json.dumps(event)}")
            count += 1
        file.write("\n]}\n")
    return count


def trace_events(traces: Sequence[Trace], window: Window = WHOLE) -> Iterator[dict[str, Any]]:
    """The events, one after the other; times in microseconds, to the nanosecond.

    * Complete events (``X``) for spans; those that lie inside another one are drawn below it.
    * Instant events (``i``) on a worker's row where its push reached the server, with ``version``,
      ``staleness`` and ``accepted``, and where it left or joined.
    * A counter (``C``) of the staleness of each push.
    """
    for process, trace in enumerate(traces, start=1):
        yield _named(process, 0, "process_name", name=trace.name)
        yield _named(process, 0, "process_sort_index", sort_index=process)
        for rank in trace.paths:
            yield _named(process, rank, "thread_name", name=f"rank {rank}")
            yield _named(process, rank, "thread_sort_index", sort_index=rank)
            place = {"pid": process, "tid": rank}
            for phase, start, end in trace.spans(rank, window):
                times = {"ts": _microseconds(start), "dur": _microseconds(end - start)}
                yield {"name": phase, "cat": "phase", "ph": "X", **times, **place}
        for arrival in trace.arrivals(window):
            yield from _arrival(process, arrival)


def _named(process: int, thread: int, what: str, **args: Any) -> dict[str, Any]:
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
