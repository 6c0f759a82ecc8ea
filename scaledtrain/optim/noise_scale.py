"""How noisy gradients are, from their norms: the gradient noise scale. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaledtrain.errors import ConfigError

__all__ = ["GradientNoise", "SmoothedNoise", "gradient_noise"]


@dataclass(frozen=True)
class GradientNoise:
    r"""Signal and noise of a gradient: one sample's has the mean G and the covariance Sigma.

    Attributes:
        squared_norm: \|G\|^2; an estimate of it may be negative.
        variance: S = tr(Sigma), that of a single sample's gradient, all components together.
        undefined: why there is no estimate, and both are nan; empty where there is one.
    """

    squared_norm: float = math.nan
    variance: float = math.nan
    undefined: str = ""

    @property
    def scale(self) -> float:
        r"""The simple noise scale S / \|G\|^2, in samples; nan where ``no_scale`` says why."""
        return math.nan if self.no_scale else self.variance / self.squared_norm

    @property
    def no_scale(self) -> str:
        """Why ``scale`` is nan; empty where it is a number."""
        if self.undefined:
            return self.undefined
        if not self.squared_norm > 0:
            return (
                f"the squared norm of the true gradient was estimated as {self.squared_norm:.3g}, "
                "which is not positive: the batches are too small to tell it from noise, or "
                "training has converged; smooth over more measurements, or use larger batches"
            )
        return ""


def gradient_noise(
    sizes: Sequence[float], squared_norms: Sequence[float], combined: float
) -> GradientNoise:
    r"""Estimate signal and noise from the gradients of batches and that of all their samples.

    With \|g_i\|^2 of batches of n_i samples and \|g\|^2 of g = sum_i n_i g_i / N, N = sum_i n_i, of
    all k of them that have samples::

        S = (sum_i n_i |g_i|^2 - N |g|^2) / (k - 1)        |G|^2 = |g|^2 - S / N

    Both are unbiased, whatever the sizes: E\|g_i\|^2 = \|G\|^2 + S / n_i, so that
    E[sum_i n_i \|g_i\|^2] = N \|G\|^2 + k S, and E[N \|g\|^2] = N \|G\|^2 + S. With equal sizes
    they are McCandlish's, with sum_i \|g_i\|^2 / k for the small batch. S, the variance between
    batches as in an analysis of variance, is never negative.

    Args:
        sizes: n_i; batches of 0 samples count for nothing.
        squared_norms: \|g_i\|^2, each of the gradient of the mean loss over its batch.
        combined: \|g\|^2.

    Returns:
        The estimate; undefined if there are fewer than two batches, or a norm is not finite.

    Example:
        >>> gradient_noise([2, 2], [10.0, 6.0], 5.0)  # S = (2 * 10 + 2 * 6 - 4 * 5) / 1
        GradientNoise(squared_norm=2.0, variance=12.0, undefined='')

    References:
        McCandlish et al. 2018, An Empirical Model of Large-Batch Training, arXiv 1812.06162,
        appendix A.
    """
    pairs = [(n, square) for n, square in zip(sizes, squared_norms, strict=True) if n > 0]
    if len(pairs) < 2:
        return GradientNoise(
            undefined=f"a noise scale compares two batches of a step or more, and there "
            f"{'is 1' if pairs else 'are 0'}: train with several replicas in step, or with "
            "gradient accumulation"
        )
    if not all(math.isfinite(square) for square in (combined, *(square for _, square in pairs))):
        return GradientNoise(undefined="a gradient was not finite")
    total = sum(n for n, _ in pairs)
    between = math.fsum(n * square for n, square in pairs) - total * combined
    variance = max(0.0, between) / (len(pairs) - 1)  # below 0 it is rounding
    return GradientNoise(combined - variance / total, variance)


class SmoothedNoise:
    r"""Moving averages of S and of \|G\|^2, each by itself, corrected for their start at zero.

        m_t = d m_(t-1) + (1 - d) x_t        average = m_t / (1 - d^t)

    The ratio of two averages is what is wanted: that of two single estimates is far off on average,
    since a small \|G\|^2 by chance makes it huge.

    Args:
        smoothing: d, in [0, 1); 0 keeps only the last measurement. The average is over about
            1 / (1 - d) of them.

    Raises:
        ConfigError: a value out of its range.

    Example:
        >>> smoothed = SmoothedNoise(0.5)
        >>> for variance in (4.0, 1.0):
        ...     smoothed.add(GradientNoise(1.0, variance))
        >>> smoothed.noise.variance  # (0.25 * 4 + 0.5 * 1) / (1 - 0.25)
        2.0
    """

    def __init__(self, smoothing: float = 0.9) -> None:
        if not 0 <= smoothing < 1:
            raise ConfigError(
                f"smoothing is {smoothing}; it is the weight of earlier measurements, in [0, 1): "
                "0.9 averages about the last 10"
            )
        self._smoothing = smoothing
        self.clear()

    def clear(self) -> None:
        """Forget all measurements."""
        self._squared_norm = self._variance = self._weight = 0.0
        self._undefined = "nothing has been measured yet"

    def add(self, measured: GradientNoise) -> None:
        """Take in a measurement; one that is undefined changes no average."""
        if measured.undefined:
            self._undefined = measured.undefined
            return
        d = self._smoothing
        self._squared_norm = d * self._squared_norm + (1 - d) * measured.squared_norm
        self._variance = d * self._variance + (1 - d) * measured.variance
        self._weight = d * self._weight + (1 - d)

    @property
    def noise(self) -> GradientNoise:
        """The averages; undefined as long as there is no measurement."""
        if not self._weight:
            return GradientNoise(undefined=self._undefined)
        return GradientNoise(self._squared_norm / self._weight, self._variance / self._weight)

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {
            "squared_norm": self._squared_norm,
            "variance": self._variance,
            "weight": self._weight,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._squared_norm = state["squared_norm"]
        self._variance = state["variance"]
        self._weight = state["weight"]
