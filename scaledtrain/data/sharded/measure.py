"""What is measured of one column, and its measurement in one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scaledtrain.data.sharded.columns import Array, Column
from scaledtrain.data.sharded.histogram import Histogram
from scaledtrain.data.sharded.moments import Covariance, Moments
from scaledtrain.data.sharded.statistics import ColumnStatistics
from scaledtrain.errors import ConfigError, DataError

__all__ = ["Axis", "Measure", "kept_dims"]

Axis = int | tuple[int, ...] | None

CHUNK_VALUES = 2**18  # float64 copies of so many at a time, which stay in the processor's caches
MOST_BYTES = 128 * 2**20  # of one column's statistics
MOST_CLASSES = 2**16


@dataclass(frozen=True)
class Measure:
    """What is measured of a column.

    Args:
        name: of the column, for messages.
        column: what it holds.
        axis: the dims of a sample's value that are kept, rising.
        bins: of a histogram of each feature; 0: none.
        covariance: whether the covariance of all features with each other is measured.
        classes: whether values are counted one by one.
        sentinel: the number that stands for a missing value; None: only NaN does.
        raises: a missing value is an error.

    Raises:
        ConfigError: the column cannot be measured like this.
    """

    name: str
    column: Column
    axis: tuple[int, ...]
    bins: int = 0
    covariance: bool = False
    classes: bool = False
    sentinel: float | None = None
    raises: bool = True

    def __post_init__(self) -> None:
        if self.bins < 0 or self.bins == 1:
            raise ConfigError(f"bins is {self.bins}; a histogram has at least 2, 0 makes none")
        if self.classes and not self.whole:
            raise ConfigError(
                f"column {self.name!r} is {self.column.dtype}, but only whole numbers are classes"
            )
        if self.sentinel is not None and not self._holds(self.sentinel):
            raise ConfigError(
                f"the sentinel of column {self.name!r} is {self.sentinel!r}, which "
                f"{self.column.dtype} cannot hold (NaN is missing anyway)"
            )
        counts = 8 * self.bins * self.features
        if counts > MOST_BYTES:
            raise ConfigError(
                f"{self.bins} bins of each of the {self.features} features of column "
                f"{self.name!r} take {counts:,} bytes, more than {MOST_BYTES:,}; keep fewer dims "
                f"(axis={{{self.name!r}: None}}: one histogram of all values), or give bins=0"
            )
        products = 8 * self.features**2
        if self.covariance and products > MOST_BYTES:
            raise ConfigError(
                f"the covariance of the {self.features} features of column {self.name!r} takes "
                f"{products:,} bytes, more than {MOST_BYTES:,}, which are "
                f"{math.isqrt(MOST_BYTES // 8)} features; keep fewer dims "
                f"(axis={{{self.name!r}: 0}}: of channels), or use "
                '"standardize", which needs none'
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features."""
        return tuple(self.column.shape[dim] for dim in self.axis)

    @property
    def features(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """The column has whole numbers."""
        return "float" not in self.column.dtype

    def _holds(self, number: float) -> bool:
        if not self.whole:
            return math.isfinite(number)
        if self.column.dtype == "bool":
            return number in (0, 1)
        limits = np.iinfo(self.column.stored)
        return number == int(number) and limits.min <= number <= limits.max

    def of(self, values: Tensor) -> ColumnStatistics:
        """The statistics of a batch.

        Args:
            values: ``[n, *column.shape]``.

        Raises:
            DataError: a value is missing, and is not allowed to be; or is infinite.
        """
        by_feature = self._by_feature(values)
        rows = max(1, CHUNK_VALUES // self.features)
        if self.covariance:  # whose merge takes as long as the products of so many rows
            rows = max(rows, self.features)
        n = by_feature.shape[1]
        chunks = [by_feature[:, low : low + rows] for low in range(0, max(1, n), rows)]
        found = self._of_chunk(chunks[0])
        for chunk in chunks[1:]:
            found = found.merge(self._of_chunk(chunk))
        return replace(found, histogram=self._histogram(chunks, found.moments))

    def _histogram(self, chunks: Sequence[Array], whole: Moments) -> Histogram | None:
        """Now that the range of the batch is known: so the bins of all chunks are the same."""
        found: Histogram | None = None
        for chunk in chunks if self.bins else ():
            values = self._floats(chunk)
            one = Histogram.of(values, whole.minimum, whole.maximum, self.bins, self.whole)
            found = one if found is None else replace(found, counts=found.counts + one.counts)
        return found

    def _by_feature(self, values: Tensor) -> Array:
        """``[features, n]``, of the stored numbers."""
        if values.dtype == torch.bfloat16:
            values = values.float()
        array = values.numpy()
        kept = tuple(dim + 1 for dim in self.axis)
        array = np.moveaxis(array, kept, range(len(kept)))
        return array.reshape(self.features, -1)

    def _of_chunk(self, stored: Array) -> ColumnStatistics:
        values = self._floats(stored)
        moments = Moments.of(values)
        self._check(moments)
        covariance = counts = None
        if self.covariance:
            covariance = Covariance.of(values)
        if self.classes:
            counts = self._count(stored)
        return ColumnStatistics(
            self.shape, self.axis, self.sentinel, moments, None, covariance, counts
        )

    def _floats(self, stored: Array) -> Array:
        """float64, the sentinel as NaN."""
        values = stored.astype(np.float64, order="C")
        if self.sentinel is not None:
            values[stored == self.column.rounded(self.sentinel)] = np.nan
        return values

    def _check(self, moments: Moments) -> None:
        if self.raises and (missing := int(moments.missing.sum())):
            raise DataError(
                f"{missing} values of column {self.name!r} are missing; missing='ignore' counts "
                "them and leaves them out"
            )
        if np.isinf(moments.minimum).any() or np.isinf(moments.maximum).any():
            raise DataError(
                f"column {self.name!r} has an infinite value, of which there is no mean; leave the "
                "column out, or write NaN or a finite number for it"
            )
        if not np.isfinite(moments.m2).all():
            raise DataError(
                f"column {self.name!r} has values from {np.nanmin(moments.minimum):g} to "
                f"{np.nanmax(moments.maximum):g}, whose squares are beyond float64; leave it out, "
                "or write it in another unit"
            )

    def _count(self, stored: Array) -> dict[int, int]:
        numbers, times = np.unique(stored, return_counts=True)
        if len(numbers) > MOST_CLASSES:
            raise ConfigError(
                f"column {self.name!r} has more than {MOST_CLASSES} different values, which are no "
                "classes; leave it out of classes"
            )
        found = dict(zip(numbers.tolist(), times.tolist(), strict=True))
        if self.sentinel is not None:
            found.pop(int(self.sentinel), None)
        return {int(number): n for number, n in found.items()}


def kept_dims(name: str, column: Column, axis: Axis) -> tuple[int, ...]:
    """The dims of a column's value that an axis names, counted from 0 and rising.

    Args:
        name: of the column.
        column: what it holds.
        axis: one dim, several, or None for none; negative ones count from the last.

    Raises:
        ConfigError: the value has no such dim, or one is named twice.
    """
    given = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    dims = len(column.shape)
    if any(type(dim) is not int or not -dims <= dim < dims for dim in given):
        raise ConfigError(
            f"axis is {axis!r} for column {name!r}, whose values have the dims "
            f"{list(range(dims))} of sizes {list(column.shape)}; name some of these, or None for "
            "one statistic of all values"
        )
    kept = sorted(dim % dims for dim in given)
    if len(set(kept)) < len(kept):
        raise ConfigError(f"axis {axis!r} for column {name!r} names a dim twice")
    return tuple(kept)
