"""Statistics of a data set's columns: measured batch by batch, merged, stored in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.histogram import Histogram
from scaledtrain.data.sharded.moments import Covariance, Moments
from scaledtrain.data.sharded.packing import pack, unpack
from scaledtrain.errors import ConfigError

__all__ = ["ColumnStatistics", "Statistics"]


@dataclass(frozen=True, eq=False)
class ColumnStatistics:
    """What is known of all values of a column, or of each of its features.

    A feature is an index of the dims that were kept: of an image ``[channels, height, width]`` with
    axis 0, each channel. All arrays are ``[*kept dims]``, and computed in float64.

    Args:
        shape: of the features: the kept dims of a sample's value; ``()``: one for all values.
        axis: which dims of a sample's value were kept.
        sentinel: the number that stands for a missing value, beside NaN; None: none does.
        moments: of the features, flattened.
        histogram: of the features, flattened; None: not asked for.
        covariance: of all features with each other; None: not asked for.
        class_counts: value -> how often, of whole numbers; None: not asked for.
    """

    shape: tuple[int, ...]
    axis: tuple[int, ...]
    sentinel: float | None
    moments: Moments
    histogram: Histogram | None = None
    covariance: Covariance | None = None
    class_counts: Mapping[int, int] | None = None

    @property
    def count(self) -> Array:
        """Values that are there, int64."""
        return self.moments.count.reshape(self.shape)

    @property
    def missing(self) -> Array:
        """Values that are missing: NaN, or the sentinel; int64."""
        return self.moments.missing.reshape(self.shape)

    @property
    def mean(self) -> Array:
        """NaN where there are no values, as of all that follow."""
        return self.moments.mean.reshape(self.shape)

    @property
    def variance(self) -> Array:
        """The mean squared distance from the mean (``numpy.var``: divided by n, not n - 1)."""
        count = self.moments.count
        found = np.where(count > 0, self.moments.m2 / np.maximum(count, 1), np.nan)
        return found.reshape(self.shape)

    @property
    def std(self) -> Array:
        """The square root of the variance."""
        found: Array = np.sqrt(self.variance)
        return found

    @property
    def minimum(self) -> Array:
        """The least value."""
        return self.moments.minimum.reshape(self.shape)

    @property
    def maximum(self) -> Array:
        """The largest value."""
        return self.moments.maximum.reshape(self.shape)

    def merge(self, other: ColumnStatistics) -> ColumnStatistics:
        """Of the values of both, which were measured alike."""
        moments = self.moments.merge(other.moments)
        histogram, covariance, counts = self.histogram, self.covariance, self.class_counts
        if histogram is not None and other.histogram is not None:
            histogram = histogram.merge(other.histogram, moments.minimum, moments.maximum)
        if covariance is not None and other.covariance is not None:
            covariance = covariance.merge(other.covariance)
        if counts is not None and other.class_counts is not None:
            both = sorted(counts.keys() | other.class_counts.keys())
            counts = {n: counts.get(n, 0) + other.class_counts.get(n, 0) for n in both}
        return ColumnStatistics(
            self.shape, self.axis, self.sentinel, moments, histogram, covariance, counts
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it, every bit of it."""
        told: dict[str, Any] = {
            "shape": list(self.shape),
            "axis": list(self.axis),
            "sentinel": self.sentinel,
        }
        told |= {one.name: pack(getattr(self.moments, one.name)) for one in fields(Moments)}
        if self.histogram is not None:
            told["histogram"] = {
                "exponent": pack(self.histogram.exponent),
                "first": pack(self.histogram.first),
                "counts": pack(self.histogram.counts),
                "whole": self.histogram.whole,
            }
        if self.covariance is not None:
            m2 = self.covariance.m2
            upper = np.concatenate([m2[row, row:] for row in range(len(m2))])
            told["covariance"] = {
                "count": self.covariance.count,
                "mean": pack(self.covariance.mean),
                "m2_by_rows_from_the_diagonal": pack(upper),
            }
        if self.class_counts is not None:
            told["class_counts"] = [list(pair) for pair in self.class_counts.items()]
        return told

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> ColumnStatistics:
        """Read what ``to_json`` made.

        Raises:
            ConfigError, ValueError, TypeError, KeyError: it is anything else.
        """
        axis, shape = (tuple(_counts(told[name])) for name in ("axis", "shape"))
        if len(axis) != len(shape):
            raise ConfigError(f"statistics with axis {axis} have features of shape {shape}")
        n = int(np.prod(shape, dtype=object))
        sentinel = told["sentinel"]
        if sentinel is not None and type(sentinel) not in (int, float):
            raise ConfigError(f"the sentinel of a column is {sentinel!r}")
        whole = ("count", "missing")
        moments = Moments(
            **{
                one.name: unpack(told[one.name], np.int64 if one.name in whole else np.float64, n)
                for one in fields(Moments)
            }
        )
        if (moments.count < 0).any() or (moments.missing < 0).any() or not (moments.m2 >= 0).all():
            raise ConfigError("statistics count less than nothing")
        histogram, covariance, counts = (
            told.get(name) for name in ("histogram", "covariance", "class_counts")
        )
        return cls(
            shape,
            axis,
            sentinel,
            moments,
            None if histogram is None else _histogram(histogram, n),
            None if covariance is None else _covariance(covariance, n),
            None if counts is None else {_whole(k): _whole(c, 0) for k, c in counts},
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the columns of a data set as it was when they were computed.

    Args:
        samples: of the data set.
        shards: in which they were.
        columns: by name.
    """

    samples: int
    shards: int
    columns: Mapping[str, ColumnStatistics]

    def __getitem__(self, column: str) -> ColumnStatistics:
        if column not in self.columns:
            raise ConfigError(
                f"there are no statistics of column {column!r}, only of "
                f"{', '.join(self.columns) or 'none'}; compute_statistics(folder, [{column!r}]) "
                "makes them"
            )
        return self.columns[column]

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it, every bit of it."""
        columns = {name: column.to_json() for name, column in self.columns.items()}
        return {"samples": self.samples, "shards": self.shards, "columns": columns}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Statistics:
        """Read what ``to_json`` made; see `ColumnStatistics.from_json`."""
        columns = {n: ColumnStatistics.from_json(column) for n, column in told["columns"].items()}
        return cls(_whole(told["samples"], 0), _whole(told["shards"], 0), columns)


def _histogram(told: Mapping[str, Any], n: int) -> Histogram:
    exponent, first = unpack(told["exponent"], np.int64, n), unpack(told["first"], np.int64, n)
    counts = unpack(told["counts"], np.int64)
    if n and (not counts.size or counts.size % n):
        raise ConfigError(f"a histogram has {counts.size} counts of {n} features")
    if exponent.size and (np.abs(exponent).max() > 2_000 or np.abs(first).max() > 2**53):
        raise ConfigError("a histogram has bins that no values can have")
    return Histogram(exponent, first, counts.reshape(n, -1), bool(told["whole"]))


def _covariance(told: Mapping[str, Any], n: int) -> Covariance:
    upper = unpack(told["m2_by_rows_from_the_diagonal"], np.float64, n * (n + 1) // 2)
    m2 = np.zeros((n, n))
    for row in range(n):
        first = row * n - row * (row - 1) // 2  # n, n - 1, ... are before it
        m2[row, row:] = upper[first : first + n - row]
    return Covariance(_whole(told["count"], 0), unpack(told["mean"], np.float64, n), m2)


def _whole(value: Any, least: int | None = None) -> int:
    if type(value) is not int or (least is not None and value < least):
        raise ConfigError(f"{value!r} is no whole number{'' if least is None else f' >= {least}'}")
    return value


def _counts(values: Any) -> list[int]:
    if not isinstance(values, list):
        raise ConfigError(f"{values!r} is no list")
    return [_whole(value, 0) for value in values]
