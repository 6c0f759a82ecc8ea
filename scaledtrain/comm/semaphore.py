"""POSIX semaphores of the C library, in memory that processes share."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Semaphore", "available"]


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Library(NamedTuple):
    """The semaphores of the C library.

    What returns at once is called with the GIL held (PyDLL): letting it go costs more than the
    call, and a busy thread beside would keep it for 5 ms. What may sleep lets it go (CDLL).
    """

    init: Any
    post: Any
    try_wait: Any
    timed_wait: Any
    clock: int


def _load() -> _Library | None:
    if sys.platform != "linux":
        return None
    try:
        _ = os.memfd_create, os.sched_getaffinity
        held, released = ctypes.PyDLL(None), ctypes.CDLL(None, use_errno=True)
        init, post, try_wait = held.sem_init, held.sem_post, held.sem_trywait
        try:
            timed_wait, clock = released.sem_clockwait, time.CLOCK_MONOTONIC
            timed_wait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_TimeSpec)]
        except AttributeError:  # before glibc 2.30: only the clock that may be set
            timed_wait, clock = released.sem_timedwait, time.CLOCK_REALTIME
            timed_wait.argtypes = [ctypes.c_void_p, ctypes.POINTER(_TimeSpec)]
    except (OSError, AttributeError):
        return None
    init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    post.argtypes = try_wait.argtypes = [ctypes.c_void_p]
    return _Library(init, post, try_wait, timed_wait, clock)


_LIBRARY = _load()


def available() -> bool:
    """Whether this host can share memory this way: Linux with memfd and POSIX semaphores."""
    return _LIBRARY is not None


class Semaphore:
    """A POSIX semaphore in shared memory: what was written before `post` is read after a wait.

    Args:
        memory: the mapping it lies in, kept for as long as the semaphore is.
        address: where it lies, in this process.
    """

    __slots__ = ("_address", "_library", "_memory")

    def __init__(self, memory: Tensor, address: int) -> None:
        assert _LIBRARY is not None
        self._memory = memory
        self._address = address
        self._library = _LIBRARY

    def initialize(self) -> None:
        """Make it one of value 0, for all processes; once, by the creator of the memory."""
        if self._library.init(self._address, 1, 0) != 0:
            raise OSError("sem_init failed")

    def post(self) -> None:
        """Add one; wakes one that waits."""
        self._library.post(self._address)

    def try_wait(self) -> bool:
        """Take one if there is one; never sleeps."""
        taken: bool = self._library.try_wait(self._address) == 0
        return taken

    def wait(self, seconds: float) -> bool:
        """Sleep until one could be taken, for ``seconds`` at most, or until a signal comes.

        Other threads run meanwhile, and Python's handlers of signals on return.

        Returns:
            Whether one was taken.
        """
        library = self._library
        at = time.clock_gettime(library.clock) + seconds
        until = _TimeSpec(int(at), int(at % 1.0 * 1e9))
        if library.clock == time.CLOCK_REALTIME:
            taken: bool = library.timed_wait(self._address, until) == 0
        else:
            taken = library.timed_wait(self._address, library.clock, until) == 0
        return taken
