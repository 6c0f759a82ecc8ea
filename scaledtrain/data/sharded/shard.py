"""One shard file, mapped into memory: arrays that are views of the page cache."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from scaledtrain.data.sharded.columns import DTYPES, OFFSETS, Array, Column
from scaledtrain.data.sharded.header import (
    CHUNK_BYTES,
    PREFIX_BYTES,
    TensorInfo,
    checksum,
    parse_header,
)
from scaledtrain.data.sharded.manifest import ShardInfo
from scaledtrain.errors import DataError

__all__ = ["Shard"]

NEAR_BYTES = 65_536  # ranges that are closer than that are asked for as one
ASK_BYTES = 2**20  # of what it is asked for at once, Linux leaves out what is beyond its limit


class Shard:
    """A shard's columns; nothing is read before it is looked at.

    The header is read and validated, the rest is mapped. What lies behind the header is checked
    against its checksums in chunks, each when it is first needed (``check``).

    A file that another program cuts short while it is mapped ends the process with SIGBUS, as with
    every memory map; one that is already too short is told here.

    Args:
        path: of the file.
        info: what the manifest says of it.
        columns: that it must have.
        checked: tensor -> which of its chunks have been checked, bool ``[chunks]``; filled here,
            and kept by the caller where a shard is closed and opened again. None: check nothing.

    Attributes:
        damage: what was found to be wrong; None so far.

    Raises:
        DataError: the file is missing, or is not what the manifest says; the message names it.
    """

    def __init__(
        self,
        path: Path,
        info: ShardInfo,
        columns: Mapping[str, Column],
        checked: dict[str, Array] | None,
    ) -> None:
        self.path = path
        self.damage: str | None = None
        self._checked = checked
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            self._tensors = self._read_header(self._file, info, columns)
            self._map = mmap.mmap(self._file, info.bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error}") from error
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self._arrays = {
            tensor: self._array(name, column, tensor)
            for name, column in columns.items()
            for tensor in column.tensors(name)
        }

    def _read_header(
        self, file: int, info: ShardInfo, columns: Mapping[str, Column]
    ) -> dict[str, TensorInfo]:
        size = os.fstat(file).st_size
        if size != info.bytes:
            raise ValueError(f"it has {size} bytes instead of {info.bytes}")
        prefix = os.pread(file, PREFIX_BYTES, 0)
        length = int.from_bytes(prefix, "little")
        if length > size - PREFIX_BYTES:
            raise ValueError(f"its header would be {length} bytes long, the file has {size}")
        header = prefix + os.pread(file, length, PREFIX_BYTES)
        if self._checked is not None and checksum(header) != int(info.checksum, 16):
            raise ValueError("its header does not have the checksum that the manifest tells")
        tensors = parse_header(header, size, columns, info.samples)
        if self._checked is not None:
            for name, tensor in tensors.items():
                self._checked.setdefault(name, np.zeros(len(tensor.sums), bool))
        return tensors

    def _array(self, name: str, column: Column, tensor: str) -> Array:
        info = self._tensors[tensor]
        dtype = column.stored if tensor == name else DTYPES["int64"].stored
        if not info.nbytes:
            return np.empty(info.shape, dtype)
        count = info.nbytes // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, info.start).reshape(info.shape)

    def _damaged(self, why: str) -> DataError:
        self.damage = why
        return DataError(
            f"shard {self.path} is damaged: {why}; restore the file, write the data set again, or "
            'read it with on_damage="skip"'
        )

    def rows(self, name: str) -> Array:
        """A column's stored tensor, read-only: ``[samples, *shape]``, or a ragged one's values."""
        return self._arrays[name]

    def bounds(self, name: str, rows: Array) -> tuple[Array, Array]:
        """Where the values of these samples of a ragged column begin and end, int64 ``[rows]``.

        Raises:
            DataError: outside the values, which the manifest does not exclude.
        """
        tensor = name + OFFSETS
        self.check(tensor, rows * 8, (rows + 2) * 8)
        offsets, last = self._arrays[tensor], len(self._arrays[name])
        starts, stops = offsets[rows], offsets[rows + 1]
        if len(rows) and not (
            starts.min() >= 0 and stops.max() <= last and bool((starts <= stops).all())
        ):
            raise self._damaged(f"offsets of column {name!r} lie outside its values")
        return starts, stops

    def check(self, tensor: str, starts: Array, stops: Array) -> None:
        """Check the chunks in which these bytes of a tensor lie, unless that has been done.

        Args:
            tensor: its name.
            starts: int64 ``[n]``, first byte of each range, counted from the tensor's first.
            stops: int64 ``[n]``, the byte behind each.

        Raises:
            DataError: one does not have its checksum.
        """
        if self._checked is None or self._checked[tensor].all():
            return
        info, done = self._tensors[tensor], self._checked[tensor]
        filled = stops > starts
        first, last = starts[filled] // CHUNK_BYTES, (stops[filled] - 1) // CHUNK_BYTES
        begun = np.bincount(first, minlength=len(done) + 1)
        ended = np.bincount(last + 1, minlength=len(done) + 1)
        needed = np.cumsum(begun - ended)[: len(done)] > 0
        with memoryview(self._map) as data:
            for chunk in np.flatnonzero(needed & ~done):
                start = info.start + int(chunk) * CHUNK_BYTES
                stop = min(start + CHUNK_BYTES, info.start + info.nbytes)
                if checksum(data[start:stop]) != int(info.sums[chunk]):
                    raise self._damaged(
                        f"bytes {start} to {stop}, of tensor {tensor!r}, were altered"
                    )
                done[chunk] = True

    def read_ahead(self, tensor: str, starts: Array, stops: Array) -> None:
        """Ask the kernel to read these bytes in the background, into the page cache.

        Args:
            tensor: its name.
            starts: int64 ``[n]``, rising: first byte of each range, from the tensor's first.
            stops: int64 ``[n]``, the byte behind each.
        """
        if not len(starts) or not hasattr(os, "posix_fadvise"):  # macOS has none
            return
        info = self._tensors[tensor]
        if self._checked is not None:  # a whole chunk is read to check it
            starts = starts - starts % CHUNK_BYTES
            stops = np.minimum(stops + -stops % CHUNK_BYTES, info.nbytes)
        apart = np.flatnonzero(starts[1:] - stops[:-1] > NEAR_BYTES)
        lows = starts[np.concatenate([[0], apart + 1])] + info.start
        highs = stops[np.concatenate([apart, [len(stops) - 1]])] + info.start
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            for start in range(low, high, ASK_BYTES):
                size = min(ASK_BYTES, high - start)
                os.posix_fadvise(self._file, start, size, os.POSIX_FADV_WILLNEED)
