"""One pass over the shards of a data set, by processes and ranks, for its statistics."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.columns import Column
from scaledtrain.data.sharded.dataset import ShardedDataset
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.measure import Axis, Measure, kept_dims
from scaledtrain.data.sharded.statistics import ColumnStatistics, Statistics
from scaledtrain.data.sharded.writer import take_folder
from scaledtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from scaledtrain.comm.protocols import Group

__all__ = ["compute_statistics"]

BATCH_BYTES = 16 * 2**20

Parts = dict[str, ColumnStatistics]


def compute_statistics(
    folder: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    axis: Axis | Mapping[str, Axis] = 0,
    bins: int = 64,
    covariance: Collection[str] = (),
    classes: Collection[str] = (),
    missing: Literal["raise", "ignore"] = "raise",
    sentinels: Mapping[str, float] | None = None,
    workers: int = 0,
    group: Group | None = None,
    save: bool = True,
    on_shard: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Compute statistics of a data set's columns in one pass, and store them in its manifest.

    Count, mean, variance, least and largest value, and a histogram (see `Histogram`, which needs
    no second pass), all in float64 (whole numbers beyond 2^53 are rounded); of a ragged column,
    over the values of all samples. The result is the same, bit for bit, whatever ``workers`` and
    the number of ranks are: the statistics of shards are merged in the order of the shards.

    In memory are, for each process, some 16 MiB of samples, or one sample if it is larger, and the
    statistics of a few shards. The manifest is replaced when all is computed; a crash before that
    changes nothing. Statistics of other columns stay, if they are of the same shards.

    Args:
        folder: of the data set.
        columns: which; None: all.
        axis: the dims of a sample's value that are kept: each of their indices is a feature with
            statistics of its own. 0: of a vector ``[d]`` each element, of an image
            ``[channels, height, width]`` each channel (-1 where channels are last); None: one for
            all values; ``(0, 1, 2)``: each pixel of each channel. A mapping says it by column; 0
            is for those that it does not name. A column of single numbers has one feature anyway.
        bins: of the histogram of each feature; 0: none.
        covariance: columns of which the covariance of all features with each other is computed, as
            whitening needs it; over samples (pixels, where dims are not kept) without a missing
            value. It takes 8 features^2 bytes, at most 128 MiB, and about as many in the manifest.
        classes: columns of whole numbers whose values are counted one by one.
        missing: what a missing value does: ``"raise"``: DataError; ``"ignore"``: it is counted and
            left out. NaN is missing ...
        sentinels: ... and, of these columns, this number, too.
        workers: processes that read; 0: only this one. With some, the main module of the program
            must be importable without doing anything (``if __name__ == "__main__":``).
        group: of the ranks that share the work, all of which call this with the same arguments; the
            first one writes the manifest. None: this process alone.
        save: store them in the manifest; else they are only returned, for
            ``ShardedDataset(..., statistics=)``.
        on_shard: called as ``on_shard(done, shards)`` whenever a shard has been merged.

    Returns:
        Those of these columns.

    Raises:
        ConfigError: no such column, an axis or a histogram that it cannot have, or a writer is at
            work on the data set.
        DataError: a shard is damaged, has a missing value that must not be or an infinite one, or
            a worker died.

    Example:
        >>> import tempfile
        >>> from scaledtrain.data.sharded import ShardWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ShardWriter(folder.name, shard_samples=2) as writer:
        ...     writer.write_batch({"x": [[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], "y": [0, 1, 0]})
        >>> found = compute_statistics(folder.name, classes=["y"])
        >>> found["x"].mean, found["x"].variance  # (4 + 1 + 9) / 3
        (array([3., 5.]), array([4.66666667, 0.        ]))
        >>> found["y"].class_counts
        {0: 2, 1: 1}
        >>> ShardedDataset(folder.name, normalize={"x": "standardize"})[2]["x"]
        tensor([1.3887, 0.0000])
        >>> folder.cleanup()
    """
    if missing not in ("raise", "ignore"):
        raise ConfigError(f"missing is {missing!r}; it is 'raise' or 'ignore'")
    if workers < 0:
        raise ConfigError(f"workers is {workers}; it is a whole number >= 0")
    dataset = ShardedDataset(folder, columns)
    asked = {"covariance": covariance, "classes": classes, "sentinels": sentinels or ()}
    if isinstance(axis, Mapping):
        asked["axis"] = axis
    for option, names in asked.items():
        if isinstance(names, str) or (unknown := set(names) - dataset.columns.keys()):
            given = names if isinstance(names, str) else ", ".join(sorted(unknown))
            raise ConfigError(
                f"{option} names {given!r}; it is a collection of columns that statistics are "
                f"computed of: {', '.join(dataset.columns)}"
            )
    measures = tuple(
        Measure(
            name,
            column,
            _axis(name, column, axis),
            bins,
            name in covariance,
            name in classes,
            (sentinels or {}).get(name),
            missing == "raise",
        )
        for name, column in dataset.columns.items()
    )
    if not len(dataset):
        raise ConfigError(f"the data set in {folder} has no samples, and so no statistics")
    locks: list[int] = []

    def begin() -> bytes:
        if save:
            locks.append(take_folder(dataset.folder))
        return b"ready"

    def end() -> bytes:
        if save:
            _save(dataset, computed)
        return b"saved"

    try:
        _on_first(group, begin)
        found = _merged(dataset, measures, workers, group, on_shard)
        computed = Statistics(len(dataset), len(dataset.manifest.shards), found)
        _on_first(group, end)
    finally:
        for lock in locks:
            os.close(lock)
    return computed


