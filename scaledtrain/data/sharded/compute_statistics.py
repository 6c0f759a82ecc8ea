"""One pass over the shards of a data set, by processes and ranks, for its statistics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from scaledtrain.data.sharded.columns import Column
from scaledtrain.data.sharded.dataset import ShardedDataset
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.measure import Axis, Measure, kept_dims
from scaledtrain.data.sharded.measure_shards import Parts, measured
from scaledtrain.data.sharded.statistics import ColumnStatistics, Statistics
from scaledtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from scaledtrain.comm.protocols import Group

__all__ = ["compute_statistics"]


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
    if not len(dataset):
        raise ConfigError(f"the data set in {folder} has no samples, and so no statistics")
    sentinels = sentinels or {}
    by_column = {"covariance": covariance, "classes": classes, "sentinels": sentinels}
    if isinstance(axis, Mapping):
        by_column["axis"] = axis
    _check_names(by_column, dataset.columns)
    measures = tuple(
        Measure(
            name,
            column,
            _axis(name, column, axis),
            bins,
            name in covariance,
            name in classes,
            sentinels.get(name),
            missing == "raise",
        )
        for name, column in dataset.columns.items()
    )
    with ExitStack() as lock:
        if save:
            _on_first(group, lambda: lock.callback(dataset.folder.lock()))
        found = _merged(dataset, measures, workers, group, on_shard)
        computed = Statistics(len(dataset), len(dataset.manifest.shards), found)
        if save:
            _on_first(group, lambda: _save(dataset, computed))
    return computed


def _check_names(by_column: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
    for option, names in by_column.items():
        unknown = [names] if isinstance(names, str) else sorted(set(names) - set(columns))
        if unknown:
            raise ConfigError(
                f"{option} names {', '.join(map(repr, unknown))}; it is a collection of columns "
                f"that statistics are computed of: {', '.join(columns)}"
            )


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

    Rank r of R measures shards r, r + R, ...: of each R shards every rank one at the same time.
    Then each tells the others what it found, so that all merge all of them in the same order.
    """
    rank, ranks = (0, 1) if group is None else (group.rank, group.size)
    total = len(dataset.manifest.shards)
    found: Parts | None = None
    with measured(dataset, measures, range(rank, total, ranks), workers) as own:
        for shard in range(total):
            if group is None:
                part = next(own)
            else:
                if shard % ranks == 0:
                    mine = _outcome(lambda: _to_bytes(next(own, {})))
                part = _from_bytes(_tell(group, shard % ranks, mine))
            if found is None:
                found = part
            else:
                found = {name: found[name].merge(part[name]) for name in found}
            if on_shard is not None:
                on_shard(shard + 1, total)
    assert found is not None
    return found


def _to_bytes(parts: Parts) -> bytes:
    return json.dumps({name: part.to_json() for name, part in parts.items()}).encode()


def _from_bytes(content: bytes) -> Parts:
    return {n: ColumnStatistics.from_json(told) for n, told in json.loads(content).items()}


def _outcome(make: Callable[[], bytes]) -> bytes | ConfigError | DataError:
    """What is made, or why it cannot be: until its turn comes, a rank keeps its errors."""
    try:
        return make()
    except (ConfigError, DataError) as error:
        return error


def _tell(group: Group, src: int, mine: bytes | ConfigError | DataError) -> bytes:
    """What rank ``src`` made, on all ranks; or its error."""
    failed = isinstance(mine, Exception)
    content = str(mine).encode() if isinstance(mine, Exception) else mine
    head = torch.tensor([len(content), int(failed)])
    group.broadcast([head], src)
    size, failed = int(head[0]), bool(head[1])
    told = torch.zeros(size, dtype=torch.uint8)
    if group.rank == src:
        told = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    group.broadcast([told], src)
    if failed and isinstance(mine, Exception) and group.rank == src:
        raise mine
    if failed:
        raise DataError(f"rank {src}: {told.numpy().tobytes().decode()}")
    return told.numpy().tobytes()


def _on_first(group: Group | None, do: Callable[[], object]) -> None:
    """Do something on the first rank, while the others wait for its end."""
    if group is None:
        do()
        return
    done: bytes | ConfigError | DataError = b"done"
    if group.rank == 0:
        try:
            do()
        except (ConfigError, DataError) as error:
            done = error
    _tell(group, 0, done)


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
