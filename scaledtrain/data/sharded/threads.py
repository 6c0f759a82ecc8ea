"""Threads that several iterations share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

__all__ = ["Threads"]


class Threads:
    """Threads that several iterations share, and that are there only while there is one.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()
        self._users = 0
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @contextmanager
    def running(self) -> Iterator[ThreadPoolExecutor]:
        """The threads, for an iteration."""
        if self._process != os.getpid():  # it was forked, without the parent's threads
            self.__init__(self.count)  # type: ignore[misc]
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="sharded-loader")
            self._users += 1
            pool = self._pool
        try:
            yield pool
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._pool = None
                    pool.shutdown(wait=False)
