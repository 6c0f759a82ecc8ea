"""The columns of a compressed shard, decompressed where they are read."""

from __future__ import annotations

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.compression import BLOCK_BYTES, Blocks, Decompressor
from scaledtrain.data.sharded.shard import Reader, Shard, touched
from scaledtrain.errors import DataError

__all__ = ["reader_of"]


def reader_of(shard: Shard) -> Reader:
    """What a thread reads a shard with: itself, or, if it is compressed, memory for its blocks."""
    compressed = any(info.blocks is not None for info in shard.tensors.values())
    return _Unpacked(shard) if compressed else shard


class _Unpacked:
    """Decompresses the blocks that are checked; for one thread, and for one batch.

    The memory for a column is as large as all of it, but the system gives it page by page, where a
    block is written.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._decompressor = Decompressor()
        self._memory: dict[str, Array] = {}
        self._done: dict[str, Array] = {}

    @property
    def damage(self) -> str | None:
        return self._shard.damage

    def rows(self, name: str) -> Array:
        blocks = self._blocks(name)
        assert blocks is not None
        if name not in self._memory:
            try:
                self._memory[name] = np.empty(blocks.nbytes, np.uint8)
            except MemoryError as error:
                raise DataError(
                    f"column {name!r} of shard {self._shard.file.name} is {blocks.nbytes} bytes "
                    "long when it is not compressed, for which there is no memory; write "
                    "smaller shards"
                ) from error
            self._done[name] = np.zeros(len(blocks.ends) - 1, bool)
        column = self._shard.columns[name]
        return self._memory[name].view(column.stored).reshape(blocks.rows, *column.shape)

    def _blocks(self, tensor: str) -> Blocks | None:
        return self._shard.tensors[tensor].blocks

    def bounds(self, name: str, rows: Array) -> tuple[Array, Array]:
        return self._shard.bounds(name, rows)

    def check(self, tensor: str, starts: Array, stops: Array) -> None:
        blocks = self._blocks(tensor)
        if blocks is None:
            return self._shard.check(tensor, starts, stops)
        self.rows(tensor)
        memory, done = self._memory[tensor], self._done[tensor]
        needed = np.flatnonzero(touched(starts, stops, BLOCK_BYTES, len(done)) & ~done)
        lows, highs = blocks.ends[needed], blocks.ends[needed + 1]
        self._shard.check(tensor, lows, highs)
        frames = self._shard.rows(tensor).data
        for block, low, high in zip(needed.tolist(), lows.tolist(), highs.tolist(), strict=True):
            first, size = block * BLOCK_BYTES, blocks.size(block)
            try:
                data = self._decompressor.block(frames[low:high], size)
            except ValueError as error:
                raise self._shard.damaged(f"block {block} of tensor {tensor!r}: {error}") from error
            memory[first : first + size] = np.frombuffer(data, np.uint8)
            done[block] = True

    def check_edges(self, tensor: str, starts: Array, stops: Array) -> None:
        self.check(tensor, starts, stops)  # what is decompressed has been checked

    def check_copy(self, tensor: str, start: int, copy: memoryview) -> None:
        pass

    def read_ahead(self, tensor: str, starts: Array, stops: Array) -> None:
        blocks = self._blocks(tensor)
        if blocks is not None:
            filled = stops > starts
            starts = blocks.ends[starts[filled] // BLOCK_BYTES]
            stops = blocks.ends[(stops[filled] - 1) // BLOCK_BYTES + 1]
        self._shard.read_ahead(tensor, starts, stops)
