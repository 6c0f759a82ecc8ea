"""Whether a loss is far above what the last ones were."""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["LossHistory"]

_FEWEST = 20  # losses, before which none is judged
_NORMAL = 1.4826  # of a normal distribution: standard deviation / median distance from the median
_LEAST = 0.01  # of the median: where losses hardly vary, a little more is no spike


class LossHistory:
    r"""The losses of the last steps, and how far from them a loss is.

    With the median m of the window and d the median of their distances from m, a loss l is
    (l - m) / max(1.4826 d, 0.01 |m|) deviations above them. Both medians are what they are as long
    as less than half of the window is outliers.

    Args:
        window: how many are kept.
        sigmas: above which deviation a loss is a spike.

    Example:
        >>> history = LossHistory(window=100, sigmas=8.0)
        >>> for i in range(20):  # m = 2.0, d = 0.1: deviations of 0.148
        ...     history.add(2.0 + (0.1 if i % 2 else -0.1))
        >>> history.is_spike(3.1), history.is_spike(3.3)  # 7.4 and 8.8 of them
        (False, True)
    """

    def __init__(self, window: int, sigmas: float) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._sigmas = sigmas

    def add(self, loss: float) -> None:
        """Take note of a loss that is in order."""
        self._losses.append(loss)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss, finite, is one."""
        deviations = self.deviations(loss)
        return deviations is not None and deviations > self._sigmas

    def deviations(self, loss: float) -> float | None:
        """How far it is above the window; None before there are twenty losses."""
        if len(self._losses) < _FEWEST:
            return None
        median = statistics.median(self._losses)
        distance = statistics.median(abs(each - median) for each in self._losses)
        scale = max(_NORMAL * distance, _LEAST * abs(median))
        return (loss - median) / scale if scale > 0 else 0.0

    def forget(self) -> None:
        """Begin anew: what comes now is of other parameters."""
        self._losses.clear()
