"""Which simulated workers die, when, and when they come back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from scaledtrain.errors import ConfigError
from scaledtrain.sim.compute import check_positive
from scaledtrain.sim.streams import generator

__all__ = ["Failure", "Failures", "GivenFailures", "Outage", "RandomFailures"]


class Outage(NamedTuple):
    """A worker dies, and perhaps comes back; in seconds since the run began."""

    dies_at: float
    returns_at: float | None
    """None: never."""


class Failures(Protocol):
    """When workers die."""

    def events(self, worker: int, seed: int) -> Iterator[Outage]:
        """A worker's outages, in the order of time; the next begins after the last is over."""


@dataclass(frozen=True)
class Failure:
    """A worker dies at a given time.

    Args:
        worker: from 0.
        seconds: since the run began.
        back_after_seconds: how long it is away; None: for good.

    Raises:
        ConfigError: a worker or time that cannot be.
    """

    worker: int
    seconds: float
    back_after_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.worker < 0 or not 0 <= self.seconds < math.inf:
            raise ConfigError(
                f"a failure of worker {self.worker} after {self.seconds} s cannot be; workers and "
                "seconds count from 0"
            )
        if self.back_after_seconds is not None:
            check_positive(self, back_after_seconds=self.back_after_seconds)


@dataclass(frozen=True)
class GivenFailures:
    """Workers die at given times, to see what one failure does.

    Leaves out: everything but the failures that are listed.

    Args:
        failures: in any order; one of a worker that a run does not have is ignored.

    Raises:
        ConfigError: a worker dies while it is away.

    Example:
        >>> failures = GivenFailures([Failure(worker=1, seconds=5.0, back_after_seconds=2.0)])
        >>> list(failures.events(1, seed=0)), list(failures.events(0, seed=0))
        ([Outage(dies_at=5.0, returns_at=7.0)], [])
    """

    failures: Sequence[Failure]

    def __post_init__(self) -> None:
        for worker in {failure.worker for failure in self.failures}:
            back: float | None = -math.inf
            for outage in self._outages(worker):
                if back is None or outage.dies_at <= back:
                    since = "for good" if back is None else f"until {back} s"
                    raise ConfigError(
                        f"worker {worker} dies at {outage.dies_at} s, but is away {since}; let it "
                        "return before (back_after_seconds), or leave this failure out"
                    )
                back = outage.returns_at

    def _outages(self, worker: int) -> list[Outage]:
        mine = [f for f in self.failures if f.worker == worker]
        return [
            Outage(
                f.seconds,
                None if f.back_after_seconds is None else f.seconds + f.back_after_seconds,
            )
            for f in sorted(mine, key=lambda f: f.seconds)
        ]

    def events(self, worker: int, seed: int) -> Iterator[Outage]:
        """This worker's listed outages."""
        return iter(self._outages(worker))


@dataclass(frozen=True)
class RandomFailures:
    """Workers die at random, each for itself, as by a memoryless clock.

    Up for Exp(mean_seconds_between_failures), then away for Exp(mean_seconds_to_return), again and
    again. In the long run a worker is there for the share between / (between + to_return); of n
    workers one dies about every between / n seconds.

    Leaves out: failures of several workers at once (a host, a switch, a site), hours of the day,
    and machines that wear out.

    Args:
        mean_seconds_between_failures: from a worker's start, or return, to its next death.
        mean_seconds_to_return: from its death to its return; None: it stays away.
        spared: workers that do not die, such as one that holds the server.

    Raises:
        ConfigError: an argument that is not positive and finite.

    Example:
        >>> gone = RandomFailures(mean_seconds_between_failures=3600.0)
        >>> [outage.returns_at for outage in gone.events(0, seed=0)]
        [None]
    """

    mean_seconds_between_failures: float
    mean_seconds_to_return: float | None = None
    spared: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_positive(self, mean_seconds_between_failures=self.mean_seconds_between_failures)
        if self.mean_seconds_to_return is not None:
            check_positive(self, mean_seconds_to_return=self.mean_seconds_to_return)

    def events(self, worker: int, seed: int) -> Iterator[Outage]:
        """This worker's outages: without end, or one if it does not return."""
        if worker in self.spared:
            return
        source = generator(seed, worker, "failure")
        dies_at = float(source.exponential(self.mean_seconds_between_failures))
        if self.mean_seconds_to_return is None:
            yield Outage(dies_at, None)
            return
        while True:
            returns_at = dies_at + float(source.exponential(self.mean_seconds_to_return))
            yield Outage(dies_at, returns_at)
            dies_at = returns_at + float(source.exponential(self.mean_seconds_between_failures))
