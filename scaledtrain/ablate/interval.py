"""The mean of a few differences, with its error bar."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Interval", "t_quantile"]

_CONFIDENCE = 0.95
_STEPS = 100  # of the bisection


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its 95 % t-interval (infinite for a single value)."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of values that were drawn independently.

        Example:
            >>> interval = Interval.of([1.0, 2.0, 3.0])  # 4.303 x 1 / sqrt(3)
            >>> f"{interval.mean} ± {interval.half_width:.2f}", interval.holds_zero
            ('2.0 ± 2.48', True)
        """
        mean, n = statistics.fmean(values), len(values)
        if n == 1:
            return cls(mean, math.inf)
        deviation = statistics.stdev(values)
        return cls(mean, t_quantile((1 + _CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n))

    @property
    def holds_zero(self) -> bool:
        """Whether there may be no difference."""
        return abs(self.mean) <= self.half_width


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t is below with this probability, at least 0.5."""
    low, high = 0.0, 1.0
    while _t_below(high, degrees) < probability:
        high *= 2.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _t_below(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_below(t: float, degrees: int) -> float:
    """Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    term = total = math.cos(angle) if degrees % 2 else 1.0
    for k in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if degrees % 2:
        total = 0.0 if degrees == 1 else total
        within = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        within = math.sin(angle) * total
    return (1 + within) / 2
