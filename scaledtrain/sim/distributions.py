"""Step times that follow a distribution: draws of different steps and workers are independent.

None of these models knows causes that slow several workers at the same time, nor slow phases of a
worker that last longer than a step and shorter than the run; what else each leaves out it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scaledtrain.errors import ConfigError
from scaledtrain.sim.compute import StepTimes, check_positive
from scaledtrain.sim.streams import BLOCK, generator

__all__ = ["Gamma", "GammaPerMachine", "LogNormal", "Pareto", "ShiftedExponential"]


@dataclass(frozen=True)
class Gamma(StepTimes):
    """T ~ Gamma(shape, scale = seconds / shape), drawn anew for each step of each worker.

    Mean ``seconds``, standard deviation ``seconds / sqrt(shape)``: the default varies by 10 %.

    Leaves out: machines that are slow all the time (`GammaPerMachine`, or speeds of a cluster).

    Args:
        seconds: mean of a step.
        shape: the larger, the more alike are the times.

    Raises:
        ConfigError: an argument that is not positive and finite.

    References:
        Ali et al. 2000, Task Execution Time Modeling for Heterogeneous Computing Systems.

    Example:
        >>> times = Gamma(seconds=1.0).draws(worker=0, seed=0)
        >>> all(0.5 < next(times) < 1.6 for _ in range(1000))
        True
    """

    seconds: float
    shape: float = 100.0

    def __post_init__(self) -> None:
        check_positive(self, seconds=self.seconds, shape=self.shape)

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Independent gamma distributed times."""
        source, scale = generator(seed, worker, "compute"), self.seconds / self.shape
        while True:
            yield from (source.standard_gamma(self.shape, BLOCK) * scale).tolist()


@dataclass(frozen=True)
class GammaPerMachine(StepTimes):
    """Each machine has a mean, drawn once, and each step varies around it: two gamma levels.

    With V the coefficients of variation (standard deviation / mean)::

        mean of machine i    q_i ~ Gamma(1 / V_machine^2),  E q_i = seconds
        step of machine i    T   ~ Gamma(1 / V_step^2),     E T   = q_i

    Mean ``seconds`` over machines and steps. V_machine = 0.1 are machines of one kind, 0.6 a mixed
    fleet.

    Leaves out: that a machine's mean changes.

    Args:
        seconds: mean of a step over all machines.
        machine_variation: V of the machines' means.
        step_variation: V of the steps of one machine.

    Raises:
        ConfigError: an argument that is not positive and finite.

    References:
        Ali et al. 2000, Task Execution Time Modeling for Heterogeneous Computing Systems; Barkai
        et al. 2020, Gap-Aware Mitigation of Gradient Staleness, arXiv 1909.10802.

    Example:
        >>> times = GammaPerMachine(seconds=1.0, step_variation=1e-9).draws(worker=0, seed=0)
        >>> round(next(times), 6) == round(next(times), 6)  # a machine keeps its mean
        True
    """

    seconds: float
    machine_variation: float = 0.6
    step_variation: float = 0.1

    def __post_init__(self) -> None:
        check_positive(
            self,
            seconds=self.seconds,
            machine_variation=self.machine_variation,
            step_variation=self.step_variation,
        )

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Gamma distributed times around this machine's own mean."""
        source = generator(seed, worker, "compute")
        machines, steps = self.machine_variation**-2, self.step_variation**-2
        mean = source.standard_gamma(machines) * (self.seconds / machines)
        while True:
            yield from (source.standard_gamma(steps, BLOCK) * (mean / steps)).tolist()


@dataclass(frozen=True)
class ShiftedExponential(StepTimes):
    """T = shift + Exp: work that always takes as long, and a delay that forgets how long it lasted.

    Mean ``shift_seconds + mean_delay_seconds``. The k-th fastest of M workers is expected after
    shift + delay (H_M - H_(M-k)), with H_n = 1 + 1/2 + ... + 1/n.

    Leaves out: delays longer than exponential ones (see `Pareto`), and persistent differences.

    Args:
        shift_seconds: the least that a step takes; 0: the times are exponential.
        mean_delay_seconds: mean of the exponential part.

    Raises:
        ConfigError: a negative shift, or a mean that is not positive and finite.

    References:
        Lee et al. 2018, Speeding Up Distributed Machine Learning Using Codes, arXiv 1512.02673.

    Example:
        >>> times = ShiftedExponential(1.0, 0.1).draws(worker=0, seed=0)
        >>> all(next(times) >= 1.0 for _ in range(100))
        True
    """

    shift_seconds: float
    mean_delay_seconds: float

    def __post_init__(self) -> None:
        check_positive(self, mean_delay_seconds=self.mean_delay_seconds)
        if not 0 <= self.shift_seconds < math.inf:
            raise ConfigError(
                f"shift_seconds of ShiftedExponential is {self.shift_seconds}; it must be >= 0 and "
                "finite"
            )

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Independent shifted exponential times."""
        source = generator(seed, worker, "compute")
        while True:
            delays = source.standard_exponential(BLOCK) * self.mean_delay_seconds
            yield from (delays + self.shift_seconds).tolist()


@dataclass(frozen=True)
class LogNormal(StepTimes):
    """T = seconds exp(sigma z - sigma^2 / 2), z standard normal: many small causes that multiply.

    Mean ``seconds``, median ``seconds exp(-sigma^2 / 2)``.

    Leaves out: persistent differences.

    Args:
        seconds: mean of a step.
        sigma: standard deviation of the logarithm.

    Raises:
        ConfigError: an argument that is not positive and finite.

    Example:
        >>> next(LogNormal(1.0, sigma=0.5).draws(worker=0, seed=0)) > 0
        True
    """

    seconds: float
    sigma: float

    def __post_init__(self) -> None:
        check_positive(self, seconds=self.seconds, sigma=self.sigma)

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Independent lognormal times."""
        source = generator(seed, worker, "compute")
        mu = math.log(self.seconds) - self.sigma**2 / 2
        while True:
            yield from source.lognormal(mu, self.sigma, BLOCK).tolist()


@dataclass(frozen=True)
class Pareto(StepTimes):
    """P(T > t) = (min_seconds / t)^alpha: rare steps that take very long.

    Mean ``min_seconds alpha / (alpha - 1)``, infinite for alpha <= 1; the variance is infinite for
    alpha <= 2. Grids and volunteers are like that with alpha of 1.5 to 2.5.

    Leaves out: persistent differences, and any limit after which somebody gives up.

    Args:
        min_seconds: the least that a step takes.
        alpha: the smaller, the heavier the tail.

    Raises:
        ConfigError: an argument that is not positive and finite.

    Example:
        >>> times = Pareto(min_seconds=2.0, alpha=1.5).draws(worker=0, seed=0)
        >>> all(next(times) >= 2.0 for _ in range(100))
        True
    """

    min_seconds: float
    alpha: float

    def __post_init__(self) -> None:
        check_positive(self, min_seconds=self.min_seconds, alpha=self.alpha)

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Independent Pareto distributed times."""
        source = generator(seed, worker, "compute")
        while True:
            yield from ((source.pareto(self.alpha, BLOCK) + 1.0) * self.min_seconds).tolist()
