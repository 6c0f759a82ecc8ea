"""How long a simulated worker computes: what a model of it is, and the simplest one.

A step is one step of one replica, with all its microbatches; a microbatch takes its share of it.
Every model is a pure function of (worker, seed, step): what one worker draws does not depend on how
many others there are, nor on when they are asked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

from scaledtrain.errors import ConfigError

__all__ = [
    "ComputeModel",
    "Constant",
    "StepPace",
    "StepTimes",
    "check_positive",
]


class ComputeModel(Protocol):
    """What computing costs in a virtual cluster."""

    def pace(self, worker: int, seed: int, factor: float = 1.0) -> StepPace:
        """What the steps of one worker take.

        Args:
            worker: from 0.
            seed: of the run.
            factor: how many times longer everything takes this worker.
        """


class StepPace:
    """The time of a step is drawn when it begins, and shared out among its microbatches.

    A `scaledtrain.schedule.Pace`.

    Args:
        draws: seconds of each step, without end.
        factor: how many times longer everything takes.

    Example:
        >>> pace = StepPace(iter([1.0, 2.0]), factor=4.0)
        >>> pace.begin_step()
        >>> pace.seconds(0.0, 0.25), pace.seconds(0.0, 0.75)  # microbatches of 1 and 3 samples
        (1.0, 3.0)
    """

    __slots__ = ("_draws", "_factor", "_step")

    def __init__(self, draws: Iterator[float], factor: float = 1.0) -> None:
        self._draws = draws
        self._factor = factor
        self._step = 0.0

    def begin_step(self) -> None:
        """Draw the time of the step that begins."""
        self._step = self._factor * next(self._draws)

    def seconds(self, elapsed: float, share: float) -> float:
        """What a microbatch takes in all: its share of the step's time, at least ``elapsed``."""
        seconds = self._step * share
        return seconds if seconds > elapsed else elapsed  # noqa: FURB136 - max is slower


def check_positive(model: object, **seconds: float) -> None:
    """Refuse values that are not positive and finite, with the name of what they are given to."""
    for name, value in seconds.items():
        if not 0 < value < math.inf:
            raise ConfigError(
                f"{name} of {type(model).__name__} is {value}; it must be positive and finite"
            )


class StepTimes(ABC):
    """A model in which a step takes a time that is drawn once, as it begins.

    A subclass says how: it overrides `draws`.
    """

    @abstractmethod
    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Seconds of each step of a worker, without end."""

    def pace(self, worker: int, seed: int, factor: float = 1.0) -> StepPace:
        """What the steps of one worker take; see `ComputeModel`."""
        return StepPace(self.draws(worker, seed), factor)


@dataclass(frozen=True)
class Constant(StepTimes):
    """Every step takes the same time.

    Leaves out: all that varies. With it a synchronous run loses nothing by waiting, so it shows
    what communication alone costs.

    Args:
        seconds: of a step.

    Raises:
        ConfigError: not positive and finite.

    Example:
        >>> next(Constant(0.1).draws(worker=0, seed=0))
        0.1
    """

    seconds: float

    def __post_init__(self) -> None:
        check_positive(self, seconds=self.seconds)

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """The same time again and again."""
        return repeat(self.seconds)
