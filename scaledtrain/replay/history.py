"""What each process of a run did, as the event log has it; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from scaledtrain.comm.serving.event_log import Event
from scaledtrain.server.operations import Kind

__all__ = ["OWN", "Expectation", "History", "Life"]

OWN = frozenset({Kind.PULL, Kind.PUSH, Kind.READ})
"""Events that need the worker: it gives a gradient, or takes parameters. The others only change the
server, and happen when it is their turn."""

Expectation = Literal["next", "ignored", "over", "never", "other"]


class Life:
    """One process of a worker, from its first event to its last.

    Args:
        attempt: how many processes the worker had before.
    """

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self._numbers: list[int] = []
        self._kinds: list[Kind] = []
        self._place = -1  # of the last event of its own that has happened
        self._over = False

    def add(self, number: int, kind: Kind) -> None:
        """The log goes on with this."""
        self._numbers.append(number)
        self._kinds.append(kind)

    def _next_own(self) -> int | None:
        places = range(self._place + 1, len(self._kinds))
        return next((place for place in places if self._kinds[place] in OWN), None)

    def expects(self, kind: Kind) -> Expectation:
        """What becomes of the process's next request, by what really came after its last one.

        Returns:
            ``"next"``: it happened. ``"ignored"``: a push that came when the worker had been given
            up. ``"over"``: the worker did not pull any more, since it had been told to end, or
            wanted to. ``"never"``: the log has nothing more from it: it died, or the log ends.
            ``"other"``: something else happened.
        """
        place = self._next_own()
        if place is None:
            return "never"
        if self._kinds[place] == kind:
            return "next"
        ends = self._kinds[place] == Kind.READ
        removed = self._kinds[self._place + 1 : place].count(Kind.REMOVE)
        if kind == Kind.PUSH and (self._over or removed > ends):
            return "ignored"
        if kind == Kind.PULL and ends:
            self._over = True
            return "over"
        return "other"

    @property
    def next_number(self) -> int | None:
        """The number of its next own event."""
        place = self._next_own()
        return None if place is None else self._numbers[place]

    @property
    def pulls_next(self) -> bool:
        """Whether its next own event is a pull."""
        place = self._next_own()
        return place is not None and self._kinds[place] == Kind.PULL

    def ends(self) -> bool:
        """Whether it goes on to take the final parameters now, without another step."""
        then = self._kinds[self._place + 1 : self._place + 3]
        self._over = self._over or then == [Kind.REMOVE, Kind.READ]
        return self._over

    @property
    def abandons(self) -> bool:
        """Whether it gave up what it computes with the parameters that it has pulled."""
        return self._kinds[self._place + 1 : self._place + 2] == [Kind.PULL]

    def happened(self) -> None:
        """Its next own event has."""
        place = self._next_own()
        assert place is not None
        self._place = place

    def losses(self) -> list[int]:
        """Numbers of the events with which the others went on without it."""
        after = [*self._kinds[1:], None]
        return [
            number
            for number, kind, then in zip(self._numbers, self._kinds, after, strict=True)
            if kind == Kind.REMOVE and then != Kind.READ
        ]


class History:
    """The processes behind a log.

    Args:
        events: all of the log.
        workers: how many there were.

    Attributes:
        of_event: for each event the process whose it is; None: nobody's.
        losses: numbers of the events with which a worker was lost.

    Example:
        Worker 0 pulls, pushes, and ends; worker 1 pulls and dies.

        >>> from scaledtrain.server.operations import Operation
        >>> kinds = [(Kind.PULL, 0), (Kind.PULL, 1), (Kind.PUSH, 0), (Kind.REMOVE, 1),
        ...          (Kind.REMOVE, 0), (Kind.READ, 0), (Kind.ADD, 0)]
        >>> events = [Event(Operation(kind, worker), 0.0) for kind, worker in kinds]
        >>> history = History(events, workers=2)
        >>> one = history.first(1)
        >>> one.expects(Kind.PULL), history.losses
        ('next', {3})
        >>> one.happened()
        >>> one.expects(Kind.PUSH)
        'never'
    """

    def __init__(self, events: Sequence[Event], workers: int) -> None:
        self._lives = [{0: Life(0)} for _ in range(workers)]
        self.of_event: list[Life | None] = []
        latest = [lives[0] for lives in self._lives]
        for number, event in enumerate(events):
            kind, worker, version = event.operation
            if worker < 0:
                self.of_event.append(None)
                continue
            if kind == Kind.ADD and version > latest[worker].attempt:
                latest[worker] = self._lives[worker][version] = Life(version)
            latest[worker].add(number, kind)
            self.of_event.append(latest[worker])
        every = [life for lives in self._lives for life in lives.values()]
        self.losses = {number for life in every for number in life.losses()}

    def survived(self, worker: int) -> bool:
        """Whether the worker had one process, and the others never went on without it."""
        return len(self._lives[worker]) == 1 and not self.first(worker).losses()

    def first(self, worker: int) -> Life:
        """The process with which a worker began."""
        return self._lives[worker][0]
