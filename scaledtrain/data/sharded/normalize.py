"""Normalises the batches of a column with the statistics of a whole data set."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.columns import Array, Column
from scaledtrain.data.sharded.gather import Values
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.data.sharded.moments import Covariance
from scaledtrain.data.sharded.statistics import ColumnStatistics, Statistics
from scaledtrain.errors import ConfigError, DataError

__all__ = ["Normalization", "NormalizationKind", "Normalizer", "normalizers", "whitening"]

NormalizationKind = Literal["zero_center", "standardize", "whiten"]

WHITEN_EPS = 1e-6
CHUNK_VALUES = 2**18  # are normalised at a time, while they are in the processor's caches
# Their differences are as exact in float32 as in float64 (or nearly: see Normalizer).
NARROW = ("float32", "float16", "bfloat16", "int16", "int8", "uint16", "uint8", "bool")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalization:
    """How a column is normalised. The result is float32.

    With mean m and variance v of each feature, or their covariance C = U diag(l) U^T, l falling:

    * ``"zero_center"``: x - m
    * ``"standardize"``: (x - m) / sqrt(v + e)
    * ``"whiten"``: ZCA: U diag(1 / sqrt(l + e)) U^T (x - m), which of all whitened data are the
      nearest to x; PCA: diag(1 / sqrt(l + e)) U^T (x - m), the principal components in place of the
      features, each with its sign such that the largest number of its column of U is positive.

    e is ``eps`` times the mean variance of all features, so that the result does not depend on the
    unit of the data. A feature, or a direction, that is constant, becomes 0 if e is 0.

    Args:
        kind: which of the three.
        method: of whitening.
        eps: >= 0; None: 0 to standardize, 1e-6 to whiten, where it bounds by how much a direction
            of nearly no variance is stretched, as there are in data of less than full rank.
        fill: what a missing value becomes, in units of the result: 0 is the mean. (A whitened
            sample has parts of all its features in each, so there it is the distance from the mean
            that a missing feature is taken to have.) None: NaN; ``"raise"``: DataError.

    Raises:
        ConfigError: an option that cannot be.
    """

    kind: NormalizationKind
    method: Literal["zca", "pca"] = "zca"
    eps: float | None = None
    fill: float | Literal["raise"] | None = None

    def __post_init__(self) -> None:
        kinds = ("zero_center", "standardize", "whiten")
        if self.kind not in kinds:
            raise ConfigError(f"normalize is {self.kind!r}; it is one of {', '.join(kinds)}")
        if self.method not in ("zca", "pca"):
            raise ConfigError(f"method is {self.method!r}; it is 'zca' or 'pca'")
        if self.eps is not None and not 0 <= self.eps < math.inf:
            raise ConfigError(f"eps is {self.eps}; it is a number >= 0")
        if isinstance(self.fill, str) and self.fill != "raise":
            raise ConfigError(f"fill is {self.fill!r}; it is a number, None (NaN) or 'raise'")


class Normalizer:
    """Normalises values of one column.

    A float32 mean would be wrong by up to half of its last digit, which is much where it is far
    larger than the deviations: so it is subtracted in two parts, which together have twice the
    digits, and of wider dtypes in float64. Whitening multiplies in float64.

    Args:
        name: of the column, for messages.
        column: what it holds.
        statistics: of it.
        how: it is normalised.

    Raises:
        ConfigError: the statistics are of other features than the column has, or lack a covariance.
    """

    def __init__(
        self, name: str, column: Column, statistics: ColumnStatistics, how: Normalization
    ) -> None:
        self._name = name
        self._how = how
        self._axis = statistics.axis
        sentinel = statistics.sentinel
        self._sentinel = None if sentinel is None else column.rounded(sentinel)
        dims = len(column.shape)
        if any(dim >= dims for dim in self._axis) or statistics.shape != tuple(
            column.shape[dim] for dim in self._axis
        ):
            raise ConfigError(
                f"column {name!r} has values of shape {list(column.shape)}, but its statistics are "
                f"of dims {list(self._axis)} of sizes {list(statistics.shape)}; compute them of "
                "this data set, or of one with the same columns"
            )
        self.column = Column("float32", column.shape, column.ragged)
        self._narrow = column.dtype in NARROW
        # As they stand beside a sample: [channels, 1, 1].
        beside = [n if dim in self._axis else 1 for dim, n in enumerate(column.shape)]
        mean, self._matrix = statistics.mean, None
        scale = np.ones(statistics.shape)
        if how.kind == "standardize":
            scale = _inverse_roots(statistics.variance, how.eps or 0.0)
        if how.kind == "whiten":
            if statistics.covariance is None:
                raise ConfigError(
                    f"whitening column {name!r} needs its covariance, which was not computed: "
                    f"scaledtrain.data.compute_statistics(folder, covariance=[{name!r}])"
                )
            mean = statistics.covariance.mean
            self._matrix = torch.from_numpy(_matrix(name, statistics.covariance, how))
        self._mean = torch.from_numpy(mean.reshape(beside).copy())
        self._scale = torch.from_numpy(scale.reshape(beside).copy())
        self._mean_high = self._mean.float()
        self._mean_low = (self._mean - self._mean_high.double()).float()

    def batch(self, values: Values, memory: Memory) -> Values:
        """A batch normalised, float32; its own memory may be used for it.

        Args:
            values: ``[n, *shape]``, or `Ragged`.
            memory: where the result goes, if it needs memory of its own.
        """
        if isinstance(values, Ragged):
            return Ragged(self._all(values.values, memory), values.offsets)
        return self._all(values, memory)

    def sample(self, values: Tensor) -> Tensor:
        """One sample normalised: ``[*shape]``, of a ragged column ``[length, *shape]``."""
        if self.column.ragged:
            return self._all(values, Memory())
        return self._all(values[None], Memory())[0]

    def crop(self, values: Tensor, slices: Sequence[int | slice], shape: Sequence[int]) -> Tensor:
        """A crop of one sample, normalised.

        Args:
            values: ``sample[slices]``.
            slices: one for each dim.
            shape: of the whole sample; a ragged one's length first.

        Raises:
            ConfigError: it would have to be whitened, which takes all features.
        """
        if self._matrix is not None:
            raise ConfigError(
                f"column {self._name!r} is whitened, which takes whole samples; read it with "
                "data[index], or without normalize"
            )
        mean, high, low, scale = (
            part.expand(tuple(shape))[tuple(slices)]
            for part in (self._mean, self._mean_high, self._mean_low, self._scale)
        )
        out = values if values.dtype == torch.float32 else torch.empty(values.shape)
        return self._affine(values, out, mean, high, low, scale)

    def _all(self, values: Tensor, memory: Memory) -> Tensor:
        out = values
        if values.dtype != torch.float32:
            out, _ = memory.empty(Column("float32"), *values.shape)
        parts = (self._mean, self._mean_high, self._mean_low, self._scale)
        rows = max(1, CHUNK_VALUES // math.prod(self.column.shape))
        for low in range(0, len(values), rows):
            part, to = values[low : low + rows], out[low : low + rows]
            if self._matrix is None:
                self._affine(part, to, *parts)
            else:
                self._whiten(part, to, self._matrix)
        return out

    def _whiten(self, values: Tensor, out: Tensor, matrix: Tensor) -> None:
        centred = self._fill(values.double() - self._mean, self._missing(values))
        dims, last = [dim + 1 for dim in self._axis], list(range(-len(self._axis), 0))
        features = torch.movedim(centred, dims, last)
        white = features.reshape(-1, len(matrix)) @ matrix.T
        out.copy_(torch.movedim(white.reshape(features.shape), last, dims))

    def _affine(
        self, values: Tensor, out: Tensor, mean: Tensor, high: Tensor, low: Tensor, scale: Tensor
    ) -> Tensor:
        missing = self._missing(values)
        if self._narrow:
            out.copy_(values).sub_(high).sub_(low).mul_(scale)
        else:
            out.copy_((values.double() - mean).mul_(scale))
        return self._fill(out, missing)

    def _missing(self, values: Tensor) -> Tensor | None:
        """Which values are missing; None: the result says it, or none can be."""
        if self._sentinel is None:
            return None
        # NumPy compares with any number, also with one that the dtype cannot hold.
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        return torch.from_numpy(np.asarray(array == self._sentinel))

    def _fill(self, result: Tensor, missing: Tensor | None) -> Tensor:
        fill = self._how.fill
        if missing is not None:
            result.masked_fill_(missing, math.nan)
        if fill == "raise":
            if n := int(result.isnan().sum()):
                raise DataError(
                    f"{n} values of column {self._name!r} in a batch are missing; tell "
                    "Normalization what they become: fill=0 is the mean, fill=None NaN"
                )
        elif fill is not None:
            result.nan_to_num_(nan=float(fill), posinf=math.inf, neginf=-math.inf)
        return result


def normalizers(
    columns: Mapping[str, Column],
    normalize: Mapping[str, Normalization | NormalizationKind],
    statistics: Statistics,
) -> dict[str, Normalizer]:
    """One for each column that is to be normalised.

    Raises:
        ConfigError: there is no such column, or no such kind; or as for `Normalizer`.
    """
    if not isinstance(normalize, Mapping):
        raise ConfigError(
            f"normalize is {normalize!r}; it says it by column: {{'x': 'standardize'}}"
        )
    found = {}
    for name, how in normalize.items():
        if name not in columns:
            raise ConfigError(f"normalize names {name!r}; the columns are {', '.join(columns)}")
        policy = how if isinstance(how, Normalization) else Normalization(how)
        found[name] = Normalizer(name, columns[name], statistics[name], policy)
    return found


def whitening(covariance: Array, how: Normalization) -> tuple[Array, int]:
    """The matrix that whitens, and the rank of the covariance.

    Args:
        covariance: float64 ``[features, features]``.
        how: method and eps.

    Example:
        >>> matrix, rank = whitening(np.array([[4.0, 0.0], [0.0, 0.25]]), Normalization("whiten",
        ...     eps=0.0))
        >>> matrix, rank
        (array([[0.5, 0. ],
               [0. , 2. ]]), 2)
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    # What eigh cannot tell from 0.
    present = values > values[0] * len(values) * np.finfo(np.float64).eps
    values = np.where(present, values, 0.0)
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    vectors = vectors * signs
    roots = _inverse_roots(values, WHITEN_EPS if how.eps is None else how.eps)
    matrix = roots[:, None] * vectors.T
    if how.method == "zca":
        matrix = vectors @ matrix
    return np.ascontiguousarray(matrix), int(present.sum())


def _matrix(name: str, covariance: Covariance, how: Normalization) -> Array:
    matrix, rank = whitening(covariance.matrix, how)
    if rank < len(matrix):
        _log.warning(
            "the covariance of column %r has rank %d of %d: directions of no variance are not "
            "whitened, and stay near 0",
            name,
            rank,
            len(matrix),
        )
    return matrix


def _inverse_roots(variances: Array, eps: float) -> Array:
    """1 / sqrt(v + eps * mean of v), and 0 instead of 1 / 0."""
    known = variances[~np.isnan(variances)]
    total = variances + eps * (known.mean() if known.size else 0.0)
    found: Array = np.divide(1.0, np.sqrt(total), out=np.zeros_like(total), where=total != 0)
    return found
