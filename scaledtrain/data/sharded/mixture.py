"""Several sharded data sets as one, in given proportions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.columns import Array, Column
from scaledtrain.data.sharded.dataset import Batch, ShardedDataset
from scaledtrain.data.sharded.gather import Values
from scaledtrain.data.sharded.interleave import Interleave
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.data.sharded.order import Endless, SampleOrder, Shuffle
from scaledtrain.errors import ConfigError

__all__ = ["Mixture", "Stop"]

Stop = Literal["first_exhausted", "all_exhausted"] | int


class Mixture:
    """Several data sets in one stream, each with a share of the samples; for a `ShardedLoader`.

    The sources take turns as evenly as can be (`Interleave`): of any p samples in a row, from
    wherever, source i has p times its share, give or take ``ceil(log2(sources))``, and half as much
    from the beginning of an epoch. So a batch has the proportions of the whole, not only on
    average. Which samples these are is a pure function of (seed, epoch, position), whatever the
    number of ranks, and any position is found without a look at those before it.

    Each source has the order that it would have alone. It is passed through whole before one of its
    samples comes again, then in a new order, and goes on in an epoch where it was at the end of the
    one before.

    Batches of one sample leave no room for proportions: with weights 1 and 1 on two replicas, each
    gets one of the sources alone.

    Args:
        sources: (data set, weight) of each; weights are > 0, of any sum. All have the same columns.
        stop: when an epoch ends. ``"first_exhausted"``: when the first of the sources has been
            passed through once, so that no sample comes twice in the first epoch.
            ``"all_exhausted"``: when the last has, while the others begin anew. A number: after so
            many samples, wherever the sources are.

    Attributes:
        sources: the data sets.
        columns: those that are read, by name.
        shares: whole numbers in proportion to the weights.

    Raises:
        ConfigError: a weight that is not > 0, an empty source, or sources that do not go together.

    Example:
        >>> import tempfile
        >>> from scaledtrain.data import ShardedDataset, ShardedLoader, ShardWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name, samples in (("web", range(6)), ("books", range(100, 102))):
        ...     with ShardWriter(f"{folder.name}/{name}") as writer:
        ...         writer.write_batch({"x": samples})
        >>> web, books = (ShardedDataset(f"{folder.name}/{name}") for name in ("web", "books"))
        >>> mixture = Mixture([(web, 0.75), (books, 0.25)])
        >>> len(mixture)  # of books there are 2, which is 1/4 of 8
        8
        >>> batches = ShardedLoader(mixture, batch_size=4).batches(epoch=0)
        >>> [int((batch["x"] >= 100).sum()) for batch in batches]
        [1, 1]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        sources: Sequence[tuple[ShardedDataset, float]],
        stop: Stop = "first_exhausted",
    ) -> None:
        self.sources = [dataset for dataset, _ in sources]
        self._interleave = Interleave([weight for _, weight in sources])
        self.shares = self._interleave.shares
        if stop not in ("first_exhausted", "all_exhausted") and (
            isinstance(stop, (str, bool)) or stop < 1
        ):
            raise ConfigError(
                f"stop is {stop!r}; it is 'first_exhausted', 'all_exhausted' or the samples of an "
                "epoch, >= 1"
            )
        self._stop: Stop = stop
        for dataset in self.sources:
            if not len(dataset):
                raise ConfigError(
                    f"the data set in {dataset.folder} is empty and cannot have a share of a "
                    "mixture; leave it out"
                )
            _check_alike(self.sources[0], dataset)
        self.columns: Mapping[str, Column] = self.sources[0].columns
        self._sizes = [len(dataset) for dataset in self.sources]
        self._firsts: Array = np.cumsum([0, *self._sizes], dtype=np.int64)
        self._samples = self._epoch_samples()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self._samples

    @property
    def sample_bytes(self) -> float:
        """What a sample takes in the files on average, in the proportions of the mixture."""
        each = (dataset.sample_bytes for dataset in self.sources)
        return sum(map(math.prod, zip(each, self.shares, strict=True))) / sum(self.shares)

    @property
    def folder(self) -> str:
        """Where the sources are, for messages."""
        return " and ".join(str(dataset.folder) for dataset in self.sources)

    def order(self, shuffle: Shuffle, block_bytes: int, buffer_bytes: int, seed: int) -> MixedOrder:
        """The order of the samples, see `ShardedDataset.order`; source i is seeded on its own.

        A sample's number is counted through all sources, in their order.
        """
        orders = [
            dataset.order(shuffle, block_bytes, buffer_bytes, seed + (i << 128))
            for i, dataset in enumerate(self.sources)
        ]
        goes_on = not isinstance(self._stop, str)
        return MixedOrder(orders, self._interleave, self._samples, goes_on, seed)

    def gather(
        self, indices: Array, memory: Memory | None = None, read_ahead: bool = False
    ) -> tuple[dict[str, Values], Array]:
        """A batch, and which of the samples are in it; see `ShardedDataset.gather`."""
        memory = memory or Memory()
        kept = np.ones(len(indices), bool)
        parts = []
        for source, places in self._by_source(indices):
            own = indices[places] - self._firsts[source]
            values, kept[places] = self.sources[source].gather(own, memory, read_ahead)
            parts.append((values, places))
        row = np.cumsum(kept) - 1  # of each sample among those that are kept
        rows = [row[places[kept[places]]] for _, places in parts]
        batch: dict[str, Values] = {}
        for name, column in self.columns.items():
            merge = _merge_ragged if column.ragged else _merge_fixed
            of_column = [values[name] for values, _ in parts]
            batch[name] = merge(of_column, rows, int(kept.sum()), column, memory)  # type: ignore[arg-type]
        return batch, kept

    @property
    def is_compressed(self) -> bool:
        """Whether any source is."""
        return any(source.is_compressed for source in self.sources)

    def read_ahead(self, indices: Array) -> None:
        """Ask the kernel for samples; see `ShardedDataset.read_ahead`."""
        for source, places in self._by_source(indices):
            self.sources[source].read_ahead(indices[places] - self._firsts[source])

    def lengths(self, indices: Array, column: str) -> Array:
        """How long these samples of a ragged column are, int64 ``[n]``."""
        found = np.zeros(len(indices), np.int64)
        for source, places in self._by_source(indices):
            own = indices[places] - self._firsts[source]
            found[places] = self.sources[source].lengths(own, column)
        return found

    def form(self, columns: Mapping[str, Values]) -> Batch:
        """A dict or a tuple, as the data sets were told."""
        return self.sources[0].form(columns)

    def _by_source(self, indices: Array) -> list[tuple[int, Array]]:
        """The sources of a batch, and the places of its samples of each."""
        owners = np.searchsorted(self._firsts, indices, side="right") - 1
        return [(int(i), np.flatnonzero(owners == i)) for i in np.unique(owners)]

    def _epoch_samples(self) -> int:
        if not isinstance(self._stop, str):
            return self._stop
        first = self._stop == "first_exhausted"

        def over(position: int) -> bool:
            """Whether an epoch of so many samples takes too many, or enough of all."""
            pairs = list(zip(self._interleave.counts(position), self._sizes, strict=True))
            return any(n > size for n, size in pairs) if first else all(n >= s for n, s in pairs)

        low, high = 0, sum(self._sizes) + 1
        while not over(high):
            high *= 2
        while high - low > 1:  # over(high), and not over(low)
            middle = (low + high) // 2
            low, high = (low, middle) if over(middle) else (middle, high)
        return low if first else high


