"""Writes a data set, shard by shard, so that a crash leaves what was written until then."""

from __future__ import annotations

import fnmatch
import os
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.buffer import ShardBuffer
from scaledtrain.data.sharded.columns import (
    Array,
    Column,
    as_array,
    as_column,
    check_columns,
    wrong_shape,
)
from scaledtrain.data.sharded.compression import DEFAULT_LEVEL, Compression, Compressor
from scaledtrain.data.sharded.manifest import MANIFEST, Manifest, shard_name
from scaledtrain.data.sharded.storage import Begun, Remote, open_folder
from scaledtrain.data.sharded.storage.retry import in_daemon
from scaledtrain.errors import ConfigError, DataError

__all__ = ["ShardWriter"]

SHARD_BYTES = 64 * 2**20

_open_writers: weakref.WeakSet[ShardWriter] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked process neither writes nor keeps the folder locked when this one has died."""
    for writer in list(_open_writers):
        writer._release()


os.register_at_fork(after_in_child=_release_in_child)


class ShardWriter:
    """Writes samples into a folder, one shard after the other; holds one shard in memory.

    While the disk gets a shard the next one is filled; what goes wrong with it is told when that is
    full, or when the writer is closed. A shard gets its name when all of it is on the disk, and the
    manifest names it after that. So a crash, a kill or a full disk loses the samples that are in
    memory and those of the shard that the disk was getting (see ``sync``), and no other; what is
    there can be read, and ``resume=True`` goes on behind it.

    A URL (``s3://...``, whatever fsspec can write to) gets each file in one request, and so holds a
    second copy of it in memory; on stores of objects it is there as a whole or not at all. Nothing
    keeps two writers from one URL: see to that.

    Args:
        folder: is made if it is not there; or a URL.
        columns: of the data set, or of some of its columns; the others follow from the first
            sample: its values' dtypes and shapes (of bytes: ragged ``uint8``).
        shard_bytes: a shard is full when its samples have at least so many bytes ...
        shard_samples: ... or when it has so many samples; None: only bytes count.
        resume: go on after the last whole shard of a data set that is not finished, or add to one
            that is; ``samples_written`` tells which sample comes next. Where there is none yet,
            begin.
        overwrite: delete the data set that is in the folder, if there is one, and any other file
            that is called as a shard.
        compression: ``"zstd"``: of the columns' values, in blocks of 64 KiB, so that any sample can
            be read without the rest; None: there is none, or, with ``resume``, that of the set.
        level: of compression, from 1, fast, to 22, small.
        remote: retries, timeouts and fsspec's options for a URL.

    Attributes:
        samples_written: samples that are in whole shards or wait for theirs to be full.

    Raises:
        ConfigError: the folder holds a data set already, another writer is at work in it, or a
            sample does not have the columns that the first one had.
        DataError: the disk is full, or cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ShardWriter(folder.name, {"tokens": Column("uint16", ragged=True)}) as writer:
        ...     for n in range(100):
        ...         writer.write({"tokens": range(n), "label": n % 10})
        >>> writer.samples_written, sorted(os.listdir(folder.name))
        (100, ['manifest.json', 'shard-00000.safetensors'])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        columns: Mapping[str, Column] | None = None,
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_samples: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        compression: Compression | None = None,
        level: int = DEFAULT_LEVEL,
        remote: Remote | None = None,
    ) -> None:
        for name, limit in (("shard_bytes", shard_bytes), ("shard_samples", shard_samples)):
            if limit is not None and limit < 1:
                raise ConfigError(f"{name} is {limit}; a shard holds at least 1")
        if resume and overwrite:
            raise ConfigError("resume keeps what is there, overwrite deletes it; give one of them")
        self.folder = open_folder(folder, remote)
        self._declared = dict(columns or {})
        self._shard_bytes = shard_bytes
        self._shard_samples = shard_samples
        begun = Manifest({}, compression=compression)  # checked before anything is deleted
        self._compressor = Compressor(level) if compression is not None else None
        self._unlock: Callable[[], None] | None = self.folder.lock()
        try:
            self._manifest = self._begin(resume, overwrite, begun)
            if self._manifest.compression is not None and self._compressor is None:
                self._compressor = Compressor(level)  # of a set that is gone on with
        except BaseException:
            self._release()
            raise
        self._columns: Mapping[str, Column] = self._manifest.columns
        self._buffer = ShardBuffer(self._columns)
        self._writing: Future[None] | None = None
        _open_writers.add(self)

    @property
    def samples_written(self) -> int:
        """Samples that are in whole shards or wait for theirs to be full."""
        return self._manifest.samples + self._buffer.samples

    def _release(self) -> None:
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def _begin(self, resume: bool, overwrite: bool, begun: Manifest) -> Manifest:
        names = self.folder.names()
        there = MANIFEST in names
        if there and not resume and not overwrite:
            raise ConfigError(
                f"{self.folder} holds a data set already; give another folder, resume=True to go "
                "on with it, or overwrite=True to delete it"
            )
        if there and resume:
            manifest = Manifest.load(self.folder)
            for name, column in self._declared.items():
                if manifest.columns.get(name) != column:
                    raise ConfigError(
                        f"the data set in {self.folder} has the columns {dict(manifest.columns)}, "
                        f"but {name!r} was declared as {column}; declare it as it is"
                    )
            if begun.compression not in (None, manifest.compression):
                raise ConfigError(
                    f"the data set in {self.folder} has compression {manifest.compression}, not "
                    f"{begun.compression}; leave it out, or write another set"
                )
        else:
            if there:
                self.folder.delete([MANIFEST])  # first: so there is never half a data set
            manifest = begun
        known = {shard.file for shard in manifest.shards}
        unknown = [f for f in fnmatch.filter(names, "shard-*.safetensors") if f not in known]
        if resume:  # a crash can have come between a shard and the manifest that names it
            unknown = [f for f in unknown if f == shard_name(len(manifest.shards))]
        elif unknown and not overwrite:
            raise ConfigError(
                f"{self.folder} holds {unknown[0]}, which no manifest names; give another "
                "folder, or, if a writer that crashed has left it, resume=True or overwrite=True, "
                "which delete it"
            )
        self.folder.delete([*unknown, *fnmatch.filter(names, ".shard-*.unfinished")])
        return manifest

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add one sample.

        Args:
            sample: column -> its value: a tensor, an array, bytes, a number or lists of numbers.

        Raises:
            ConfigError: it lacks a column, or has a value of another dtype or shape.
            DataError: a shard was full, and could not be written.
        """
        arrays = {name: as_array(value) for name, value in sample.items()}
        if not self._columns:
            self._set_columns(sample)
        self._check_names(sample)
        self._append(
            {
                name: [self._value(name, *arrays[name], sample[name])]
                if column.ragged
                else self._value(name, *arrays[name], sample[name])[None]
                for name, column in self._columns.items()
            }
        )

    def write_batch(self, batch: Mapping[str, Any]) -> None:
        """Add ``n`` samples at once, which costs much less per sample.

        Args:
            batch: column -> ``[n, *shape]``; of a ragged column, a list of ``n`` values, or a
                `Ragged`.

        Raises:
            ConfigError: columns of different length, or as for ``write``.
            DataError: a shard was full, and could not be written.
        """
        given = batch
        batch = {n: v.unbind() if isinstance(v, Ragged) else v for n, v in batch.items()}
        try:
            lengths = {name: len(values) for name, values in batch.items()}
        except TypeError as error:
            raise ConfigError(
                f"a column of a batch is a single value ({error}); write one sample with write()"
            ) from error
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"the columns of a batch have different lengths: {lengths}")
        if not any(lengths.values()):
            return
        if not self._columns:
            self._set_columns({n: v if isinstance(v, Ragged) else v[0] for n, v in given.items()})
        self._check_names(batch)
        self._append(
            {
                name: [self._value(name, *as_array(value), value) for value in batch[name]]
                if column.ragged
                else self._value(name, *as_array(batch[name]), batch[name], dims=1)
                for name, column in self._columns.items()
            }
        )

    def _set_columns(self, sample: Mapping[str, Any]) -> None:
        columns = {n: self._declared.get(n) or _column_of(value) for n, value in sample.items()}
        if lacking := self._declared.keys() - columns.keys():
            raise ConfigError(
                f"the first sample has no {', '.join(sorted(lacking))}, which was declared as a "
                f"column; it has {', '.join(columns)}"
            )
        if not columns:
            raise ConfigError("the first sample has no columns; a sample is {name: value, ...}")
        check_columns(columns)
        self._columns = columns
        self._buffer = ShardBuffer(columns)

    def _check_names(self, given: Mapping[str, Any]) -> None:
        if given.keys() != self._columns.keys():
            raise ConfigError(
                f"sample {self.samples_written} has the columns {', '.join(given)}, but the data "
                f"set has {', '.join(self._columns)}; every sample has all of them"
            )

    def _value(self, name: str, array: Array, dtype: str, given: Any, dims: int = 0) -> Array:
        """The array as the column stores it, if it has these dims and those of the column."""
        column = self._columns[name]
        array = as_column(array, dtype, name, column, given)
        if array.ndim != dims + column.ragged + len(column.shape):
            raise wrong_shape(name, column, array)
        return array

    def _append(self, values: Mapping[str, Array | list[Array]]) -> None:
        """Fill shards with these samples, and write each that is full."""
        if self._unlock is None:
            raise ConfigError(
                f"the ShardWriter of {self.folder} is closed, by you or by an error that was told; "
                "go on with a new one, with resume=True"
            )
        samples = len(next(iter(values.values())))
        sizes = np.zeros(samples, np.int64)
        for column in values.values():
            if isinstance(column, list):
                sizes += [value.nbytes + 8 for value in column]
            else:
                sizes += column.nbytes // samples
        ends = np.cumsum(sizes)
        start = 0
        while start < samples:
            room = self._shard_bytes - self._buffer.nbytes + (ends[start - 1] if start else 0)
            stop = int(np.searchsorted(ends, room)) + 1
            if self._shard_samples is not None:
                stop = min(stop, start + self._shard_samples - self._buffer.samples)
            stop = min(stop, samples)
            self._buffer.add(values, start, stop)
            start = stop
            enough = self._buffer.samples == self._shard_samples
            if enough or self._buffer.nbytes >= self._shard_bytes:
                self._flush()

    def _flush(self) -> None:
        """Write the shard that is in memory; the disk gets it while the next one is filled."""
        file = shard_name(len(self._manifest.shards))
        if self.folder.is_remote:
            self.sync()  # or there would be three copies in memory
        try:
            info, begun = self._buffer.begin(self.folder, file, self._compressor)
        except OSError as error:
            self.sync()
            raise self._failed(file, error) from error
        try:
            self.sync()
        except BaseException:
            begun.discard()
            raise
        shards = (*self._manifest.shards, info)
        self._manifest = replace(  # statistics stay: that they are of fewer samples, they say
            self._manifest, columns=self._columns, shards=shards, complete=False
        )
        self._writing = in_daemon(self._finish, begun, self._manifest)

    def _finish(self, begun: Begun, manifest: Manifest) -> None:
        begun.finish()
        manifest.save(self.folder)

    def sync(self) -> None:
        """Wait until all shards that were full are on the disk, and the manifest names them.

        Raises:
            DataError: one could not be written.
        """
        if self._writing is None or self._unlock is None:
            return
        try:
            self._writing.result()
        except (OSError, DataError) as error:
            self._writing = None
            *before, failed = self._manifest.shards
            self._manifest = replace(self._manifest, shards=tuple(before))
            raise self._failed(failed.file, error) from error
        self._writing = None

    def _failed(self, file: str, error: Exception) -> DataError:
        """The writer is closed; what tells why."""
        self._release()
        return DataError(
            f"shard {self.folder}/{file} cannot be written: {error}; the {self._manifest.samples} "
            "samples before it can be read. Make room, and go on behind them with resume=True"
        )

    def close(self) -> None:
        """Write the last shard, and say in the manifest that the data set is complete."""
        if self._unlock is None:
            return
        try:
            if self._buffer.samples:
                self._flush()
            self.sync()
            manifest = replace(self._manifest, complete=True)
            try:
                manifest.save(self.folder)
            except OSError as error:
                raise DataError(f"{self.folder}/{MANIFEST} cannot be written: {error}") from error
            self._manifest = manifest
        finally:
            self._release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(DataError):
                self.sync()
            self._release()  # what waits for its shard to be full is lost; the whole shards stay


def _column_of(value: Any) -> Column:
    if isinstance(value, Ragged):
        array, dtype = as_array(value.values)
        return Column(dtype, array.shape[1:], ragged=True)
    array, dtype = as_array(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Column(dtype, ragged=True)
    return Column(dtype, array.shape)
