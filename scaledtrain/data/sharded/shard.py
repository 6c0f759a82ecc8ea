"""One shard file, mapped into memory: arrays that are views of the page cache."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from scaledtrain.data.sharded.columns import DTYPES, OFFSETS, Array, Column
from scaledtrain.data.sharded.compression import Compression
from scaledtrain.data.sharded.header import (
    CHUNK_BYTES,
    PREFIX_BYTES,
    TensorInfo,
    checksum,
    parse_header,
)
from scaledtrain.data.sharded.manifest import ShardInfo
from scaledtrain.data.sharded.storage import OpenFile
from scaledtrain.errors import DataError

__all__ = ["Reader", "Shard", "touched"]

NEAR_BYTES = 65_536  # ranges that are closer than that are asked for as one
ASK_BYTES = 2**20  # of what it is asked for at once, Linux leaves out what is beyond its limit


class Reader(Protocol):
    """Columns that can be read where they have been checked."""

    @property
    def damage(self) -> str | None:
        """What was found to be wrong; None so far."""

    def rows(self, name: str) -> Array:
        """A column's values: ``[samples, *shape]``, or a ragged one's, all in a row."""

    def bounds(self, name: str, rows: Array) -> tuple[Array, Array]:
        """Where the values of these samples of a ragged column begin and end, int64 ``[rows]``."""

    def check(self, tensor: str, starts: Array, stops: Array) -> None:
        """Make sure that these bytes of a tensor are what was written."""

    def check_edges(self, tensor: str, starts: Array, stops: Array) -> None:
        """Make so sure of these bytes that they may be copied, and then `check_copy`'d."""

    def check_copy(self, tensor: str, start: int, copy: memoryview) -> None:
        """Make sure that a copy of bytes of a tensor, from there on, is what was written."""

    def read_ahead(self, tensor: str, starts: Array, stops: Array) -> None:
        """Say that these bytes of a tensor will be needed."""


