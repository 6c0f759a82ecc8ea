"""Batches of a sharded data set, read in the background in long reads, and mixed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch

from scaledtrain.balance.division import Division
from scaledtrain.data.sharded.balance import ClassBalance
from scaledtrain.data.sharded.batching import (
    Batching,
    EqualBatches,
    LengthBuckets,
    Span,
)
from scaledtrain.data.sharded.dataset import Batch, ShardedDataset
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.data.sharded.mixture import Mixture
from scaledtrain.data.sharded.order import Endless, SampleOrder, Shuffle
from scaledtrain.data.sharded.padding import Padding, check_ragged
from scaledtrain.data.sharded.read_ahead import ReadAhead
from scaledtrain.errors import ConfigError

__all__ = ["ShardedLoader"]

BLOCK_BYTES = 2**20
BUFFER_BYTES = 64 * 2**20
PART_BYTES = 8 * 2**20  # put together at once: new memory is slow, and this little is used again


class ShardedLoader:
    """Batches of a `ShardedDataset`: shuffled well, read sequentially, resumed anywhere.

    The samples of an epoch have an `Order`, a pure function of the seed and the epoch, and batch i
    is positions ``i * batch_size`` to ``(i + 1) * batch_size`` of it. Replica r of R takes batches
    r, r + R, ...: so the batches of a step are the same samples whatever the number of replicas,
    and each replica reads its own alone. The Trainer, the simulator and `ReplicaLoader` do that by
    themselves, also where they go on inside an epoch; a loop of your own iterates over this loader,
    or over ``loader.batches(epoch, start=rank, step=ranks)``.

    Samples of different lengths come as they are (`Ragged`) or padded, and with ``bucket_by`` in
    batches of similar length: those of a group of blocks are sorted by length, cut into batches,
    and the batches shuffled. Each sample is still given once in an epoch, and which samples are in
    a batch is the same for any number of replicas. See `LengthBuckets`.

    Threads read ahead of the loop: groups of blocks are brought into the page cache, each block
    being read as a whole, and batches are put together from there, some at a time, of which they
    are slices. The first batches of an iteration are read alone, so that they come soon. In memory,
    beside the page cache, are at most ``2 + threads`` times 8 MiB, or as many batches where one is
    larger (and once more while a `Mixture` is read); of compressed sets groups of ``buffer_bytes``,
    divided by the number of replicas. A batch that is kept keeps what was put together with it.

    Args:
        dataset: whose samples, or a `Mixture` of several; its ``on_damage`` decides what a damaged
            shard does. A batch that lost some of its samples is smaller.
        batch_size: of each replica.
        shuffle: ``"block"``, ``"full"`` or ``"none"``, see `Order`.
        drop_last: leave out a last batch that is smaller than the others.
        balance: draw samples with replacement, by the weights of their classes, in place of
            ``shuffle``; an epoch has as many draws as there are samples. Each is read alone, as
            with ``shuffle="full"``.
        infinite: the epochs follow one another without an end, and no batch is smaller than the
            others: one may have the last samples of an epoch and the first of the next. There is no
            length then, and ``state_dict`` counts from where the stream began.
        bucket_by: a ragged column: batches are of samples that are of similar length in it.
        max_tokens: the most that the lengths in a batch may add up to (each counted as the longest,
            if that column is padded); ``batch_size`` then is the most samples. A sample that is
            longer comes alone. How many batches an epoch has is only known at its end; and to go
            on inside one elsewhere than by ``load_state_dict``, as the Trainer does, the lengths of
            what comes before are read, but no samples.
        pad: ragged column -> value: pad its samples to the longest of the batch,
            ``[batch_size, longest, *shape]``.
        seed: of the order; None: the Trainer's, and 0 in a loop of your own.
        block_bytes: how long a read is: so many bytes of consecutive samples, at least one sample.
            The more, the better for slow disks and networks.
        buffer_bytes: bytes of the blocks that are mixed with each other. The more, the better
            shuffled: a set that is no larger is shuffled fully.
        read_ahead: groups that are brought into the page cache before they are needed.
        threads: that read, check and copy.
        pin_memory: page-locked memory, so that copies to a CUDA device are asynchronous; None:
            where there is such a device.
        timeout_seconds: the longest wait for a batch.

    Attributes:
        epoch: that an iteration is in, or begins with.
        infinite: as given.

    Raises:
        ConfigError: a size that is not >= 1, or options that cannot be together.
        DataError: while iterating: a shard is damaged, or the storage does not answer in time.

    Example:
        >>> import tempfile
        >>> from scaledtrain.data.sharded import ShardWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ShardWriter(folder.name) as writer:
        ...     writer.write_batch({"x": range(10)})
        >>> loader = ShardedLoader(ShardedDataset(folder.name), batch_size=4)
        >>> [len(batch["x"]) for batch in loader]
        [4, 4, 2]
        >>> whole = [batch["x"].tolist() for batch in loader.batches(epoch=1)]
        >>> odd = [batch["x"].tolist() for batch in loader.batches(epoch=1, start=1, step=2)]
        >>> odd == whole[1::2]
        True
        >>> folder.cleanup()

    References:
        Xu et al. 2022, CorgiPile, arXiv:2206.05830.
    """

    def __init__(
        self,
        dataset: ShardedDataset | Mixture,
        batch_size: int,
        *,
        shuffle: Shuffle = "block",
        drop_last: bool = False,
        balance: ClassBalance | None = None,
        infinite: bool = False,
        seed: int | None = None,
        bucket_by: str | None = None,
        max_tokens: int | None = None,
        pad: Mapping[str, float] | None = None,
        block_bytes: int = BLOCK_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
        read_ahead: int = 2,
        threads: int = 2,
        pin_memory: bool | None = None,
        timeout_seconds: float = 300.0,
    ) -> None:
        sizes = {
            "batch_size": batch_size,
            "max_tokens": 1 if max_tokens is None else max_tokens,
            "block_bytes": block_bytes,
            "buffer_bytes": buffer_bytes,
            "read_ahead": read_ahead,
            "threads": threads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} is {size}; it is a whole number >= 1")
        if max_tokens is not None and (bucket_by is None or drop_last):
            raise ConfigError(
                f"max_tokens is {max_tokens}, which needs bucket_by, the column whose lengths are "
                "counted, and has no use for drop_last: all batches differ in size"
            )
        if pin_memory and not torch.cuda.is_available():
            raise ConfigError("pin_memory is true, but there is no CUDA device; give None")
        self.dataset = dataset
        self.batch_size = batch_size
        self.epoch = 0
        self._batches = 0  # of the epoch, and their samples, that were given
        self._position = 0
        self._resumes = False
        if balance is not None and isinstance(dataset, Mixture):
            raise ConfigError(
                "balance is of the classes of one data set, but this is a Mixture of several; give "
                "its sources weights instead"
            )
        if balance is not None and balance.draws != len(dataset):
            raise ConfigError(
                f"balance is of a data set of {balance.draws} samples, but this one has "
                f"{len(dataset)}; make it of this one: ClassBalance(dataset, column)"
            )
        self.infinite = infinite
        self._drop_last = drop_last
        self._seed = seed
        self._bucket_by = bucket_by
        self._max_tokens = max_tokens
        self._make_order: Callable[[int], SampleOrder] = (
            partial(dataset.order, shuffle, block_bytes, buffer_bytes)
            if balance is None
            else balance.order
        )
        self._shuffled = shuffle != "none" or balance is not None
        self._most = max(1, int(buffer_bytes / max(1.0, dataset.sample_bytes)))
        part_bytes = buffer_bytes if dataset.is_compressed else PART_BYTES
        memory = Memory(torch.cuda.is_available() if pin_memory is None else pin_memory)
        self._padding = Padding(dataset.columns, pad or {}, memory)
        self._reading = ReadAhead(
            dataset,
            self._padding,
            memory,
            threads=threads,
            part_samples=max(1, int(part_bytes / max(1.0, dataset.sample_bytes))),
            windows=read_ahead,
            timeout_seconds=timeout_seconds,
        )
        if bucket_by is not None:
            check_ragged("bucket_by", bucket_by, dataset.columns)
        self._batchings: dict[int, Batching] = {}
        self._batching()  # whose arguments are checked now

    def __len__(self) -> int:
        """Batches in an epoch, those of all replicas.

        Raises:
            TypeError: there is no end, or only that will tell (``max_tokens``).
        """
        batches = self._batching().batches
        if batches is None:
            raise TypeError("a ShardedLoader that is infinite or has max_tokens has no length")
        return batches

    def order(self, seed: int | None = None) -> SampleOrder:
        """The order of the samples, before they are put into buckets, if the Trainer has this seed.

        Of an infinite loader the endless one.
        """
        return self._batching(seed).order

    def __iter__(self) -> Iterator[Batch]:
        """The batches of ``epoch``, which then is the next one.

        After ``load_state_dict`` it is the rest of that epoch. An iteration that is left before its
        end does not count: the next one begins the same epoch again.
        """
        if not self._resumes:
            self._batches = self._position = 0
        self._resumes = False
        start = self._batching().resume(self.epoch, self._batches, self._position)
        with closing(self._spans(self.epoch, start, 1, None)) as spans:
            for number, ((_, stop), batch) in enumerate(spans, start + 1):
                self._batches, self._position = number, stop
                if batch is not None:
                    yield batch
        self.epoch, self._batches, self._position = self.epoch + 1, 0, 0

    def batches(
        self, epoch: int, start: int = 0, step: int = 1, seed: int | None = None
    ) -> Generator[Batch | None, None, None]:
        """Batches ``start``, ``start + step``, ... of an epoch; no other is read.

        Args:
            epoch: which; of an infinite loader the one that it begins with.
            start: the first batch.
            step: from each to the next: the number of replicas.
            seed: of the order, where the loader was given none.

        Yields:
            Dicts or tuples, as the data set was told, of tensors ``[batch_size, *shape]`` and
            `Ragged`; None for a batch whose samples are all in damaged shards that are skipped,
            and, with ``max_tokens``, where the epoch ends unevenly: all ``step`` iterations are
            equally long.
        """
        for _, batch in self._spans(epoch, start, step, seed):
            yield batch

    def _spans(
        self, epoch: int, start: int, step: int, seed: int | None
    ) -> Generator[tuple[Span, Batch | None], None, None]:
        """Batches and where they lie in the epoch."""
        batching = self._batching(seed)
        yield from self._reading.batches(batching, epoch, batching.windows(epoch, start, step))

    def parts(
        self, epoch: int, start: int, batches: int, division: Division, seed: int | None = None
    ) -> Generator[tuple[list[Batch], int], None, None]:
        """One rank's part of each step, from any step on; nothing else is read.

        A step is so many batches one after the other, the same samples as `batches` gives.

        Args:
            epoch: as in `batches`.
            start: the first batch.
            batches: of a step, of all ranks together.
            division: which of a step's samples are this rank's, and how they are cut.
            seed: as in `batches`.

        Yields:
            This rank's microbatches, and how many samples the step has.
        """
        batching = self._batching(seed)
        found: deque[tuple[int, int]] = deque()  # of each step: microbatches to come, and samples

        def windows() -> Iterator[list[Span | None]]:
            step: list[Span] = []
            for window in batching.windows(epoch, start, 1):
                mine: list[Span | None] = []
                for span in window:
                    step.append(span or (0, 0))
                    if len(step) == batches:
                        mine += of_step(step)
                        step = []
                if mine:
                    yield mine
            if step:
                yield of_step(step)

        def of_step(step: list[Span]) -> list[Span | None]:
            first, stop = step[0][0], step[-1][1]
            low, high = (first + end for end in division.part(stop - first))
            if self._bucket_by is None:
                spans = division.pieces(low, high, division.microbatches)
            else:  # no longer padded than in their batches
                within = [(max(low, a), min(high, b)) for a, b in step]
                spans = [piece for a, b in within for piece in division.pieces(a, b)]
            found.append((max(1, len(spans)), stop - first))
            return [*spans] or [None]

        with closing(self._reading.batches(batching, epoch, windows())) as read:
            mine: list[Batch | None] = []
            for _, batch in read:
                mine.append(batch)
                if len(mine) == found[0][0]:
                    yield [one for one in mine if one is not None], found.popleft()[1]
                    mine = []

    def state_dict(self) -> dict[str, Any]:
        """Where an iteration over this loader is: what it gave, not what it has read ahead."""
        return {
            "epoch": self.epoch,
            "batches": self._batches,
            "samples": self._position,
            "order": self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on where ``state_dict`` was called, whatever the batch size was.

        With ``bucket_by`` the batch size has to be the same, too.

        Raises:
            ConfigError: the order is another one, or the place is inside a batch of this size.
        """
        mine, then = self._identity(), state["order"]
        for name in dict.fromkeys([*mine, *then]):
            if then.get(name) != mine.get(name):
                raise ConfigError(
                    f"the state is of an order with {name} {then.get(name)}, but this loader has "
                    f"{mine.get(name)}, which is another order of the samples; give it the same, "
                    "or begin a new epoch"
                )
        self._batching().resume(state["epoch"], state["batches"], state["samples"])
        self.epoch = state["epoch"]
        self._batches, self._position = state["batches"], state["samples"]
        self._resumes = True

    def _identity(self) -> dict[str, Any]:
        batching = self._batching()
        own = {"infinite": self.infinite, "bucket_by": self._bucket_by}
        return {**batching.order.identity(), **own, **batching.identity()}

    def _batching(self, seed: int | None = None) -> Batching:
        """The batches of every epoch, if the Trainer has this seed."""
        drawn = self._seed if self._seed is not None else seed or 0
        if drawn not in self._batchings:
            order: SampleOrder = self._make_order(drawn)
            if self.infinite:
                order = Endless(order)
            self._batchings[drawn] = self._cut(order)
        return self._batchings[drawn]

    def _cut(self, order: SampleOrder) -> Batching:
        ends = {"drop_last": self._drop_last, "endless": self.infinite}
        if self._bucket_by is None:
            return EqualBatches(order, self.batch_size, self._most, **ends)
        return LengthBuckets(
            order,
            partial(self.dataset.lengths, column=self._bucket_by),
            self.batch_size,
            self._most,
            max_tokens=self._max_tokens,
            padded=self._bucket_by in self._padding.values,
            shuffled=self._shuffled,
            **ends,
        )