def _axis(name: str, column: Column, axis: Axis | Mapping[str, Axis]) -> tuple[int, ...]:
    if not isinstance(axis, Mapping):  # of all columns, also of those without dims
        return kept_dims(name, column, axis) if column.shape else ()
    if name in axis:
        return kept_dims(name, column, axis[name])
    return (0,) if column.shape else ()


def _merged(
    dataset: ShardedDataset,
    measures: tuple[Measure, ...],
    workers: int,
    group: Group | None,
    on_shard: Callable[[int, int], None] | None,
) -> Parts:
    """The statistics of all shards, on every rank.

    Rank r of R measures shards r, r + R, ... and sends each one's statistics to the others when it
    is its turn, so that all merge all of them in the same order.
    """
    rank, ranks = (0, 1) if group is None else (group.rank, group.size)
    total = len(dataset.manifest.shards)
    found: Parts | None = None
    with _own(dataset, measures, range(rank, total, ranks), workers) as own:
        for shard in range(total):
            if group is None:
                part = next(own)
            elif shard % ranks == rank:
                part = _from_bytes(_tell(group, rank, lambda: _to_bytes(next(own))))
            else:
                part = _from_bytes(_tell(group, shard % ranks, None))
            if found is None:
                found = part
            else:
                found = {name: found[name].merge(part[name]) for name in found}
            if on_shard is not None:
                on_shard(shard + 1, total)
    assert found is not None
    return found


@contextmanager
def _own(
    dataset: ShardedDataset, measures: tuple[Measure, ...], shards: range, workers: int
) -> Iterator[Iterator[Parts]]:
    """The statistics of these shards, in their order."""
    if not workers:
        with _one_thread():
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
    with _one_thread():
        return _of_shard(_open(folder, columns), measures, shard)


@lru_cache(1)
def _open(folder: str, columns: tuple[str, ...]) -> ShardedDataset:
    """A worker opens the data set once."""
    return ShardedDataset(folder, columns)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The bits of a product of matrices depend on how many threads make it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _to_bytes(parts: Parts) -> bytes:
    return json.dumps({name: part.to_json() for name, part in parts.items()}).encode()


def _from_bytes(content: bytes) -> Parts:
    return {n: ColumnStatistics.from_json(told) for n, told in json.loads(content).items()}


def _tell(group: Group, src: int, make: Callable[[], bytes] | None) -> bytes:
    """What rank ``src`` makes, or an error on all ranks if it cannot."""
    content, failed, own_error = b"", 0, None
    if group.rank == src:
        assert make is not None
        try:
            content = make()
        except (ConfigError, DataError) as error:
            content, failed, own_error = str(error).encode(), 1, error
    head = torch.tensor([len(content), failed])
    group.broadcast([head], src)
    size, failed = (int(number) for number in head)
    told = torch.frombuffer(bytearray(content or bytes(size)), dtype=torch.uint8)
    if size:
        group.broadcast([told], src)
    if own_error is not None:
        raise own_error
    content = told.numpy().tobytes()
    if failed:
        raise DataError(f"rank {src}: {content.decode()}")
    return content


def _on_first(group: Group | None, do: Callable[[], bytes]) -> None:
    """Do something on the first rank, while the others wait for its end."""
    if group is None:
        do()
    else:
        _tell(group, 0, do if group.rank == 0 else None)


def _save(dataset: ShardedDataset, computed: Statistics) -> None:
    try:
        manifest = Manifest.load(dataset.folder)
        if manifest.shards != dataset.manifest.shards:
            raise ConfigError(
                f"the data set in {dataset.folder} was written to while its statistics were "
                "computed; let the writer end, and compute them again"
            )
        old = manifest.statistics
        kept = old.columns if old is not None and not manifest.stale else {}
        statistics = replace(computed, columns={**kept, **computed.columns})
        replace(manifest, statistics=statistics).save(dataset.folder)
    except OSError as error:
        raise DataError(
            f"the statistics cannot be stored in {dataset.folder}: {error}; give save=False if "
            "nobody can write there, and hand on what is returned"
        ) from error
