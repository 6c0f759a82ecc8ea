"""Reads batches of a sharded data set in the background, some windows ahead of the loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing
from typing import TypeVar

import numpy as np

from scaledtrain.data.sharded.batching import Batching, Span, indices_of, parts_of
from scaledtrain.data.sharded.dataset import Batch, ShardedDataset
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.data.sharded.mixture import Mixture
from scaledtrain.data.sharded.padding import Padding
from scaledtrain.data.sharded.threads import Threads
from scaledtrain.errors import DataError

__all__ = ["ReadAhead"]

T = TypeVar("T")


class ReadAhead:
    """Threads that bring windows into the page cache, and put batches together from there.

    Args:
        dataset: to read from.
        padding: of its columns.
        memory: batches are put together in.
        threads: that do it.
        part_samples: put together at once.
        windows: that are asked for before they are needed.
        timeout_seconds: the longest to wait for the storage.
    """

    def __init__(
        self,
        dataset: ShardedDataset | Mixture,
        padding: Padding,
        memory: Memory,
        *,
        threads: int,
        part_samples: int,
        windows: int,
        timeout_seconds: float,
    ) -> None:
        self._dataset = dataset
        self._padding = padding
        self._memory = memory
        self._threads = Threads(threads)
        self._part_samples = part_samples
        self._windows = windows
        self._timeout_seconds = timeout_seconds

    def batches(
        self, batching: Batching, epoch: int, windows: Iterator[list[Span | None]]
    ) -> Generator[tuple[Span, Batch | None], None, None]:
        """The batches of these windows, and where they lie in the epoch.

        Args:
            batching: how samples are batched.
            epoch: which.
            windows: what to read, as `Batching.windows` gives it.

        Raises:
            DataError: the storage does not answer.
        """
        ahead: deque[Future[list[tuple[Span, Batch | None]]]] = deque()
        with (
            self._threads.running() as pool,
            closing(self._on_their_way(pool, batching, epoch, windows)) as read,
        ):
            taken = 0
            try:
                for window in read:
                    for part in parts_of(window, self._part_samples):
                        ahead.append(pool.submit(self._read, batching, epoch, part))
                        if len(ahead) > min(taken, self._threads.count):  # the first at once
                            yield from self._wait(ahead.popleft())
                            taken += 1
                while ahead:
                    yield from self._wait(ahead.popleft())
            finally:
                for unread in ahead:
                    unread.cancel()

    def _on_their_way(
        self,
        pool: ThreadPoolExecutor,
        batching: Batching,
        epoch: int,
        windows: Iterator[list[Span | None]],
    ) -> Generator[list[Span | None], None, None]:
        """The windows of an iteration, each on its way into the page cache."""
        asked: deque[tuple[list[Span | None], Future[None]]] = deque()
        # What the next window holds may have to be read, too.
        coming = pool.submit(next, windows, None)
        given = 0
        try:
            while (window := self._wait(coming)) is not None:
                asked.append((window, pool.submit(self._ask, batching, epoch, window)))
                coming = pool.submit(next, windows, None)
                if len(asked) > min(given + 1, self._windows):  # the first is given soon
                    window, job = asked.popleft()
                    self._wait(job)
                    yield window
                    given += 1
            for window, job in asked:
                self._wait(job)
                yield window
        finally:
            coming.cancel()
            for _, job in asked:
                job.cancel()

    def _ask(self, batching: Batching, epoch: int, window: list[Span | None]) -> None:
        self._dataset.read_ahead(indices_of(batching, epoch, window))

    def _read(
        self, batching: Batching, epoch: int, part: list[Span | None]
    ) -> list[tuple[Span, Batch | None]]:
        """The batches of a part of a window."""
        values, kept = self._dataset.gather(indices_of(batching, epoch, part), self._memory)
        spans = [span or (0, 0) for span in part]
        first = np.cumsum([0, *(stop - start for start, stop in spans)])
        before = np.concatenate([[0], np.cumsum(kept)])[first].tolist()
        batches: list[tuple[Span, Batch | None]] = []
        for span, low, high in zip(spans, before, before[1:], strict=False):
            columns = {n: self._padding.cut(n, column, low, high) for n, column in values.items()}
            batches.append((span, self._dataset.form(columns) if high > low else None))
        return batches

    def _wait(self, future: Future[T]) -> T:
        try:
            return future.result(timeout=self._timeout_seconds)
        except FutureTimeoutError as error:
            raise DataError(
                f"no batch came within {self._timeout_seconds:g} s from {self._dataset.folder}: "
                "its storage does not answer; see what is wrong with it, or give a longer "
                "timeout_seconds"
            ) from error
