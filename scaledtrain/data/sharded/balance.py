"""Classes of different sizes: weights for a loss, and an order that draws all of them alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.dataset import ShardedDataset
from scaledtrain.data.sharded.measure import MOST_CLASSES
from scaledtrain.errors import ConfigError

__all__ = ["ClassBalance", "WeightedOrder", "class_weights"]

SAMPLES_PER_READ = 65_536
_OF_DRAWS = 16  # what the random words are for, as a part of their key, beside those of `Order`
_WORDS = 4  # of 64 bits, in each of Philox' counts


def class_weights(counts: Mapping[int, int], n_classes: int | None = None) -> Tensor:
    """The weight of each class in a loss: inversely proportional to how often it is there.

    A class with n_c of n samples, in K classes, has n / (K n_c): the mean weight of a sample is 1.

    Args:
        counts: class -> how many samples, as ``ColumnStatistics.class_counts``.
        n_classes: of the model; one that has no samples has weight 0. None: the largest, plus 1.

    Returns:
        float32 ``[n_classes]``.

    Raises:
        ConfigError: there are no samples, or a class is not a number from 0 to ``n_classes`` - 1.

    Example:
        >>> class_weights({0: 6, 1: 2})  # 8 / (2 * 6), 8 / (2 * 2)
        tensor([0.6667, 2.0000])
    """
    present = {label: n for label, n in counts.items() if n > 0}
    if not present:
        raise ConfigError("there are no samples of any class, so no class has a weight")
    n_classes = max(present) + 1 if n_classes is None else n_classes
    if min(present) < 0 or max(present) >= n_classes:
        raise ConfigError(
            f"the classes are {min(present)} to {max(present)}, but a loss has weights for 0 to "
            f"{n_classes - 1}; give n_classes={max(present) + 1}, and mark a label that stands for "
            "none as missing (compute_statistics(..., sentinels=))"
        )
    weights = torch.zeros(n_classes)
    samples = sum(present.values())
    for label, n in present.items():
        weights[label] = samples / (len(present) * n)
    return weights


class ClassBalance:
    """Samples by class, from the column of a data set that tells it.

    Reads that column once, and keeps 4 bytes for each sample (8, from 2^32 samples on). Samples of
    damaged shards are left out, where the data set skips these.

    Args:
        dataset: whose samples.
        column: of whole numbers, one for each sample.
        weights: class -> weight of each of its samples, >= 0: a sample is drawn with a probability
            proportional to it. None: 1 / (samples of its class), so that all classes are drawn
            equally often.

    Attributes:
        counts: class -> how many samples.
        draws: in an epoch: as many as the data set has samples.

    Raises:
        ConfigError: no such column, it has no classes, or weights of other classes.
        DataError: a shard is damaged.

    Example:
        >>> import tempfile
        >>> from scaledtrain.data.sharded import ShardedLoader, ShardWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ShardWriter(folder.name) as writer:
        ...     writer.write_batch({"label": [0] * 990 + [1] * 10})
        >>> data = ShardedDataset(folder.name)
        >>> loader = ShardedLoader(data, 1_000, balance=ClassBalance(data, "label"))
        >>> [int(batch["label"].sum()) for batch in loader]  # of 1_000
        [500]
        >>> folder.cleanup()
    """

    def __init__(
        self, dataset: ShardedDataset, column: str, weights: Mapping[int, float] | None = None
    ) -> None:
        labels, readable = _labels(dataset, column)
        small = np.uint32 if len(dataset) < 2**32 else np.uint64
        self._samples = readable.astype(small)[np.argsort(labels, kind="stable")]
        self.draws = len(dataset)
        classes, sizes = np.unique(labels, return_counts=True)
        if len(classes) > MOST_CLASSES:
            raise ConfigError(
                f"column {column!r} has {len(classes)} different values, more than "
                f"{MOST_CLASSES}, which are no classes"
            )
        self.counts = {int(k): int(n) for k, n in zip(classes, sizes, strict=True)}
        if weights is None:
            weights = {label: 1 / n for label, n in self.counts.items()}
        if weights.keys() != self.counts.keys():
            raise ConfigError(
                f"weights are given for the classes {sorted(weights)}, but column {column!r} has "
                f"{sorted(self.counts)}; give one for each of these (0: never drawn)"
            )
        each = np.array([weights[label] for label in self.counts], np.float64)
        total = float((each * sizes).sum())
        if not (each >= 0).all() or not 0 < total < np.inf:
            raise ConfigError(f"weights are {dict(weights)}; they are numbers >= 0, not all 0")
        self._sizes = sizes
        self._firsts = np.cumsum(sizes) - sizes
        self._bounds = np.cumsum(each * sizes / total)
        # Rounding must not leave a gap behind the last class that can be drawn.
        self._bounds[np.flatnonzero(each)[-1] :] = 1.0

    def order(self, seed: int) -> WeightedOrder:
        """The order of the draws under a seed."""
        return WeightedOrder(
            self.draws, self._samples, self._firsts, self._sizes, self._bounds, seed
        )


class WeightedOrder:
    """Draws with replacement: a pure function of the seed, the epoch and the position.

    A `SampleOrder`: position p of an epoch has the same sample whoever reads it, on
    any number of ranks, and is found in constant time. An epoch has as many draws as there are
    samples. Each is read from somewhere else in the data set, as with ``shuffle="full"``.

    Args:
        draws: in an epoch.
        of_classes: the samples, class after class.
        firsts: int64 ``[classes]``: where each class begins there.
        sizes: int64 ``[classes]``: how many it has.
        bounds: float64 ``[classes]``, rising to 1: which part of all draws is of it or of one
            before it.
        seed: >= 0.

    Raises:
        ConfigError: the seed is negative.
    """

    def __init__(
        self,
        draws: int,
        of_classes: Array,
        firsts: Array,
        sizes: Array,
        bounds: Array,
        seed: int,
    ) -> None:
        if seed < 0:
            raise ConfigError(f"seed is {seed}; it is a whole number >= 0")
        self.samples = draws
        self.seed = seed
        self._of_classes = of_classes
        self._firsts, self._sizes, self._bounds = firsts, sizes, bounds

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at positions ``start`` to ``stop`` of an epoch, int64 ``[stop - start]``.

        Raises:
            IndexError: positions that an epoch does not have.
        """
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"positions {start} to {stop} of {self.samples}")
        key = np.random.SeedSequence(self.seed, spawn_key=(_OF_DRAWS, epoch))
        random = np.random.Philox(key)
        random.advance(start)  # in counts of its counter: one for each draw
        words = random.random_raw(_WORDS * (stop - start)).reshape(-1, _WORDS)
        uniform = (words[:, 0] >> np.uint64(11)) * 2.0**-53
        drawn = np.searchsorted(self._bounds, uniform, side="right")
        within = (words[:, 1] % self._sizes[drawn].astype(np.uint64)).astype(np.int64)
        found: Array = self._of_classes[self._firsts[drawn] + within].astype(np.int64)
        return found

    def group_end(self, epoch: int, position: int) -> int:
        """There is one group, as of an `Order` without blocks."""
        return self.samples

    def identity(self) -> dict[str, Any]:
        """What makes it this order and no other."""
        told = hashlib.sha256(self._sizes.tobytes() + self._bounds.tobytes()).hexdigest()[:16]
        return {"samples": self.samples, "shuffle": "balance", "weights": told, "seed": self.seed}


def _labels(dataset: ShardedDataset, column: str) -> tuple[Array, Array]:
    """The class of every sample that can be read, and which these are."""
    kind = dataset.manifest.columns.get(column)
    if kind is None or kind.shape or kind.ragged or "float" in kind.dtype:
        raise ConfigError(
            f"column {column!r} of {dataset.folder} is {kind or 'not there'}; classes are whole "
            "numbers, one for each sample"
        )
    reader = dataset.only(column)
    labels, readable = [], []
    for low in range(0, len(dataset), SAMPLES_PER_READ):
        indices = np.arange(low, min(low + SAMPLES_PER_READ, len(dataset)))
        batch, kept = reader.gather(indices, read_ahead=True)
        values = batch[column]
        assert isinstance(values, Tensor)
        labels.append(values.numpy())
        readable.append(indices[kept])
    if not sum(map(len, labels)):
        raise ConfigError(f"the data set in {dataset.folder} has no samples to draw from")
    return np.concatenate(labels), np.concatenate(readable)
