"""The samples of a shard that is not full yet."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaledtrain.data.sharded.columns import DTYPES, OFFSETS, Array, Column
from scaledtrain.data.sharded.compression import Compressor
from scaledtrain.data.sharded.header import ITEM_BYTES, Tensors, build_header, checksum
from scaledtrain.data.sharded.manifest import ShardInfo
from scaledtrain.data.sharded.storage import Begun, Folder

__all__ = ["ShardBuffer"]


class ShardBuffer:
    """Gathers samples in memory, and writes them as one shard; its memory is used for the next one.

    Args:
        columns: that each sample has.

    Attributes:
        samples: how many there are.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = {name: _ColumnBuffer(column) for name, column in columns.items()}
        self.samples = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the samples in the shard."""
        return sum(column.nbytes for column in self._columns.values())

    def add(self, values: Mapping[str, Array | list[Array]], start: int, stop: int) -> None:
        """Add some of these samples.

        Args:
            values: column -> ``[n, *shape]``, or ``n`` arrays of a ragged one, of its stored dtype.
            start: the first of those to add.
            stop: the one behind the last.
        """
        for name, column in self._columns.items():
            column.add(values[name][start:stop])
        self.samples += stop - start

    def begin(
        self, folder: Folder, file: str, compressor: Compressor | None = None
    ) -> tuple[ShardInfo, Begun]:
        """Begin to write the shard, and be empty again.

        Returns:
            What the manifest will say of it, and the file, which is to be finished.

        Raises:
            OSError: it cannot be written; no part of it is left.
        """
        tensors: Tensors = {}
        metadata: dict[str, str] = {}
        for name, column in self._columns.items():
            tensors |= column.tensors(name, self.samples)
            if compressor is not None:
                stored, told = compressor.compress(name, tensors[name][-1])
                tensors[name] = ("U8", (len(stored),), stored)
                metadata |= told
        by_item = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensors[tensor][0]])
        tensors = {tensor: tensors[tensor] for tensor in by_item}
        header = build_header(tensors, metadata)
        parts = [memoryview(header), *(data for *_, data in tensors.values())]
        begun = folder.begin(file, parts)
        raw_bytes = None if compressor is None else self.nbytes
        info = ShardInfo(file, self.samples, begun.size, f"{checksum(header):016x}", raw_bytes)
        for column in self._columns.values():
            column.clear()
        self.samples = 0
        return info, begun


class _ColumnBuffer:
    def __init__(self, column: Column) -> None:
        self._column = column
        self._data = bytearray()  # more than there is of samples, once it has been full
        self._size = 0
        self._ends = [0]

    def clear(self) -> None:
        self._size = 0
        self._ends = [0]

    @property
    def nbytes(self) -> int:
        return self._size + (8 * len(self._ends) if self._column.ragged else 0)

    def add(self, values: Array | list[Array]) -> None:
        for array in values if isinstance(values, list) else [values]:
            stop = self._size + array.nbytes
            self._data[self._size : stop] = array.reshape(-1).view(np.uint8).data
            self._size = stop
            if self._column.ragged:
                self._ends.append(self._ends[-1] + len(array))

    def tensors(self, name: str, samples: int) -> Tensors:
        column, data = self._column, memoryview(self._data)[: self._size]
        code = DTYPES[column.dtype].code
        if not column.ragged:
            return {name: (code, (samples, *column.shape), data)}
        ends = np.array(self._ends, "<i8").view(np.uint8).data
        return {
            name: (code, (self._ends[-1], *column.shape), data),
            name + OFFSETS: ("I64", (samples + 1,), ends),
        }
