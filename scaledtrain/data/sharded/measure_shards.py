"""Measures whole shards, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice

import numpy as np

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.dataset import ShardedDataset
from scaledtrain.data.sharded.measure import Measure
from scaledtrain.data.sharded.statistics import ColumnStatistics
from scaledtrain.errors import DataError
from scaledtrain.seeding import one_thread

__all__ = ["Parts", "measured"]

BATCH_BYTES = 16 * 2**20

Parts = dict[str, ColumnStatistics]


@contextmanager
def measured(
    dataset: ShardedDataset, measures: tuple[Measure, ...], shards: range, workers: int
) -> Iterator[Iterator[Parts]]:
    """The statistics of shards, in their order; while the context lasts there are processes.

    Args:
        dataset: whose shards; its columns are those that are measured.
        measures: of each of them.
        shards: their numbers.
        workers: processes; 0: this one measures each shard when it is asked for.

    Raises:
        DataError: (while iterating) a shard is damaged or cannot be measured, or a worker died.
    """
    if not workers:
        with one_thread():
            yield (_of_shard(dataset, measures, shard) for shard in shards)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        yield _in_order(pool, dataset, measures, shards, 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor,
    dataset: ShardedDataset,
    measures: tuple[Measure, ...],
    shards: range,
    most: int,
) -> Iterator[Parts]:
    """At most so many are under way or wait to be merged."""
    numbers = iter(shards)
    ahead: deque[Future[Parts]] = deque()
    columns = tuple(dataset.columns)
    try:
        while True:
            for shard in islice(numbers, most - len(ahead)):
                ahead.append(pool.submit(_in_worker, str(dataset.folder), columns, measures, shard))
            if not ahead:
                return
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that read {dataset.folder} died; if it was ended for the memory it took, "
            "give fewer workers"
        ) from error


def _begin_worker() -> None:
    """A worker ends with the process that started it, and leaves Ctrl-C to it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # what is to be told, the parent has told

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_worker(
    folder: str, columns: tuple[str, ...], measures: tuple[Measure, ...], shard: int
) -> Parts:
    with one_thread():
        return _of_shard(_open(folder, columns), measures, shard)


@lru_cache(1)
def _open(folder: str, columns: tuple[str, ...]) -> ShardedDataset:
    """A worker opens the data set once."""
    return ShardedDataset(folder, columns)


def _of_shard(dataset: ShardedDataset, measures: tuple[Measure, ...], shard: int) -> Parts:
    info = dataset.manifest.shards[shard]
    start, stop = (int(place) for place in dataset.starts[shard : shard + 2])
    size = max(1, int(BATCH_BYTES / max(1.0, info.bytes / info.samples)))
    found: Parts = {}
    for low in range(start, stop, size):
        batch, _ = dataset.gather(np.arange(low, min(low + size, stop)), read_ahead=True)
        for measure in measures:
            values = batch[measure.name]
            try:
                part = measure.of(values.values if isinstance(values, Ragged) else values)
            except DataError as error:
                raise DataError(f"shard {info.file} of {dataset.folder}: {error}") from error
            before = found.get(measure.name)
            found[measure.name] = part if before is None else before.merge(part)
    return found
