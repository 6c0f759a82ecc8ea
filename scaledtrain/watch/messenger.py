"""The thread of a rank that talks to other ranks while the one that trains is busy, or stuck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch.distributed as dist

from scaledtrain.comm.notes import Notes

__all__ = ["Messenger"]

_LEAVE_SECONDS = 2.0  # for a call under way, when the run has ended


class Messenger:
    """Calls functions again and again, in a thread; they may block, and read and write `Notes`.

    A lost connection is made again; when the job's store has ended it ends by itself.

    Args:
        notes: that they use.
        jobs: called in this order.
        seconds: between two rounds.
    """

    def __init__(self, notes: Notes, jobs: Sequence[Callable[[], None]], seconds: float) -> None:
        self._notes = notes
        self._jobs = jobs
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-notes", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            if not self._round():
                return
            self._over.wait(self._seconds)
        self._round()

    def _round(self) -> bool:
        """Whether there is still a store."""
        try:
            for job in self._jobs:
                job()
        except (RuntimeError, dist.DistError):
            return self._notes.connect_again()
        return True

    def close(self) -> None:
        """End after one more round; a thread that is stuck in a call is left to the process."""
        self._over.set()
        self._thread.join(_LEAVE_SECONDS)
