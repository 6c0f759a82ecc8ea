"""Histograms whose range need not be known before the values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaledtrain.data.sharded.columns import Array

__all__ = ["Histogram"]

LEAST_EXPONENT = -1074  # 2^this is the least number > 0 of float64
MULTIPLIED_EXPONENT = 1_000  # 2^-this is a number > 0, and so is 2^this
EXACT_BITS = 53  # whole numbers of so many bits are exact in float64


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of each feature's values in bins as wide as a power of two, made in one pass.

    Bin i of width 2^e has the values x with floor(x / 2^e) = i. The width is the least power of two
    with which the values, from the least to the largest, lie in the number of bins that was asked
    for; of whole numbers it is at least 1. Where values come that lie outside, the width is
    doubled, and each two bins become one: no value is ever in a wrong bin, and the result is the
    same whatever the parts were and in whatever order they came. The values take up at least about
    half of the bins.

    Args:
        exponent: int64 ``[features]``: e.
        first: int64 ``[features]``: i of the first bin, in which the least value is.
        counts: int64 ``[features, bins]``.
        whole: the values are whole numbers.

    Example:
        >>> values = np.array([[0.0, 1.0, 2.5, 9.0]])
        >>> found = Histogram.of(values, values.min(1), values.max(1), bins=8, whole=False)
        >>> found.edges[0], found.counts[0]
        (array([ 0.,  2.,  4.,  6.,  8., 10., 12., 14., 16.]), array([2, 1, 0, 0, 1, 0, 0, 0]))
    """

    exponent: Array
    first: Array
    counts: Array
    whole: bool

    @classmethod
    def of(cls, values: Array, minimum: Array, maximum: Array, bins: int, whole: bool) -> Histogram:
        """Count values.

        Args:
            values: float64 ``[features, n]``, finite; NaN is not counted.
            minimum: float64 ``[features]``, of them; NaN if there are none.
            maximum: float64 ``[features]``.
            bins: how many, >= 2.
            whole: they are whole numbers.
        """
        features = len(values)
        exponent = _exponents(minimum, maximum, bins, whole)
        first = _index(np.nan_to_num(minimum), exponent)
        places = _index(values, exponent[:, None])
        places += (np.arange(features) * bins - first)[:, None]
        missing = np.isnan(values)
        flat = places[~missing] if missing.any() else places.reshape(-1)
        counts = np.bincount(flat, minlength=features * bins).reshape(features, bins)
        return cls(exponent, first, counts, whole)

    def merge(self, other: Histogram, minimum: Array, maximum: Array) -> Histogram:
        """Of the values of both, whose least and largest are these."""
        features, bins = self.counts.shape
        exponent = _exponents(minimum, maximum, bins, self.whole)
        first = _index(np.nan_to_num(minimum), exponent)
        counts = np.zeros(features * bins, np.int64)
        for part in (self, other):
            if (part.exponent == exponent).all() and (part.first == first).all():
                counts += part.counts.reshape(-1)
                continue
            shift = np.minimum(exponent - part.exponent, 63)
            old = (part.first[:, None] + np.arange(bins)) >> shift[:, None]
            places = np.clip(old - first[:, None], 0, bins - 1)  # those outside have no values
            places += (np.arange(features) * bins)[:, None]
            np.add.at(counts, places.reshape(-1), part.counts.reshape(-1))
        return Histogram(exponent, first, counts.reshape(features, bins), self.whole)

    @property
    def edges(self) -> Array:
        """Where the bins begin, and the last one ends: float64 ``[features, bins + 1]``."""
        indices = self.first[:, None] + np.arange(self.counts.shape[1] + 1)
        with np.errstate(over="ignore"):  # an end beyond the largest number
            return np.ldexp(indices.astype(np.float64), self.exponent[:, None])


def _exponents(minimum: Array, maximum: Array, bins: int, whole: bool) -> Array:
    """The least for each feature with which its values lie in so many bins, int64."""
    low, high = np.nan_to_num(minimum), np.nan_to_num(maximum)
    largest = np.maximum(np.abs(low), np.abs(high))
    least = np.where(largest > 0, np.frexp(largest)[1] - EXACT_BITS, LEAST_EXPONENT)
    least = np.maximum(least, 0 if whole else LEAST_EXPONENT)
    # Bins are no narrower than range / bins; so it is this, or a little more.
    half_width = (high / 2 - low / 2) / bins
    narrowest = np.where(half_width > 0, np.frexp(half_width)[1] - 1, LEAST_EXPONENT)
    exponent = np.maximum(narrowest, least).astype(np.int64)
    while (many := _index(high, exponent) - _index(low, exponent) >= bins).any():
        exponent += many
    return exponent


def _index(values: Array, exponent: Array) -> Array:
    """floor(x / 2^e), exact; anything for NaN."""
    with np.errstate(invalid="ignore", under="ignore"):
        if np.abs(exponent).max(initial=0) <= MULTIPLIED_EXPONENT:
            found = values * np.ldexp(1.0, -exponent)  # several times faster
        else:
            found = np.ldexp(values, -exponent)
        np.floor(found, out=found)
        found -= (found == 0) & (values < 0)  # what is too small to be divided
        indices: Array = found.astype(np.int64)
        return indices
