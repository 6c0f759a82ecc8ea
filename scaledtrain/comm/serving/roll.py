"""Which workers take part in a run, and who waits for whom where it begins and ends."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Meeting", "Roll"]


@dataclass
class Meeting:
    """Where workers wait for each other, again and again."""

    what: str
    """For messages."""
    here: set[int] = field(default_factory=set)
    """Who has come."""
    held: int = 0
    """How often all have come."""


class Roll:
    """Who is there, which process speaks for each, and who is awaited in meetings.

    Each fit begins and ends with a meeting. A worker that comes back while the others are under way
    is a latecomer: it is not awaited where a fit begins, but where it ends.

    Pure: no clock and no threads.

    Args:
        workers: how many; all are there at first.

    Attributes:
        alive: workers that take part.
        complete: none has been lost so far.
        ended_complete: none had been lost when the last fit ended.
        beginning: of a fit.
        end: of a fit.
        attempts: how often each worker's process has been replaced by another one.
    """

    def __init__(self, workers: int) -> None:
        self.alive = set(range(workers))
        self.complete = True
        self.ended_complete = True
        self.beginning = Meeting("the start of fit")
        self.end = Meeting("the end of fit")
        self.attempts = [0] * workers
        self._latecomers: set[int] = set()
        self._training: dict[int, int] = {}  # worker -> fits that had ended when its own began

    def lose(self, worker: int) -> bool:
        """Nobody waits for this worker any more; returns whether it had been there."""
        if worker not in self.alive:
            return False
        self.alive.discard(worker)
        self.complete = False
        for meeting in (self.beginning, self.end):
            meeting.here.discard(worker)
        return True

    def take_back(self, worker: int) -> None:
        """A worker that was lost takes part in what the others do now."""
        self.alive.add(worker)
        self._latecomers.add(worker)
        self._training[worker] = self.end.held

    def begins(self, worker: int) -> bool:
        """A worker begins a fit; returns whether it waits for the others first."""
        self._training[worker] = self.end.held
        return worker not in self._latecomers

    def is_training(self, worker: int) -> bool:
        """Whether it is inside a fit."""
        return worker in self._training

    def ends(self, worker: int) -> bool:
        """A worker ends its fit; returns whether it waits for the others, who may have ended it."""
        self.alive.add(worker)
        return self._training.get(worker, self.end.held) == self.end.held

    def has_ended(self, worker: int) -> None:
        """It goes on to whatever comes next, which the others may have begun."""
        self._training.pop(worker, None)
        self._latecomers.discard(worker)
        if self.beginning.held > self.end.held:
            self._latecomers.add(worker)

    def hold_meetings(self) -> bool:
        """End the meetings to which all that are awaited have come; returns whether one did."""
        held = False
        for meeting, not_awaited in ((self.beginning, self._latecomers), (self.end, set[int]())):
            # The number first: thousands may come, one by one.
            enough = len(meeting.here) >= len(self.alive) - len(not_awaited)
            if enough and meeting.here and meeting.here >= self.alive - not_awaited:
                meeting.here.clear()
                meeting.held += 1
                held = True
                if meeting is self.end:
                    self.ended_complete = self.complete
        return held
