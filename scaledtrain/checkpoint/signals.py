"""Signals that ask a run to end: they are taken note of, and the run is saved first."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, ClassVar

from scaledtrain.launching import PREEMPTED

__all__ = ["Preempted", "StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_SECONDS = 2.0  # what comes so soon after the first is the same wish, told by two


class Preempted(SystemExit):
    """A signal ended the run after it had been saved; the process ends with exit code 75.

    Args:
        step: that was saved.

    Attributes:
        step: that was saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED)
        self.step = step


class StopRequest:
    """Inside, SIGTERM, SIGUSR1 and Ctrl-C are only taken note of; a second one does what it did.

    Several may be entered by one process, whose ranks are simulated: they are one.

    Attributes:
        caught: the first signal.
    """

    _entered = 0
    _old: ClassVar[dict[int, Any]] = {}
    _old_fd = -1
    _at = 0.0
    caught: int | None = None

    def __enter__(self) -> StopRequest:
        kind = StopRequest
        self._counts = threading.current_thread() is threading.main_thread()
        if self._counts:
            kind._entered += 1
            if kind._entered == 1:
                kind.caught = None
                kind._old_fd = signal.set_wakeup_fd(-1)  # who listens there would end the process
                kind._old = {number: signal.signal(number, kind._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        kind = StopRequest
        if self._counts:
            kind._entered -= 1
            if kind._entered == 0:
                kind._restore()

    @classmethod
    def _note(cls, number: int, frame: FrameType | None) -> None:
        if cls.caught is None:
            cls.caught, cls._at = number, time.monotonic()
        elif time.monotonic() - cls._at > _SAME_SECONDS:
            cls._restore()
            os.kill(os.getpid(), number)

    @classmethod
    def _restore(cls) -> None:
        for number, handler in cls._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if cls._old_fd != -1:
            signal.set_wakeup_fd(cls._old_fd)
        cls._old, cls._old_fd = {}, -1
