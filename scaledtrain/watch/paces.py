"""What each rank spends its time on, and which rank is slow."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaledtrain.comm.notes import Notes
from scaledtrain.timeline import PHASES, Phase, Timeline

__all__ = ["Paces", "Table", "logger"]

logger = logging.getLogger(__name__)

_LAST_SECONDS = 1.0  # for the last table of a run
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Table:
    """Seconds a step of each rank, over the last window that each has told.

    Args:
        seconds: of each phase, by rank.
        factor: how many times the median makes a rank slow.

    Example:
        >>> rows = [{"compute": 0.010}, {"compute": 0.011}, {"compute": 0.030, "data": 0.003}]
        >>> Table(rows, factor=1.5).slow  # 33 ms; the median is 11
        {2: 3.0}
    """

    seconds: Sequence[Mapping[str, float]]
    factor: float

    def work(self, rank: int) -> float:
        """A rank's own part of a step: what does not depend on other ranks."""
        row = self.seconds[rank]
        return row.get("data", 0.0) + row.get("compute", 0.0)

    @property
    def slow(self) -> dict[int, float]:
        """The ranks whose own part takes more than ``factor`` medians, and how many it takes."""
        works = [self.work(rank) for rank in range(len(self.seconds))]
        # Of two the lower one: their mean would hide that one is twice as slow.
        median = statistics.median_low(works)
        slow = enumerate(works)
        return {r: round(w / median, 2) for r, w in slow if median > 0 and w > self.factor * median}

    def __str__(self) -> str:
        """For people: milliseconds a step."""
        lines = ["  rank" + "".join(f"{phase:>15}" for phase in PHASES) + "   ms a step"]
        for rank, row in enumerate(self.seconds):
            cells = "".join(f"{1e3 * row.get(phase, 0.0):>15.2f}" for phase in PHASES)
            mark = f"   {self.slow[rank]:.1f} x the median" if rank in self.slow else ""
            lines.append(f"{rank:>6}{cells}{mark}")
        return "\n".join(lines)

    def warning(self) -> str | None:
        """What to say about slow ranks; None: there are none."""
        if not self.slow:
            return None
        each = [
            f"rank {rank} is slow: {1e3 * self.work(rank):.1f} ms of data and compute a step, "
            f"{times:.1f} times the median of all ranks"
            for rank, times in self.slow.items()
        ]
        return "; ".join(each)


class Paces:
    """Collects the times of all ranks on rank 0; nobody waits for it.

    `count` is called by the thread that trains, `exchange` by a `Messenger`.

    Args:
        notes: between the ranks.
        timeline: of this rank.
        every: steps of a window.
        factor: see `Table`.
    """

    def __init__(self, notes: Notes, timeline: Timeline, every: int, factor: float) -> None:
        self._notes = notes
        self._timeline = timeline
        self._every = every
        self._factor = factor
        self._steps = 0
        self._windows = 0
        self._before = self._seconds()
        self._own: tuple[int, int, str] = (0, 0, "")  # the last window, its step, and its times
        self._sent = self._shown = 0
        self._tables: deque[tuple[int, Table]] = deque(maxlen=4)

    def _seconds(self) -> dict[Phase, float]:
        return {phase: self._timeline.total(phase) for phase in PHASES}

    def count(self, step: int) -> tuple[int, Table] | None:
        """A step has been made; on rank 0 now and then a new table, and the step it is of."""
        self._steps += 1
        if self._steps % self._every == 0:
            now = self._seconds()
            row = {phase: (now[phase] - self._before[phase]) / self._every for phase in PHASES}
            self._before = now
            self._windows += 1
            self._own = (self._windows, step, json.dumps(row))
        return self._tables.popleft() if self._tables else None

    def exchange(self) -> None:
        """Tell the own times, and on rank 0 take the others'."""
        window, step, text = self._own
        if window > self._sent:
            self._notes.write(f"pace/{self._notes.rank}", f"{window} {text}")
            self._sent = window
        if self._notes.rank == 0 and window > self._shown:
            self._collect(window, step)

    def _collect(self, window: int, step: int) -> None:
        """Make a table when all have told this window, or a later one."""
        told = [self._notes.read(f"pace/{rank}") for rank in range(self._notes.size)]
        pairs = [text.split(" ", 1) for text in told if text is not None]
        if len(pairs) == self._notes.size and all(int(number) >= window for number, _ in pairs):
            rows = [json.loads(row) for _, row in pairs]
            self._tables.append((step, Table(rows, self._factor)))
            self._shown = window

    def last(self) -> tuple[int, Table] | None:
        """The table of the last window; waits a second at most for those who are about to tell it.

        Call it when the `Messenger` has ended.
        """
        deadline = time.monotonic() + _LAST_SECONDS
        while self._notes.rank == 0 and self._own[0] > self._shown:
            try:
                self.exchange()
            except RuntimeError:  # the process with the store has ended
                break
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        return self._tables.pop() if self._tables else None