class MixedOrder:
    """The order of a mixture's samples; see `Mixture`.

    Args:
        orders: of the sources.
        interleave: whose turn it is.
        samples: in an epoch.
        goes_on: the turns go on from epoch to epoch, too, rather than begin anew in each.
        seed: of the orders.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        interleave: Interleave,
        samples: int,
        goes_on: bool,
        seed: int,
    ) -> None:
        self.seed = seed
        self.samples = samples
        self._orders = orders
        self._streams = [Endless(order) for order in orders]
        self._firsts = np.cumsum([0, *(order.samples for order in orders)]).tolist()
        self._interleave = interleave
        self._goes_on = goes_on
        self._counts = interleave.counts(samples)

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at positions ``start`` to ``stop`` of an epoch, int64 ``[stop - start]``.

        Raises:
            IndexError: positions that an epoch does not have.
        """
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"positions {start} to {stop} of {self.samples}")
        behind = epoch * self.samples if self._goes_on else 0
        sources, numbers = self._interleave.take(behind + start, behind + stop)
        found = np.empty(stop - start, np.int64)
        for source, stream in enumerate(self._streams):
            places = np.flatnonzero(sources == source)
            if len(places):  # its numbers follow one another
                begun = 0 if self._goes_on else epoch * self._counts[source]
                low = begun + int(numbers[places[0]])
                found[places] = stream.indices(0, low, low + len(places)) + self._firsts[source]
        return found

    def group_end(self, epoch: int, position: int) -> int:
        """The end of the epoch: the groups of the sources lie across each other."""
        return self.samples

    def identity(self) -> dict[str, Any]:
        """What makes it this order and no other."""
        return {
            "samples": self.samples,
            "shares": list(self._interleave.shares),
            "goes_on": self._goes_on,
            "seed": self.seed,
            "sources": [{**order.identity(), "seed": None} for order in self._orders],
        }


def _check_alike(one: ShardedDataset, other: ShardedDataset) -> None:
    if list(one.columns.items()) != list(other.columns.items()):
        raise ConfigError(
            f"{one.folder} has the columns {dict(one.columns)}, but {other.folder} has "
            f"{dict(other.columns)}; a mixture needs the same columns in the same order: choose "
            "them with ShardedDataset(folder, columns)"
        )
    if type(one.form({})) is not type(other.form({})):
        raise ConfigError(
            f"one of {one.folder} and {other.folder} gives tuples, the other dicts; give both the "
            "same as_tuple"
        )


def _merge_fixed(
    parts: Sequence[Tensor], rows: Sequence[Array], samples: int, column: Column, memory: Memory
) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    tensor, batch = memory.empty(column, samples, *column.shape)
    for part, places in zip(parts, rows, strict=True):
        batch[places] = _stored(part)
    return tensor


def _merge_ragged(
    parts: Sequence[Ragged], rows: Sequence[Array], samples: int, column: Column, memory: Memory
) -> Ragged:
    if len(parts) == 1:
        return parts[0]
    offsets = np.zeros(samples + 1, np.int64)
    for part, places in zip(parts, rows, strict=True):
        offsets[places + 1] = np.diff(part.offsets.numpy())
    np.cumsum(offsets, out=offsets)
    tensor, values = memory.empty(column, int(offsets[-1]), *column.shape)
    for part, places in zip(parts, rows, strict=True):
        starts = part.offsets.numpy()
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
        values[np.repeat(offsets[places], np.diff(starts)) + within] = _stored(part.values)
    return Ragged(tensor, torch.from_numpy(offsets))


def _stored(tensor: Tensor) -> Array:
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
