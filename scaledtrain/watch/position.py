"""What a rank is doing: written by the thread that trains, read by others."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Literal, NamedTuple

__all__ = ["Place", "Position", "Stage"]

Stage = Literal["start", "data", "pull", "compute", "reduce", "apply", "evaluate", "save", "end"]

_STEP: tuple[Stage, ...] = ("data", "pull", "compute", "reduce", "apply")  # in this order
_COUNTED_FROM = 10  # steps, before which nothing is usual


class Place(NamedTuple):
    """Where a rank is, and since when."""

    stage: Stage
    step: int
    """Updates made to the parameters before."""
    epoch: int
    since: float
    """Seconds of ``time.monotonic`` at which it came to this stage."""
    began: float
    """The same for the step that the stage is in; equal for stages outside of steps."""

    @property
    def in_step(self) -> bool:
        """Whether it is a stage of a step."""
        return self.stage in _STEP

    @property
    def order(self) -> tuple[int, int]:
        """Whoever waits in lockstep waits for those that are smallest."""
        return self.step, _STEP.index(self.stage) if self.in_step else -1


class Position:
    """Follows one rank through its steps; to `enter` a stage takes less than a microsecond.

    Args:
        count: tells the updates made, and the epoch.
    """

    def __init__(self, count: Callable[[], tuple[int, int]]) -> None:
        self._count = count
        self._step_seconds: deque[float] = deque(maxlen=50)
        now = monotonic()
        self._at: tuple[Stage, float, float] = ("start", now, now)

    def enter(self, stage: Stage) -> None:
        """The rank comes to a stage; each `data` begins a step."""
        now = monotonic()
        last, _, began = self._at
        if stage == "data" or stage not in _STEP:
            if last == "apply":
                self._step_seconds.append(now - began)
            began = now
        self._at = (stage, now, began)  # at once, so that no reader sees a half of it

    @property
    def place(self) -> Place:
        """Where the rank is now."""
        stage, since, began = self._at
        return Place(stage, *self._count(), since, began)

    @property
    def usual_seconds(self) -> float | None:
        """The median of the last steps; None before there are ten."""
        seconds = list(self._step_seconds)
        return statistics.median(seconds) if len(seconds) >= _COUNTED_FROM else None
