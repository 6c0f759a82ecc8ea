"""A run's progress as one series of points, whatever the number of its workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scaledtrain.report.runs import Interval, RunLog

__all__ = ["MAX_POINTS", "Point", "progress"]

MAX_POINTS = 1500
"""More than a screen has columns."""


@dataclass(frozen=True)
class Point:
    """All workers together, over about as long as a record of each covers."""

    seconds: float
    step: int
    samples: int
    """Computed so far by all workers."""
    loss: float | None
    """Mean over the samples; None: none of the records has one."""
    samples_per_second: float
    memory_bytes: float
    """Of the worker that had most."""


def progress(log: RunLog, max_points: int = MAX_POINTS) -> list[Point]:
    """The records of all workers in the order of time, as many put together as there are workers.

    For workers in lockstep those are the records of one step; for others they are neighbours in
    time. More are put together where there would be too many points.

    Args:
        log: of the run.
        max_points: at most so many.
    """
    records = sorted((r for worker in log.workers for r in worker.intervals), key=_order)
    each = len(log.workers) * max(1, math.ceil(len(records) / len(log.workers) / max_points))
    points, samples = [], 0
    for start in range(0, len(records), each):
        together = records[start : start + each]
        samples += sum(record.samples for record in together)
        points.append(_together(together, samples))
    return points


def _order(record: Interval) -> tuple[float, int]:
    return record.seconds, record.step


def _together(records: Sequence[Interval], samples: int) -> Point:
    with_loss = [(r.loss, r.samples) for r in records if r.loss is not None]
    weight = sum(n for _, n in with_loss)
    return Point(
        seconds=max(record.seconds for record in records),
        step=max(record.step for record in records),
        samples=samples,
        loss=sum(loss * n for loss, n in with_loss) / weight if weight else None,
        samples_per_second=sum(r.samples_per_second for r in records) / len(records),
        memory_bytes=max(record.memory_bytes for record in records),
    )
