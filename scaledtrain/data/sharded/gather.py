"""Picks samples out of shards into memory of their own, whatever their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.columns import OFFSETS, Array, Column
from scaledtrain.data.sharded.header import CHUNK_BYTES
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.data.sharded.shard import Reader

__all__ = ["Piece", "Values", "ask_for", "gather", "pieces"]

Values = Tensor | Ragged

LARGE_ROW_BYTES = 4_096  # copying such a row takes longer than a turn of a Python loop
LONG_RUN_ROWS = 8
PICKED_BYTES = 2**18  # of small rows at once: a core's cache holds them between their two copies


class Piece(NamedTuple):
    """The samples of a batch that are in one shard."""

    shard: int
    rows: Array
    """int64, rising: which of the shard's samples."""
    places: Array
    """int64: where in the batch each belongs."""


def pieces(indices: Array, starts: Array) -> Iterator[Piece]:
    """Sort a batch by shard.

    Args:
        indices: int64 ``[n]``, of samples, in any order, also repeated.
        starts: int64 ``[shards + 1]``: which sample is the first of each shard, and how many there
            are.
    """
    places = np.argsort(indices)
    ordered = indices[places]
    shards = np.searchsorted(starts, ordered, side="right") - 1
    edges = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(shards)]
    for low, high in pairwise(edges):
        if high > low:
            shard = int(shards[low])
            yield Piece(shard, ordered[low:high] - starts[shard], places[low:high])


def gather(
    parts: Sequence[tuple[Reader, Piece]],
    samples: int,
    columns: Mapping[str, Column],
    memory: Memory,
) -> dict[str, Values]:
    """A batch of samples; nothing in it shares memory with the files.

    Args:
        parts: of the batch, with their shards.
        samples: how many there are in all.
        columns: which to read.
        memory: where they go.

    Returns:
        Column -> ``[samples, *shape]``, or `Ragged`.

    Raises:
        DataError: a shard turned out to be damaged.
    """
    batch: dict[str, Values] = {}
    for name, column in columns.items():
        make = _ragged if column.ragged else _fixed
        batch[name] = make(parts, samples, name, column, memory)
    return batch


Parts = Sequence[tuple[Reader, Piece]]


def _fixed(parts: Parts, samples: int, name: str, column: Column, memory: Memory) -> Tensor:
    tensor, batch = memory.empty(column, samples, *column.shape)
    for shard, (_, rows, places) in parts:
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = [0, *breaks.tolist(), len(rows)]
        are_long = len(rows) >= LONG_RUN_ROWS * (len(breaks) + 1)
        if column.nbytes >= CHUNK_BYTES and not are_long:
            _copy_checked(shard, name, rows, batch, places, column.nbytes)
        else:
            shard.check(name, rows * column.nbytes, (rows + 1) * column.nbytes)
            _copy(shard.rows(name), rows, batch, places, column.nbytes, runs if are_long else None)
    return tensor


def _copy_checked(
    shard: Reader, name: str, rows: Array, batch: Array, places: Array, row_bytes: int
) -> None:
    """Row by row, of a chunk and more, which is checked in the copy: a core's cache has that."""
    shard.check_edges(name, rows * row_bytes, (rows + 1) * row_bytes)
    source, copies = _as_words(shard.rows(name), row_bytes), _as_words(batch, row_bytes)
    memory = batch.data.cast("B")
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        copies[place] = source[row]
        copy = memory[place * row_bytes : (place + 1) * row_bytes]
        shard.check_copy(name, row * row_bytes, copy)


def _copy(
    source: Array,
    rows: Array,
    batch: Array,
    places: Array,
    row_bytes: int,
    runs: Sequence[int] | None,
) -> None:
    """``batch[places] = source[rows]``, with as few copies and turns as can be.

    Args:
        source: a shard's rows.
        rows: which of them.
        batch: where they go.
        places: to which of its rows.
        row_bytes: of each.
        runs: where runs of rows that follow each other begin, and where all end; None: they are
            short.
    """
    if runs is None and row_bytes >= LARGE_ROW_BYTES:
        source, batch = _as_words(source, row_bytes), _as_words(batch, row_bytes)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            batch[place] = source[row]
        return
    source, batch = _as_items(source, row_bytes), _as_items(batch, row_bytes)
    if runs is not None:
        for low, high in pairwise(runs):
            first = int(rows[low])
            batch[places[low:high]] = source[first : first + high - low]
    else:
        few = max(1, PICKED_BYTES // max(1, row_bytes))
        for low in range(0, len(rows), few):
            batch[places[low : low + few]] = source[rows[low : low + few]]


def _as_items(rows: Array, row_bytes: int) -> Array:
    """Each row as one item without a type, which NumPy moves faster than many numbers."""
    if not rows.size or rows.ndim == 1:
        return rows
    return rows.reshape(len(rows), -1).view(f"V{row_bytes}")[:, 0]


def _as_words(rows: Array, row_bytes: int) -> Array:
    """Each row as numbers, since NumPy copies those, unlike an item, without holding the GIL."""
    return rows.reshape(len(rows), -1).view(np.uint64 if row_bytes % 8 == 0 else np.uint8)


def _ragged(parts: Parts, samples: int, name: str, column: Column, memory: Memory) -> Ragged:
    offsets = np.zeros(samples + 1, np.int64)
    bounds = []
    for shard, (_, rows, places) in parts:
        starts, stops = shard.bounds(name, rows)
        shard.check(name, starts * column.nbytes, stops * column.nbytes)
        offsets[places + 1] = stops - starts
        bounds.append((starts, stops))
    np.cumsum(offsets, out=offsets)
    tensor, values = memory.empty(column, int(offsets[-1]), *column.shape)
    for (shard, (_, _, places)), (starts, stops) in zip(parts, bounds, strict=True):
        source, firsts = shard.rows(name), offsets[places]
        lengths = stops - starts
        if lengths.sum() * column.nbytes >= LARGE_ROW_BYTES * len(places):
            lows, highs, to = starts.tolist(), stops.tolist(), firsts.tolist()
            for low, high, first in zip(lows, highs, to, strict=True):
                values[first : first + high - low] = source[low:high]
        else:  # element by element: the k-th of a sample is at its first place plus k
            within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            values[np.repeat(firsts, lengths) + within] = source[
                np.repeat(starts, lengths) + within
            ]
    return Ragged(tensor, torch.from_numpy(offsets))


def ask_for(shard: Reader, piece: Piece, columns: Mapping[str, Column]) -> None:
    """Ask the kernel for what a batch needs of a shard; does not wait for it.

    Where a ragged column's values lie is not known before its offsets are read, so it is asked for
    them first, and for all between the first and the last value.
    """
    rows = piece.rows
    for name, column in columns.items():
        if column.ragged:
            shard.read_ahead(name + OFFSETS, rows[:1] * 8, rows[-1:] * 8 + 16)
    for name, column in columns.items():
        starts, stops = rows, rows + 1
        if column.ragged:
            starts, stops = shard.bounds(name, rows)
        shard.read_ahead(name, starts * column.nbytes, stops * column.nbytes)
