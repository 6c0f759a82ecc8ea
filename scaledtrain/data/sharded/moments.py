"""Count, mean, variance, least and largest of many numbers, and covariances, merged from parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from scaledtrain.data.sharded.columns import Array

__all__ = ["Covariance", "Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the values of each feature, without those that are missing (NaN).

    With deviations d from the mean of each part, M2 = sum d^2, two parts make

        delta = mean_b - mean_a     mean = mean_a + delta n_b / n     M2 = M2_a + M2_b +
        delta^2 n_a n_b / n

    which loses no digits where the mean is far larger than the deviations, as sums of squares do.
    Constant values have a variance of exactly 0.

    Args:
        count: int64 ``[features]``: values that are there.
        missing: int64 ``[features]``: and that are not.
        mean: float64 ``[features]``; NaN without values, as ``minimum`` and ``maximum``.
        m2: float64 ``[features]``: sum of the squared distances from the mean.
        minimum: float64 ``[features]``.
        maximum: float64 ``[features]``.

    Example:
        >>> a, b = Moments.of(np.array([[1.0, 2.0]])), Moments.of(np.array([[6.0, np.nan]]))
        >>> both = a.merge(b)
        >>> both.count, both.missing, both.mean, both.m2  # 2^2 + 1^2 + 3^2
        (array([3]), array([1]), array([3.]), array([14.]))

    References:
        Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance: Analysis and
        Recommendations, The American Statistician 37(3).
    """

    count: Array
    missing: Array
    mean: Array
    m2: Array
    minimum: Array
    maximum: Array

    @classmethod
    def of(cls, values: Array) -> Moments:
        """Of these values, float64 ``[features, n]``."""
        features, n = values.shape
        absent = np.isnan(values)
        missing = absent.sum(1)
        count = n - missing
        nothing = np.full(features, np.nan)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite values: whoever asks is told
            minimum = np.fmin.reduce(values, axis=1) if n else nothing
            maximum = np.fmax.reduce(values, axis=1) if n else nothing
            # From the least value on, so that equal values have a distance of exactly 0.
            origin = np.where(count > 0, minimum, 0.0)
            distance = values - origin[:, None]
            some_missing = bool(missing.any())
            if some_missing:
                distance[absent] = 0.0
            offset = distance.sum(1) / np.maximum(count, 1)
            distance -= offset[:, None]
            if some_missing:
                distance[absent] = 0.0
            m2 = np.square(distance, out=distance).sum(1)
        mean = np.where(count > 0, origin + offset, np.nan)
        return cls(count, missing, mean, m2, minimum, maximum)

    def merge(self, other: Moments) -> Moments:
        """Of the values of both."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        both = (self.count > 0) & (other.count > 0)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = np.where(both, other.mean - self.mean, 0.0)
            return Moments(
                count,
                self.missing + other.missing,
                np.where(self.count > 0, self.mean + delta * share, other.mean),
                self.m2 + other.m2 + delta * delta * self.count * share,
                np.fmin(self.minimum, other.minimum),
                np.fmax(self.maximum, other.maximum),
            )


@dataclass(frozen=True, eq=False)
class Covariance:
    """Of all features with each other, over the rows in which none is missing.

    The products of the deviations are merged as the squares of `Moments` are.

    Args:
        count: rows.
        mean: float64 ``[features]``, of these rows.
        m2: float64 ``[features, features]``: sum of the outer products of the distances from the
            mean. What is below the diagonal is not used.

    Example:
        >>> rows = np.array([[0.0, 2.0, 4.0], [0.0, 1.0, 2.0]])
        >>> Covariance.of(rows[:, :1]).merge(Covariance.of(rows[:, 1:])).matrix * 3
        array([[8., 4.],
               [4., 2.]])
    """

    count: int
    mean: Array
    m2: Array

    @classmethod
    def of(cls, values: Array) -> Covariance:
        """Of these values, float64 ``[features, n]``."""
        whole = values[:, ~np.isnan(values).any(0)]
        features, n = whole.shape
        if not n:
            return cls(0, np.zeros(features), np.zeros((features, features)))
        # In memory of torch's: its alignment, and so the bits of the product, are always the same.
        tensor = torch.empty(features, n, dtype=torch.float64)
        distance = tensor.numpy()
        origin = whole.min(1)
        np.subtract(whole, origin[:, None], out=distance)
        offset = distance.sum(1) / n
        distance -= offset[:, None]
        return cls(n, origin + offset, (tensor @ tensor.T).numpy())

    def merge(self, other: Covariance) -> Covariance:
        """Of the rows of both."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        m2 = np.outer(delta, delta)
        m2 *= self.count * (other.count / count)
        m2 += self.m2
        m2 += other.m2
        return Covariance(count, self.mean + delta * (other.count / count), m2)

    @property
    def matrix(self) -> Array:
        """Float64 ``[features, features]``, symmetric: divided by the rows; 0 without rows."""
        upper = np.triu(self.m2)
        upper /= max(1, self.count)
        upper += np.triu(upper, 1).T
        return upper
