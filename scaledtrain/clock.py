"""The clock by which a rank computes, waits and records: the host's, or a simulated one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Clock", "HostClock"]

_NAP_SECONDS = 0.005


class Clock(Protocol):
    """Tells the time, and lets it pass."""

    def now(self) -> float:
        """Seconds since some moment in the past; it never goes back."""

    def sleep_until(self, moment: float, abandon: Callable[[], bool] | None = None) -> bool:
        """Return at that moment, or as soon as ``abandon`` is true.

        Args:
            moment: as `now` counts; one that has passed is no reason to wait.
            abandon: asked every few milliseconds; None: nothing ends the sleep early.

        Returns:
            Whether the moment has come.
        """


class HostClock:
    """The monotonic clock of the host.

    Example:
        >>> clock = HostClock()
        >>> moment = clock.now() + 0.01
        >>> clock.sleep_until(moment), clock.now() >= moment
        (True, True)
        >>> clock.sleep_until(moment + 60.0, abandon=lambda: True)
        False
    """

    now: Callable[[], float] = staticmethod(time.perf_counter)

    def sleep_until(self, moment: float, abandon: Callable[[], bool] | None = None) -> bool:
        """Sleep; with ``abandon`` in naps of 5 ms."""
        while (left := moment - time.perf_counter()) > 0:
            if abandon is None:
                time.sleep(left)
            elif abandon():
                return False
            else:
                time.sleep(min(left, _NAP_SECONDS))
        return True
