"""Reads a data set: any sample, any batch, a part of a sample, from the page cache."""

from __future__ import annotations

import copy
import logging
import operator
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from scaledtrain.data.sharded.columns import Array, Column
from scaledtrain.data.sharded.crop import Slice, crop_ranges, normalise
from scaledtrain.data.sharded.gather import Piece, Values, ask_for, gather, pieces
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.data.sharded.normalize import Normalization, NormalizationKind, normalizers
from scaledtrain.data.sharded.opening import OpenShards
from scaledtrain.data.sharded.order import Order, Shuffle
from scaledtrain.data.sharded.shard import Reader
from scaledtrain.data.sharded.statistics import Statistics
from scaledtrain.data.sharded.storage import CACHE_BYTES, Remote, open_folder
from scaledtrain.data.sharded.unpack import reader_of
from scaledtrain.errors import ConfigError, DataError

__all__ = ["Batch", "ShardedDataset"]

SAMPLES_PER_READ = 64  # when all samples are iterated over

Batch = dict[str, Values] | tuple[Values, ...]
OnDamage = Literal["raise", "skip"]

_log = logging.getLogger(__name__)


class ShardedDataset(Dataset[Any]):
    """A data set that a `ShardWriter` wrote; a map-style ``Dataset`` of torch.

    * ``dataset[i]`` is a sample: ``{column: tensor}``, or a tuple of tensors.
    * ``dataset[2:9]`` and ``dataset[[5, 0, 7]]`` are batches, read in one go: ``[n, *shape]``, of a
      ragged column a `Ragged`. In a ``DataLoader`` this is many times faster than collating
      samples: give it ``sampler=BatchSampler(...), batch_size=None``; `ShardedLoader` does more.
    * ``dataset.view(i, column)`` is a read-only NumPy array: the page cache itself, no copy.
    * ``dataset.read(i, column, slices)`` is a crop, without reading the rest.

    Tensors have memory of their own and may be written to. Opening reads the manifest alone; a
    shard is opened when it is first needed, and everything is checked against its checksum when it
    is first read by a process, in pieces of 64 KiB. A copy in another process, as in the workers of
    a ``DataLoader``, opens its files anew.

    A file that is cut short by another program while it is read ends the process with SIGBUS, as
    any memory map does.

    Shards at a URL (``s3://...``, ``https://...``, whatever fsspec knows) are fetched as a whole
    when they are first needed, checked, and mapped from a cache, which the processes of a host
    share. A batch that needs several fetches them side by side, and iteration fetches the next one
    ahead. Where the cache cannot hold the whole set, shuffle whole shards: ``block_bytes`` of the
    loader as large as a shard; else each is fetched many times in an epoch.

    Args:
        folder: of the data set, or its URL.
        columns: which to read, in this order; None: all.
        as_tuple: samples and batches are tuples in the order of the columns, as a loss function
            (inputs, targets) needs them, rather than dicts.
        verify: check what is read against its checksums.
        on_damage: what a damaged or missing shard does. ``"raise"``: DataError. ``"skip"``: its
            samples are left out of batches and of iteration from the moment when the damage is
            found, told in the log, and counted; the numbers of the others do not change, and one
            that is asked for alone is an error all the same.
        normalize: column -> how it is normalised, as a `Normalization` or its kind
            (``"zero_center"``, ``"standardize"``, ``"whiten"``); its values are float32 then,
            except in ``view``, which gives what is stored.
        statistics: to normalise with: those of the data that are trained on, also for a data set
            to test on. None: its own, as `compute_statistics` stored them.
        cache: folder for copies of remote shards; None: ``~/.cache/scaledtrain/shards``, or as
            XDG_CACHE_HOME says.
        cache_bytes: what the cache may hold; those unused for longest make room.
        remote: retries, timeouts and fsspec's options for a URL.

    Attributes:
        folder: where the set is; its ``str()`` is the path or URL.
        manifest: what the folder says of itself.
        columns: those that are read, by name.
        damaged: file -> what was found of it; only with ``on_damage="skip"``.
        samples_skipped: how often a sample was left out.

    Raises:
        ConfigError: the folder holds no data set, it has no such column, or no statistics of the
            samples that it has now.
        DataError: its manifest, or later a shard, is damaged, or cannot be fetched.

    Example:
        >>> import tempfile, torch
        >>> from scaledtrain.data.sharded import ShardWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ShardWriter(folder.name) as writer:
        ...     writer.write_batch({"x": torch.arange(6.0).view(3, 2), "y": [7, 8, 9]})
        >>> data = ShardedDataset(folder.name)
        >>> data[1]
        {'x': tensor([2., 3.]), 'y': tensor(8)}
        >>> ShardedDataset(folder.name, ["y", "x"], as_tuple=True)[[2, 0]]
        (tensor([9, 7]), tensor([[4., 5.],
                [0., 1.]]))
        >>> data.read(2, "x", slice(1, 2))
        tensor([5.])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        columns: Sequence[str] | None = None,
        *,
        as_tuple: bool = False,
        verify: bool = True,
        on_damage: OnDamage = "raise",
        normalize: Mapping[str, Normalization | NormalizationKind] | None = None,
        statistics: Statistics | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: str | int = CACHE_BYTES,
        remote: Remote | None = None,
    ) -> None:
        if on_damage not in ("raise", "skip"):
            raise ConfigError(f"on_damage is {on_damage!r}; it is 'raise' or 'skip'")
        self.folder = open_folder(folder, remote, cache, cache_bytes)
        self.manifest = manifest = Manifest.load(self.folder)
        names = list(manifest.columns) if columns is None else list(columns)
        for name in names:
            if name not in manifest.columns:
                raise ConfigError(
                    f"the data set in {self.folder} has no column {name!r}, only "
                    f"{', '.join(manifest.columns)}"
                )
        self.columns: Mapping[str, Column] = {name: manifest.columns[name] for name in names}
        self.damaged: dict[str, str] = {}
        self._given_up: set[int] = set()
        self.samples_skipped = 0
        self._as_tuple = as_tuple
        self._on_damage = on_damage
        self._normalizers = {}
        if normalize:
            statistics = statistics or manifest.current_statistics(self.folder)
            self._normalizers = normalizers(self.columns, normalize, statistics)
        self.starts: Array = np.cumsum([0, *(s.samples for s in manifest.shards)], dtype=np.int64)
        self._shards = OpenShards(self.folder, manifest, verify)
        self._lock = threading.Lock()  # of the count
        if not manifest.complete:
            warnings.warn(
                f"the data set in {self.folder} was not finished: these are its first "
                f"{len(self)} samples; ShardWriter(..., resume=True) goes on with it",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def sample_bytes(self) -> float:
        """What a sample takes when it is not compressed, all columns of the set, on average."""
        return sum(shard.memory_bytes for shard in self.manifest.shards) / max(1, len(self))

    @property
    def is_compressed(self) -> bool:
        """Whether samples are in blocks, all of which is unpacked for any sample in it."""
        return self.manifest.compression is not None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._batch(np.arange(*index.indices(len(self)), dtype=np.int64))
        if isinstance(index, (list, tuple, np.ndarray)) or (
            isinstance(index, Tensor) and index.ndim
        ):
            return self._batch(self._indices(index))
        shard, row = self._locate(index)
        found = {}
        for name, column in self.columns.items():
            stored, start, stop = self._place(shard, row, name, column)
            shard.check(name, np.array([start]), np.array([stop]))
            found[name] = column.to_torch(stored.copy())
            if name in self._normalizers:
                found[name] = self._normalizers[name].sample(found[name])
        return self.form(found)

    def __iter__(self) -> Iterator[Any]:
        ahead = 0
        for low in range(0, len(self), SAMPLES_PER_READ):
            following = int(np.searchsorted(self.starts, low, side="right"))
            if following > ahead:
                self._shards.fetch_ahead(following)
                ahead = following
            indices = np.arange(low, min(low + SAMPLES_PER_READ, len(self)), dtype=np.int64)
            batch, kept = self.gather(indices)
            samples = {n: v if isinstance(v, Tensor) else v.unbind() for n, v in batch.items()}
            for i in range(int(kept.sum())):
                # A sample that is kept does not keep its neighbours.
                yield self.form({name: values[i].clone() for name, values in samples.items()})

    def view(self, index: int, column: str) -> Array:
        """A sample's value in the page cache: read-only, and not copied.

        Raises:
            ConfigError: no such column, or one of bfloat16, which NumPy does not have, or the data
                set is compressed.
            IndexError: no such sample.
            DataError: its shard is damaged.
        """
        if self._column(column).dtype == "bfloat16":
            raise ConfigError(f"column {column!r} is bfloat16, which NumPy has not: use read")
        if self.manifest.compression is not None:
            raise ConfigError(
                f"the data set in {self.folder} is compressed, and the page cache holds no sample "
                "of it as it is: use read, which makes a copy"
            )
        shard, row = self._locate(index)
        stored, start, stop = self._place(shard, row, column, self._column(column))
        shard.check(column, np.array([start]), np.array([stop]))
        return stored

    def read(self, index: int, column: str, slices: Slice | Sequence[Slice] = ()) -> Tensor:
        """A part of a sample's value; the rest of it is not read.

        Args:
            index: of the sample.
            column: its name.
            slices: a slice or an index for each of the first dims; what is left out is whole.

        Raises:
            ConfigError: no such column, more slices than dims, or it is whitened, which takes all
                of a sample.
            IndexError: no such sample, or an index outside its value.
            DataError: its shard is damaged.

        Example:
            ``scans.read(3, "volume", (slice(0, 64), slice(96, 160), slice(96, 160)))``
        """
        shard, row = self._locate(index)
        kind = self._column(column)
        stored, start, _ = self._place(shard, row, column, kind)
        parts = normalise(slices, stored.shape)
        starts, stops = crop_ranges(parts, stored.shape, stored.itemsize)
        shard.check(column, start + starts, start + stops)
        crop = kind.to_torch(np.array(stored[parts]))
        if column in self._normalizers:
            return self._normalizers[column].crop(crop, parts, stored.shape)
        return crop

    def gather(
        self, indices: Array, memory: Memory | None = None, read_ahead: bool = False
    ) -> tuple[dict[str, Values], Array]:
        """A batch, and which of the samples are in it.

        Args:
            indices: int64 ``[n]``, each from 0 to ``len(dataset) - 1``.
            memory: where the batch goes; None: anywhere.
            read_ahead: ask the kernel for all of it before the first is needed, which pays for
                large batches that are not in the page cache.

        Returns:
            Column -> ``[kept, *shape]`` or `Ragged`, and bool ``[n]``: all, unless damaged shards
            are skipped.

        Raises:
            DataError: a shard is damaged.
        """
        while True:  # once more without a shard that turned out to be damaged
            kept = self._readable(indices)
            parts: list[tuple[Reader, Piece]] = []
            try:
                parts = self._parts(list(pieces(indices[kept], self.starts)))
                if read_ahead:
                    for shard, piece in parts:
                        ask_for(shard, piece, self.columns)
                batch = gather(parts, int(kept.sum()), self.columns, memory or Memory())
            except DataError:
                if self._on_damage == "raise":
                    raise
                for shard, piece in parts:
                    if shard.damage is not None:
                        self._give_up(piece.shard, shard.damage)
                if (self._readable(indices) == kept).all():
                    raise  # there is no memory, say, and nothing to leave out
                continue
            if not kept.all():
                with self._lock:
                    self.samples_skipped += len(indices) - int(kept.sum())
            for name, normalizer in self._normalizers.items():
                batch[name] = normalizer.batch(batch[name], memory or Memory())
            return batch, kept

    def read_ahead(self, indices: Array) -> None:
        """Ask the kernel to bring samples into the page cache; does not wait for them.

        Args:
            indices: int64 ``[n]``, each from 0 to ``len(dataset) - 1``.

        Raises:
            DataError: a shard is damaged, and damaged shards are not skipped.
        """
        try:
            parts = self._parts(list(pieces(indices[self._readable(indices)], self.starts)))
            for shard, piece in parts:
                ask_for(shard, piece, self.columns)
        except DataError:
            if self._on_damage == "raise":
                raise  # else `gather` finds it, too, and leaves it out

    def only(self, column: str) -> ShardedDataset:
        """The same data set, read alike, but only this column, as it is stored."""
        other = copy.copy(self)
        other.columns, other._normalizers, other._as_tuple = (
            {column: self._column(column)},
            {},
            False,
        )
        return other

    def lengths(self, indices: Array, column: str) -> Array:
        """How long these samples of a ragged column are, int64 ``[n]``; only that is read.

        Of a damaged shard that is skipped they are 0, or what the intact rest of it says.

        Raises:
            ConfigError: no such column, or it is not ragged.
            DataError: a shard is damaged.
        """
        if not self._column(column).ragged:
            raise ConfigError(f"column {column!r} is not ragged: its samples are of one length")
        found = np.zeros(len(indices), np.int64)
        for number, rows, places in pieces(indices, self.starts):
            # Not left out if it was given up: on another rank that may not have happened yet, and
            # all must find the same lengths.
            try:
                starts, stops = reader_of(self._shards.get(number)).bounds(column, rows)
            except DataError as error:
                if self._on_damage == "raise":
                    raise
                self._give_up(number, str(error))
            else:
                found[places] = stops - starts
        return found

    def order(self, shuffle: Shuffle, block_bytes: int, buffer_bytes: int, seed: int) -> Order:
        """An order of the samples, with blocks of so many bytes and groups of so many of them."""
        sample_bytes = max(1.0, self.sample_bytes)
        block_samples = max(1, int(block_bytes / sample_bytes))
        buffer_blocks = max(1, int(buffer_bytes / (sample_bytes * block_samples)))
        shards = [shard.samples for shard in self.manifest.shards]
        return Order(shards, block_samples, buffer_blocks, shuffle, seed)

    def _parts(self, of_batch: Sequence[Piece]) -> list[tuple[Reader, Piece]]:
        parts: list[tuple[Reader, Piece]] = []
        failed: list[DataError] = []
        found = self._shards.get_all([piece.shard for piece in of_batch])
        for shard, piece in zip(found, of_batch, strict=True):
            if isinstance(shard, DataError):
                self._give_up(piece.shard, str(shard))
                failed.append(shard)
            else:
                parts.append((reader_of(shard), piece))
        if failed:
            raise failed[0]
        return parts

    def form(self, columns: Mapping[str, Values]) -> Batch:
        """A dict or a tuple, as the data set was told."""
        return tuple(columns.values()) if self._as_tuple else dict(columns)

    def _batch(self, indices: Array) -> Batch:
        return self.form(self.gather(indices)[0])

    def _column(self, name: str) -> Column:
        if name not in self.columns:
            raise ConfigError(f"column is {name!r}; the data set reads {', '.join(self.columns)}")
        return self.columns[name]

    def _indices(self, given: Any) -> Array:
        indices = np.asarray(given)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ConfigError(
                f"a batch is asked for with indices of shape {list(indices.shape)} and dtype "
                f"{indices.dtype}; give a list of whole numbers"
            )
        indices = indices.astype(np.int64)
        outside = (indices < -len(self)) | (indices >= len(self))
        if outside.any():
            raise IndexError(f"sample {indices[outside][0]} of {len(self)}")
        return np.where(indices < 0, indices + len(self), indices)

    def _locate(self, index: Any) -> tuple[Reader, int]:
        """The shard of a sample, and its row there."""
        sample = operator.index(index)
        if not -len(self) <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        sample %= len(self)
        number = int(np.searchsorted(self.starts, sample, side="right")) - 1
        try:
            return reader_of(self._shards.get(number)), sample - int(self.starts[number])
        except DataError as error:
            self._give_up(number, str(error))
            raise

    def _place(self, shard: Reader, row: int, name: str, column: Column) -> tuple[Array, int, int]:
        """A sample's stored value, and its first and last byte in the column's tensor."""
        stored = shard.rows(name)
        if not column.ragged:
            return stored[row, ...], row * column.nbytes, (row + 1) * column.nbytes
        (start,), (stop,) = shard.bounds(name, np.array([row]))
        return stored[start:stop], int(start) * column.nbytes, int(stop) * column.nbytes

    def _readable(self, indices: Array) -> Array:
        """Which of these samples are in no shard that was given up."""
        kept = np.ones(len(indices), bool)
        for number in self._given_up:
            kept &= (indices < self.starts[number]) | (indices >= self.starts[number + 1])
        return kept

    def _give_up(self, number: int, why: str) -> None:
        if self._on_damage == "skip" and number not in self._given_up:
            info = self.manifest.shards[number]
            self._given_up = {*self._given_up, number}  # a new one: others may be looking at it
            self.damaged[info.file] = why
            _log.warning("its %d samples are left out: shard %s: %s", info.samples, info.file, why)
