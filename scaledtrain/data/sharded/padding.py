"""Batches cut out of what was read at once, and padded where that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.columns import DTYPES, Column
from scaledtrain.data.sharded.gather import Values
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.errors import ConfigError

__all__ = ["Padding", "check_ragged"]


class Padding:
    """Cuts batches, and pads their ragged columns.

    Args:
        columns: of the data set.
        values: ragged column -> what its samples are padded with; the others stay `Ragged`.
        memory: where padded batches go.

    Raises:
        ConfigError: a column that is not ragged, or a value that its dtype cannot hold.
    """

    def __init__(
        self, columns: Mapping[str, Column], values: Mapping[str, float], memory: Memory
    ) -> None:
        for name, value in values.items():
            check_ragged("pad", name, columns)
            _check_value(name, value, columns[name])
        self.values = dict(values)
        self._columns = columns
        self._memory = memory

    def cut(self, name: str, column: Values, low: int, high: int) -> Values:
        """Samples low to high of a column: the same memory, or, where they are padded, its own."""
        if not isinstance(column, Ragged):
            return column[low:high]
        offsets = column.offsets[low : high + 1]
        batch = Ragged(column.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
        if name not in self.values:
            return batch
        longest = int(offsets.diff().max()) if batch.samples else 0
        kind = self._columns[name]
        if batch.values.dtype != DTYPES[kind.dtype].torch:  # they have been normalised
            kind = replace(kind, dtype=str(batch.values.dtype).removeprefix("torch."))
        tensor, _ = self._memory.empty(kind, batch.samples, longest, *kind.shape)
        return batch.padded(self.values[name], out=tensor)


def check_ragged(option: str, name: str, columns: Mapping[str, Column]) -> None:
    """Raise ConfigError if what an option names is no ragged column."""
    if name not in columns or not columns[name].ragged:
        ragged = [other for other, column in columns.items() if column.ragged]
        raise ConfigError(
            f"{option} names {name!r}, which is no column of samples of different lengths; those "
            f"that are read: {', '.join(ragged) or 'none'}"
        )


def _check_value(name: str, value: float, column: Column) -> None:
    dtype = DTYPES[column.dtype].torch
    try:
        held = torch.empty(1, dtype=dtype).fill_(value).item()
    except (RuntimeError, TypeError):
        held = None
    if held is None or (held != value and not dtype.is_floating_point):
        raise ConfigError(
            f"pad is {value!r} for {name!r}, which {column.dtype} cannot hold; give another value, "
            "or write the column with another dtype"
        )
