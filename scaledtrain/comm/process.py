"""Whether another process of this host is alive."""

from __future__ import annotations

import os
import select
from contextlib import suppress

__all__ = ["Process"]


class Process:
    """Another process of this host, to be asked whether it is alive.

    Args:
        pid: its number, in this process's namespace.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._born = _born(pid)
        self._fd = -1
        with suppress(OSError, AttributeError):  # an old kernel: /proc is asked instead
            self._fd = os.pidfd_open(pid)

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        if self._fd >= 0:
            ended = select.poll()  # a new one each time: threads may not share one
            ended.register(self._fd, select.POLLIN)
            return not ended.poll(0)
        return self._born is not None and _born(self.pid) == self._born

    def close(self) -> None:
        """Give the file descriptor back; `alive` then asks /proc."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _born(pid: int) -> str | None:
    """When a process was started, which tells two of the same number apart; None: not running."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZXx" else started
