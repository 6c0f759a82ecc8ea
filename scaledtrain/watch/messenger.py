"""The thread of a rank that talks to other ranks while the one that trains is busy, or stuck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch.distributed as dist

__all__ = ["Messenger"]

_LEAVE_SECONDS = 2.0  # for a call under way, when the run has ended


class Messenger:
    """Calls functions again and again, in a thread; they may block, and read and write `Notes`.

    It ends by itself when the job's store has ended.

    Args:
        jobs: called in this order.
        seconds: between two rounds.
    """

    def __init__(self, jobs: Sequence[Callable[[], None]], seconds: float) -> None:
        self._jobs = jobs
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-notes", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._round()
                self._over.wait(self._seconds)
            self._round()
        except (RuntimeError, dist.DistError):  # the process with the store has ended
            return

    def _round(self) -> None:
        for job in self._jobs:
            job()

    def close(self) -> None:
        """End after one more round; a thread that is stuck in a call is left to the process."""
        self._over.set()
        self._thread.join(_LEAVE_SECONDS)
