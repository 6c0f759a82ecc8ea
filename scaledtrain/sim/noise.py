"""Delays that are drawn for every microbatch, not for a whole step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scaledtrain.sim.compute import StepPace, StepTimes, check_positive
from scaledtrain.sim.streams import BLOCK, generator

__all__ = ["MicrobatchNoise"]


@dataclass(frozen=True)
class MicrobatchNoise:
    """Every microbatch is delayed by a bounded lognormal part of what it takes without.

    A microbatch of t seconds takes t (1 + e), with z standard normal::

        e = min(mean_noise exp(sigma z - sigma^2 / 2), max_noise)

    so e without its bound has the mean ``mean_noise``. With m = mean_noise, s = sigma,
    c = max_noise and Phi the standard normal distribution function::

        E e = m Phi((log(c / m) - s^2 / 2) / s) + c Phi((log(m / c) - s^2 / 2) / s)

    That is the delay which DropCompute is made for: a step of many microbatches is nearly always
    late by about E e, and now and then a few of them are late by a lot. The authors draw from
    LogNormal(4, 1), relative to its mean: sigma = 1.

    Leaves out: delays that last longer than a microbatch, and those of several workers at once.

    Args:
        base: what a step takes without noise.
        mean_noise: mean of e if it had no bound (0.5: half as long again).
        max_noise: bound of e.
        sigma: standard deviation of the logarithm.

    Raises:
        ConfigError: an argument that is not positive and finite.

    References:
        Giladi et al. 2023, DropCompute, arXiv 2306.10598, and its authors' code.

    Example:
        >>> from scaledtrain.sim.compute import Constant
        >>> pace = MicrobatchNoise(Constant(1.0), mean_noise=0.5, max_noise=5.5).pace(0, seed=0)
        >>> pace.begin_step()
        >>> all(0.25 < pace.seconds(0.0, 0.25) <= 0.25 * 6.5 for _ in range(100))
        True
    """

    base: StepTimes
    mean_noise: float
    max_noise: float
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, mean_noise=self.mean_noise, max_noise=self.max_noise, sigma=self.sigma)

    def pace(self, worker: int, seed: int, factor: float = 1.0) -> StepPace:
        """What the microbatches of one worker take; ``factor`` multiplies the noise, too."""
        return _NoisyPace(self.base.draws(worker, seed), factor, self._multiples(worker, seed))

    def _multiples(self, worker: int, seed: int) -> Iterator[float]:
        source = generator(seed, worker, "noise")
        mu = math.log(self.mean_noise) - self.sigma**2 / 2
        while True:
            for noise in source.lognormal(mu, self.sigma, BLOCK).tolist():
                yield 1.0 + min(noise, self.max_noise)


class _NoisyPace(StepPace):
    __slots__ = ("_multiples",)

    def __init__(self, draws: Iterator[float], factor: float, multiples: Iterator[float]) -> None:
        super().__init__(draws, factor)
        self._multiples = multiples

    def seconds(self, elapsed: float, share: float) -> float:
        return max(elapsed, self._step * share * next(self._multiples))
