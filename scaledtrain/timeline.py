"""Where the time of a step goes: spans on one clock, added up by phase, kept on request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from scaledtrain.clock import Clock, HostClock

__all__ = ["PHASES", "Named", "Phase", "Span", "Timeline"]

_MAX_INSIDE = 4096  # spans that one span can hold; forgetting more keeps memory bounded

Phase = Literal["data", "compute", "communication", "waiting", "evaluation"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_WITH_OTHERS: tuple[Phase, ...] = ("communication", "waiting", "evaluation")


class Span(NamedTuple):
    """From ``start`` to ``end`` (seconds on the monotonic clock of the host) in one phase."""

    phase: Phase
    start: float
    end: float


class Named(NamedTuple):
    """Something with a name of its own that was done from ``start`` to ``end``."""

    name: str
    start: float
    end: float


class Timeline:
    """Collects what this rank did and when.

    Recording a span costs about a microsecond: nothing is written, synchronised or resolved
    before ``drain``. The time of a span that lies inside another one, as communication begun
    during the backward pass, counts to the inner phase only. On one host all ranks share the
    clock, so their spans lie on one axis.

    Args:
        device: kernels on CUDA return before they are done. A timeline that keeps spans therefore
            waits for the device at the end of each; one that only adds up does not, and counts
            device time to the phase in which the host waits for it.
        keep: keep every span for ``drain``, not only the sums.
        clock: whose seconds are counted; default the host's.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        keep: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.now: Callable[[], float] = (clock or HostClock()).now
        self.keep = keep
        self._device = device if device is not None and device.type == "cuda" else None
        self._spans: list[Span] = []
        self._named: list[Named] = []
        self._seconds: dict[Phase, float] = {}
        self._drained: dict[Phase, float] = {}
        # Start and length of the last spans that lie in no other one so far.
        self._outermost: deque[tuple[float, float]] = deque(maxlen=_MAX_INSIDE)

    def add(self, phase: Phase, start: float, end: float | None = None) -> float:
        """Record a span that ends now, or at ``end``; returns its end, where the next may start."""
        if end is None:
            if self.keep and self._device is not None:
                torch.cuda.synchronize(self._device)
            end = self.now()
        seconds = end - start
        while self._outermost and self._outermost[-1][0] >= start:  # it lies inside this one
            seconds -= self._outermost.pop()[1]
        self._outermost.append((start, end - start))
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        if self.keep:
            self._spans.append(Span(phase, start, end))
        return end

    def note(self, name: str, start: float) -> None:
        """Keep, if spans are kept, what ends now, and lies inside of a span."""
        if self.keep:
            if self._device is not None:
                torch.cuda.synchronize(self._device)
            self._named.append(Named(name, start, self.now()))

    def drain_named(self) -> list[Named]:
        """What was noted since the last time."""
        named, self._named = self._named, []
        return named

    def drain(self) -> tuple[dict[Phase, float], list[Span]]:
        """Seconds by phase and the kept spans since the last drain."""
        seconds, spans = self._seconds, self._spans
        for phase in seconds:
            self._drained[phase] = self.total(phase)
        self._seconds, self._spans = {}, []
        return seconds, spans

    def total(self, phase: Phase) -> float:
        """Seconds of a phase since the beginning, drained or not."""
        return self._drained.get(phase, 0.0) + self._seconds.get(phase, 0.0)

    @property
    def waited(self) -> float:
        """Seconds in communication, waits and evaluations since the beginning."""
        return sum(self.total(phase) for phase in _WITH_OTHERS)