class Shard:
    """A shard's columns; nothing is read before it is looked at.

    The header is read and validated, the rest is mapped. What lies behind the header is checked
    against its checksums in chunks, each when it is first needed (``check``).

    A file that another program cuts short while it is mapped ends the process with SIGBUS, as with
    every memory map; one that is already too short is told here.

    Args:
        file: opened; it is closed when the shard is gone.
        info: what the manifest says of it.
        columns: that it must have.
        checked: tensor -> which of its chunks have been checked, bool ``[chunks]``; filled here,
            and kept by the caller where a shard is closed and opened again. None: check nothing.
        compression: of its columns.

    Attributes:
        damage: what was found to be wrong; None so far.

    Raises:
        DataError: the file is not what the manifest says; the message names it.
        OSError: it cannot be read or mapped.
    """

    def __init__(
        self,
        file: OpenFile,
        info: ShardInfo,
        columns: Mapping[str, Column],
        checked: dict[str, Array] | None,
        compression: Compression | None = None,
    ) -> None:
        weakref.finalize(self, os.close, file.handle)
        self.file = file
        self.damage: str | None = None
        self.columns = columns
        self._checked = checked
        self._compression = compression
        try:
            self.tensors = self._read_header(file.handle, info)
            self._map = mmap.mmap(file.handle, info.bytes, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise self.damaged(str(error)) from error
        self._arrays = {
            tensor: self._array(name, column, tensor)
            for name, column in columns.items()
            for tensor in column.tensors(name)
        }

    def _read_header(self, file: int, info: ShardInfo) -> dict[str, TensorInfo]:
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
        tensors = parse_header(header, size, self.columns, info.samples, self._compression)
        if self._checked is not None:
            for name, tensor in tensors.items():
                self._checked.setdefault(name, np.zeros(len(tensor.sums), bool))
        return tensors

    def _array(self, name: str, column: Column, tensor: str) -> Array:
        info = self.tensors[tensor]
        dtype = column.stored if tensor == name else DTYPES["int64"].stored
        if info.blocks is not None:
            dtype = DTYPES["uint8"].stored
        if not info.nbytes:
            return np.empty(info.shape, dtype)
        count = info.nbytes // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, info.start).reshape(info.shape)

    def damaged(self, why: str) -> DataError:
        """Note what is wrong, and return the error that tells it."""
        self.damage = why
        self.file.discard()
        return DataError(
            f"shard {self.file.name} is damaged: {why}; restore the file, write the data set "
            'again, or read it with on_damage="skip"'
        )

    def rows(self, name: str) -> Array:
        """A column's stored tensor, read-only: ``[samples, *shape]``, or a ragged one's values.

        Of a compressed one, its frames.
        """
        return self._arrays[name]

    def bounds(self, name: str, rows: Array) -> tuple[Array, Array]:
        """Where the values of these samples of a ragged column begin and end, int64 ``[rows]``.

        Raises:
            DataError: outside the values, which the manifest does not exclude.
        """
        tensor, blocks = name + OFFSETS, self.tensors[name].blocks
        self.check(tensor, rows * 8, (rows + 2) * 8)
        offsets, last = self._arrays[tensor], self.tensors[name].shape[0]
        if blocks is not None:
            last = blocks.rows
        starts, stops = offsets[rows], offsets[rows + 1]
        if len(rows) and not (
            starts.min() >= 0 and stops.max() <= last and bool((starts <= stops).all())
        ):
            raise self.damaged(f"offsets of column {name!r} lie outside its values")
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
        info, done = self.tensors[tensor], self._checked[tensor]
        chunks = np.flatnonzero(touched(starts, stops, CHUNK_BYTES, len(done)) & ~done)
        end = info.start + info.nbytes
        with memoryview(self._map) as data:
            for chunk, told in zip(chunks.tolist(), info.sums[chunks].tolist(), strict=True):
                start = info.start + chunk * CHUNK_BYTES
                if checksum(data[start : min(start + CHUNK_BYTES, end)]) != told:
                    raise self._altered(tensor, chunk)
        done[chunks] = True

    def _altered(self, tensor: str, chunk: int) -> DataError:
        info = self.tensors[tensor]
        start = info.start + chunk * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, info.start + info.nbytes)
        return self.damaged(f"bytes {start} to {stop}, of tensor {tensor!r}, were altered")

    def check_edges(self, tensor: str, starts: Array, stops: Array) -> None:
        """Check those chunks of which these ranges have only a part.

        Args:
            tensor: its name.
            starts: as in `check`.
            stops: likewise.

        Raises:
            DataError: one does not have its checksum.
        """
        firsts, lasts = -(-starts // CHUNK_BYTES) * CHUNK_BYTES, stops - stops % CHUNK_BYTES
        lasts = np.where(stops == self.tensors[tensor].nbytes, stops, lasts)
        self.check(
            tensor,
            np.concatenate([starts, np.maximum(lasts, starts)]),
            np.concatenate([np.minimum(firsts, stops), stops]),
        )

    def check_copy(self, tensor: str, start: int, copy: memoryview) -> None:
        """Check the chunks that are whole in a copy, unless that has been done.

        Args:
            tensor: its name.
            start: the copy's first byte, counted from the tensor's first.
            copy: of some bytes of it.

        Raises:
            DataError: one does not have its checksum.
        """
        if self._checked is None:
            return
        info, done = self.tensors[tensor], self._checked[tensor]
        stop = start + len(copy)
        last = len(done) if stop == info.nbytes else stop // CHUNK_BYTES
        for chunk in range(-(-start // CHUNK_BYTES), last):
            if not done[chunk]:
                low = chunk * CHUNK_BYTES - start
                if checksum(copy[low : low + CHUNK_BYTES]) != info.sums[chunk]:
                    raise self._altered(tensor, chunk)
                done[chunk] = True

    def check_all(self) -> None:
        """Check everything.

        Raises:
            DataError: something does not have its checksum.
        """
        for tensor, info in self.tensors.items():
            self.check(tensor, np.array([0]), np.array([info.nbytes]))

    def read_ahead(self, tensor: str, starts: Array, stops: Array) -> None:
        """Ask the kernel to read these bytes in the background, into the page cache.

        Args:
            tensor: its name.
            starts: int64 ``[n]``, rising: first byte of each range, from the tensor's first.
            stops: int64 ``[n]``, the byte behind each.
        """
        if not len(starts) or not hasattr(os, "posix_fadvise"):  # macOS has none
            return
        info = self.tensors[tensor]
        if self._checked is not None:  # a whole chunk is read to check it
            starts = starts - starts % CHUNK_BYTES
            stops = np.minimum(stops + -stops % CHUNK_BYTES, info.nbytes)
        apart = np.flatnonzero(starts[1:] - stops[:-1] > NEAR_BYTES)
        lows = starts[np.concatenate([[0], apart + 1])] + info.start
        highs = stops[np.concatenate([apart, [len(stops) - 1]])] + info.start
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            for start in range(low, high, ASK_BYTES):
                size = min(ASK_BYTES, high - start)
                os.posix_fadvise(self.file.handle, start, size, os.POSIX_FADV_WILLNEED)


def touched(starts: Array, stops: Array, size: int, count: int) -> Array:
    """In which of ``count`` pieces of ``size`` bytes any of these ranges lies, bool ``[count]``."""
    filled = stops > starts
    first, last = starts[filled] // size, (stops[filled] - 1) // size
    begun = np.bincount(first, minlength=count + 1)
    ended = np.bincount(last + 1, minlength=count + 1)
    needed: Array = np.cumsum(begun - ended)[:count] > 0
    return needed
