"""How fast a worker is all the time: a factor that the times of its steps are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from scaledtrain.errors import ConfigError
from scaledtrain.sim.compute import check_positive
from scaledtrain.sim.streams import generator

__all__ = ["LogNormalSpeeds", "ParetoSpeeds", "SlowWorkers", "Speeds", "SquareRootSpeeds"]


class Speeds(Protocol):
    """Persistent differences between workers; they compose with any compute model."""

    def factor(self, worker: int, seed: int) -> float:
        """How many times longer everything takes this worker; the same whenever it is asked."""


@dataclass(frozen=True)
class SlowWorkers:
    """Some workers are slower, or faster, by a given factor; all others are as the model says.

    Leaves out: everything but the workers that are named.

    Args:
        factors: worker -> how many times longer its steps take (4.0: a straggler, four times
            slower; 0.5: twice as fast). A worker that a run does not have is ignored.

    Raises:
        ConfigError: a factor that is not positive and finite.

    Example:
        >>> straggler = SlowWorkers({3: 4.0})
        >>> [straggler.factor(worker, seed=0) for worker in range(5)]
        [1.0, 1.0, 1.0, 4.0, 1.0]
    """

    factors: Mapping[int, float]

    def __post_init__(self) -> None:
        for worker, factor in self.factors.items():
            if not 0 < factor < math.inf:
                raise ConfigError(
                    f"the factor of worker {worker} is {factor}; it must be positive and finite "
                    "(4.0 makes it four times slower)"
                )

    def factor(self, worker: int, seed: int) -> float:
        """The given factor, or 1."""
        return self.factors.get(worker, 1.0)


@dataclass(frozen=True)
class SquareRootSpeeds:
    """Worker i, from 0, takes 1 + sqrt(i) times longer: a fleet with a long tail of slow workers.

    The rates of n workers add up to sum 1 / (1 + sqrt(i)), about 2 sqrt(n), where n equal ones
    have n; those who wait for all go at the rate of n workers divided by 1 + sqrt(n - 1).

    Leaves out: chance; the fastest is always worker 0.

    Example:
        >>> [SquareRootSpeeds().factor(worker, seed=0) for worker in (0, 1, 4, 9)]
        [1.0, 2.0, 3.0, 4.0]
    """

    def factor(self, worker: int, seed: int) -> float:
        """1 + sqrt(worker)."""
        return 1.0 + math.sqrt(worker)


@dataclass(frozen=True)
class LogNormalSpeeds:
    """Factor exp(sigma z), z standard normal, drawn once for each worker; its median is 1.

    Leaves out: workers of a few kinds, as hardware generations are.

    Args:
        sigma: standard deviation of the logarithm; 0.5: two thirds lie between 0.61 and 1.65.

    Raises:
        ConfigError: sigma is not positive and finite.

    Example:
        >>> speeds = LogNormalSpeeds(sigma=0.5)
        >>> speeds.factor(7, seed=0) == speeds.factor(7, seed=0) != speeds.factor(8, seed=0)
        True
    """

    sigma: float

    def __post_init__(self) -> None:
        check_positive(self, sigma=self.sigma)

    def factor(self, worker: int, seed: int) -> float:
        """This worker's factor."""
        return float(generator(seed, worker, "speed").lognormal(0.0, self.sigma))


@dataclass(frozen=True)
class ParetoSpeeds:
    """Factor f >= 1 with P(f > x) = x^-alpha, drawn once for each worker: a few are very slow.

    Its median is 2^(1 / alpha), its mean alpha / (alpha - 1), infinite for alpha <= 1.

    Leaves out: workers that are faster than the model's times.

    Args:
        alpha: the smaller, the slower are the slowest.

    Raises:
        ConfigError: alpha is not positive and finite.

    Example:
        >>> all(ParetoSpeeds(alpha=2.0).factor(worker, seed=0) >= 1.0 for worker in range(100))
        True
    """

    alpha: float

    def __post_init__(self) -> None:
        check_positive(self, alpha=self.alpha)

    def factor(self, worker: int, seed: int) -> float:
        """This worker's factor."""
        return 1.0 + float(generator(seed, worker, "speed").pareto(self.alpha))
