"""Batches of a sharded data set, read in the background in long reads, and mixed."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.balance import ClassBalance, WeightedOrder
from scaledtrain.data.sharded.dataset import Batch, ShardedDataset
from scaledtrain.data.sharded.gather import Values
from scaledtrain.data.sharded.memory import Memory
from scaledtrain.data.sharded.order import Order, Shuffle
from scaledtrain.errors import ConfigError, DataError

__all__ = ["ShardedLoader"]

BLOCK_BYTES = 2**20
BUFFER_BYTES = 64 * 2**20


class ShardedLoader:
    """Batches of a `ShardedDataset`: shuffled well, read sequentially, resumed anywhere.

    The samples of an epoch have an `Order`, a pure function of the seed and the epoch, and batch i
    is positions ``i * batch_size`` to ``(i + 1) * batch_size`` of it. Replica r of R takes batches
    r, r + R, ...: so the batches of a step are the same samples whatever the number of replicas,
    and each replica reads its own alone. The Trainer, the simulator and `ReplicaLoader` do that by
    themselves, also where they go on inside an epoch; a loop of your own iterates over this loader,
    or over ``loader.batches(epoch, start=rank, step=ranks)``.

    Threads read ahead of the loop: the batches of a group of blocks are put together at once, each
    block being read as a whole, and are then slices of that memory. The first batches of an
    iteration are read alone, so that they come soon. In memory are at most ``2 + read_ahead``
    groups, of ``buffer_bytes`` each, divided by the number of replicas; a batch that is kept keeps
    its group.

    Args:
        dataset: whose samples; its ``on_damage`` decides what a damaged shard does. A batch that
            lost some of its samples is smaller.
        batch_size: of each replica.
        shuffle: ``"block"``, ``"full"`` or ``"none"``, see `Order`.
        drop_last: leave out a last batch that is smaller than the others.
        balance: draw samples with replacement, by the weights of their classes, in place of
            ``shuffle``; an epoch has as many draws as there are samples. Each is read alone, as
            with ``shuffle="full"``.
        seed: of the order; None: the Trainer's, and 0 in a loop of your own.
        block_bytes: how long a read is: so many bytes of consecutive samples, at least one sample.
            The more, the better for slow disks and networks.
        buffer_bytes: bytes of the blocks that are mixed with each other. The more, the better
            shuffled: a set that is no larger is shuffled fully.
        read_ahead: groups that are read before they are needed.
        threads: that read.
        pin_memory: page-locked memory, so that copies to a CUDA device are asynchronous; None:
            where there is such a device.
        timeout_seconds: the longest wait for a batch.

    Attributes:
        epoch: that an iteration is in, or begins with.

    Raises:
        ConfigError: a size that is not >= 1.
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
        dataset: ShardedDataset,
        batch_size: int,
        *,
        shuffle: Shuffle = "block",
        drop_last: bool = False,
        balance: ClassBalance | None = None,
        seed: int | None = None,
        block_bytes: int = BLOCK_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
        read_ahead: int = 2,
        threads: int = 2,
        pin_memory: bool | None = None,
        timeout_seconds: float = 300.0,
    ) -> None:
        sizes = {
            "batch_size": batch_size,
            "block_bytes": block_bytes,
            "buffer_bytes": buffer_bytes,
            "read_ahead": read_ahead,
            "threads": threads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} is {size}; it is a whole number >= 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.epoch = 0
        self._position = 0  # in the epoch: samples that were given
        self._resumes = False
        self._shuffle: Shuffle = shuffle if balance is None else "full"
        self._balance = balance
        if balance is not None and balance.draws != len(dataset):
            raise ConfigError(
                f"balance is of a data set of {balance.draws} samples, but this one has "
                f"{len(dataset)}; make it of this one: ClassBalance(dataset, column)"
            )
        self._drop_last = drop_last
        self._seed = seed
        sample_bytes = max(1.0, dataset.sample_bytes)
        self._block_samples = max(1, int(block_bytes / sample_bytes))
        self._buffer_blocks = max(1, int(buffer_bytes / (sample_bytes * self._block_samples)))
        self._read_ahead = read_ahead
        self._threads = _Threads(threads)
        self._memory = Memory(torch.cuda.is_available() if pin_memory is None else pin_memory)
        self._timeout_seconds = timeout_seconds
        self._orders: dict[int, Order | WeightedOrder] = {}
        self.order(0)  # whose arguments are checked now

    def __len__(self) -> int:
        """Batches in an epoch, those of all replicas."""
        samples = len(self.dataset)
        return (samples if self._drop_last else samples + self.batch_size - 1) // self.batch_size

    def order(self, seed: int | None = None) -> Order | WeightedOrder:
        """The order of the samples, if the Trainer has this seed."""
        drawn = self._seed if self._seed is not None else seed or 0
        if drawn not in self._orders:
            if self._balance is not None:
                self._orders[drawn] = self._balance.order(drawn)
            else:
                shards = [shard.samples for shard in self.dataset.manifest.shards]
                self._orders[drawn] = Order(
                    shards, self._block_samples, self._buffer_blocks, self._shuffle, drawn
                )
        return self._orders[drawn]

    def __iter__(self) -> Iterator[Batch]:
        """The batches of ``epoch``, which then is the next one.

        After ``load_state_dict`` it is the rest of that epoch. An iteration that is left before its
        end does not count: the next one begins the same epoch again.
        """
        if not self._resumes:
            self._position = 0
        self._resumes = False
        with closing(self.batches(self.epoch, self._position // self.batch_size)) as batches:
            for batch in batches:
                self._position += self.batch_size
                if batch is not None:
                    yield batch
        self.epoch, self._position = self.epoch + 1, 0

    def batches(
        self, epoch: int, start: int = 0, step: int = 1, seed: int | None = None
    ) -> Generator[Batch | None, None, None]:
        """Batches ``start``, ``start + step``, ... of an epoch; no other is read.

        Args:
            epoch: which.
            start: the first batch.
            step: from each to the next: the number of replicas.
            seed: of the order, where the loader was given none.

        Yields:
            Dicts or tuples, as the data set was told, of tensors ``[batch_size, *shape]`` and
            `Ragged`; None for a batch whose samples are all in damaged shards that are skipped.
        """
        order = self.order(seed)
        ahead: deque[Future[list[Batch | None]]] = deque()
        with self._threads.running() as pool:
            try:
                for window in self._windows(order, epoch, start, step):
                    ahead.append(pool.submit(self._read, order, epoch, window))
                    if len(ahead) > self._read_ahead:
                        yield from self._wait(ahead.popleft())
                while ahead:
                    yield from self._wait(ahead.popleft())
            finally:
                for unread in ahead:
                    unread.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Where an iteration over this loader is: what it gave, not what it has read ahead."""
        return {"epoch": self.epoch, "samples": self._position, "order": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on where ``state_dict`` was called, whatever the batch size was.

        Raises:
            ConfigError: the order is another one, or the place is inside a batch of this size.
        """
        mine, then = self._identity(), state["order"]
        for name, value in mine.items():
            if then.get(name) != value:
                raise ConfigError(
                    f"the state is of an order with {name} {then.get(name)}, but this loader has "
                    f"{value}, which is another order of the samples; give it the same, or begin "
                    "a new epoch"
                )
        if state["samples"] % self.batch_size:
            raise ConfigError(
                f"the state is behind sample {state['samples']} of its epoch, which is inside a "
                f"batch of {self.batch_size}; give a batch_size that divides it"
            )
        self.epoch, self._position = state["epoch"], state["samples"]
        self._resumes = True

    def _identity(self) -> dict[str, Any]:
        order = self.order()
        if isinstance(order, WeightedOrder):
            return order.identity()
        names = ("samples", "shuffle", "block_samples", "buffer_blocks", "seed")
        return {name: getattr(order, name) for name in names}

    def _windows(
        self, order: Order | WeightedOrder, epoch: int, start: int, step: int
    ) -> Iterator[range]:
        """Which batches are read at once: those that begin in one group; at first fewer."""
        bounds = order.group_bounds(epoch)
        most = self._block_samples * self._buffer_blocks * step
        number, width = start, 1
        while number < len(self):
            position = number * self.batch_size
            end = position + most
            if self._shuffle == "block":
                end = int(bounds[np.searchsorted(bounds, position, side="right")])
            stop = min(math.ceil(end / self.batch_size), number + width * step, len(self))
            window = range(number, stop, step)
            yield window
            number, width = window[-1] + step, 2 * width

    def _read(self, order: Order | WeightedOrder, epoch: int, window: range) -> list[Batch | None]:
        """The batches of a window."""
        size, samples = self.batch_size, len(self.dataset)
        starts = [number * size for number in window]
        stops = [min(start + size, samples) for start in starts]
        if window.step == 1:
            indices = order.indices(epoch, starts[0], stops[-1])
        else:
            parts = zip(starts, stops, strict=True)
            indices = np.concatenate([order.indices(epoch, low, high) for low, high in parts])
        values, kept = self.dataset.gather(indices, self._memory, read_ahead=True)
        first = np.cumsum([0, *(b - a for a, b in zip(starts, stops, strict=True))])
        before = np.concatenate([[0], np.cumsum(kept)])[first].tolist()
        batches: list[Batch | None] = []
        for low, high in pairwise(before):
            part = {name: _slice(column, low, high) for name, column in values.items()}
            batches.append(self.dataset.form(part) if high > low else None)
        return batches

    def _wait(self, future: Future[list[Batch | None]]) -> list[Batch | None]:
        try:
            return future.result(timeout=self._timeout_seconds)
        except FutureTimeoutError as error:
            raise DataError(
                f"no batch came within {self._timeout_seconds:g} s from {self.dataset.folder}: its "
                "storage does not answer; see what is wrong with it, or give a longer "
                "timeout_seconds"
            ) from error


def _slice(column: Values, low: int, high: int) -> Values:
    if not isinstance(column, Ragged):
        return column[low:high]
    offsets = column.offsets[low : high + 1]
    return Ragged(column.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])


class _Threads:
    """Threads that several iterations share, and that are there only while there is one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._users = 0
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def running(self) -> Iterator[ThreadPoolExecutor]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="sharded-loader")
            self._users += 1
            pool = self._pool
        try:
            yield pool
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._pool = None
                    pool.shutdown(wait=False)
