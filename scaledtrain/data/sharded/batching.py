"""Which positions of an order are in each batch of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.order import SampleOrder
from scaledtrain.data.sharded.permutation import Permutation
from scaledtrain.errors import ConfigError

__all__ = ["Batching", "EqualBatches", "LengthBuckets", "Span", "indices_of", "parts_of"]

Span = tuple[int, int]
"""A batch: from one position in the epoch to another."""

_OF_BATCHES = 3  # what a permutation is for, beside those of an order


class Batching(Protocol):
    """Batches of the samples of an order: a pure function of the epoch, the same on every rank."""

    order: SampleOrder
    batches: int | None
    """In an epoch; None: only the end will tell, or there is none."""

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at positions ``start`` to ``stop`` of an epoch, int64 ``[stop - start]``."""

    def windows(self, epoch: int, start: int, step: int) -> Iterator[list[Span | None]]:
        """Batches ``start``, ``start + step``, ...: those that are best read at once; at first few.

        None stands for no batch: where ``batches`` is None, one of them makes the iterations of all
        ``step`` ranks equally long.
        """

    def resume(self, epoch: int, batches: int, position: int) -> int:
        """The batch that begins at this position, where so many batches went before.

        Raises:
            ConfigError: none does.
        """

    def identity(self) -> dict[str, Any]:
        """What makes an order of these batches the same."""


class EqualBatches:
    """Batch i is positions ``i * batch_size`` to ``(i + 1) * batch_size``.

    Args:
        order: of the samples.
        batch_size: samples in each.
        most: positions to read at once on one rank.
        drop_last: leave out a last batch that is smaller.
        endless: the order is.
    """

    def __init__(
        self, order: SampleOrder, batch_size: int, most: int, drop_last: bool, endless: bool
    ) -> None:
        self.order = order
        self._batch_size = batch_size
        self._most = most
        samples = order.samples if drop_last else order.samples + batch_size - 1
        self._last = samples // batch_size
        self.batches = None if endless else self._last

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at these positions."""
        return self.order.indices(epoch, start, stop)

    def windows(self, epoch: int, start: int, step: int) -> Iterator[list[Span | None]]:
        """Those that begin in one group of the order."""
        size, number, width = self._batch_size, start, 1
        while number < self._last:
            position = number * size
            end = min(self.order.group_end(epoch, position), position + self._most * step)
            stop = min(-(-end // size), number + width * step, self._last)
            window = range(number, stop, step)
            yield [(i * size, min((i + 1) * size, self.order.samples)) for i in window]
            number, width = window[-1] + step, 2 * width

    def resume(self, epoch: int, batches: int, position: int) -> int:
        """The batch at this position, whatever the batch size was before."""
        if position % self._batch_size and position < self.order.samples:
            raise ConfigError(
                f"the state is behind sample {position} of its epoch, which is inside a batch of "
                f"{self._batch_size}; give a batch_size that divides it"
            )
        return -(-position // self._batch_size)

    def identity(self) -> dict[str, Any]:
        """Nothing but the order: a state of another batch size is welcome."""
        return {}


class LengthBuckets:
    """Batches of samples of similar length.

    Pool j is the next ``pool_samples`` positions of the order. Its samples are sorted by length,
    cut into batches from the longest to the shortest, and the batches are shuffled, unless the
    order itself is not. So each sample is in one batch of an epoch, batches of all lengths come at
    all times, and no more than the lengths of a pool are in memory.

    Without ``max_tokens`` a pool has whole batches of ``batch_size``; the last samples of an epoch
    that do not fill one are its last batch, as they come. Batch i is found in its pool at once.

    With it a batch takes samples as long as they stay within the limit, counted with or without
    padding, and there are no more than ``batch_size``; a sample that is longer than the limit is a
    batch by itself. How many batches an epoch has is then known at its end. Where batch i is found
    depends on the pools before it: their lengths, not their samples, are looked at, unless they
    have been in this process, or ``resume`` tells how many batches went before.

    Args:
        order: of the samples.
        lengths: of samples by their numbers, int64 ``[n]`` to int64 ``[n]``.
        batch_size: samples in a batch, or at most so many.
        pool_samples: in a pool, or a little less: whole batches.
        max_tokens: sum of the lengths in a batch; None: each has ``batch_size`` samples.
        padded: a sample counts as long as the longest in its batch.
        shuffled: whether batches are.
        drop_last: leave out a last batch that is smaller; not with max_tokens.
        endless: the order is.
    """

    def __init__(
        self,
        order: SampleOrder,
        lengths: Callable[[Array], Array],
        batch_size: int,
        pool_samples: int,
        *,
        max_tokens: int | None = None,
        padded: bool = False,
        shuffled: bool = True,
        drop_last: bool = False,
        endless: bool = False,
    ) -> None:
        self.order = order
        self._lengths = lengths
        self._batch_size = batch_size
        self._pool_samples = max(1, pool_samples // batch_size) * batch_size
        self._max_tokens = max_tokens
        self._padded = padded
        self._shuffled = shuffled
        self._samples = order.samples
        if drop_last and max_tokens is None:
            self._samples -= order.samples % batch_size
        self.batches = None
        if max_tokens is None and not endless:
            self.batches = -(-self._samples // batch_size)
        self._pool = lru_cache(4)(self._sorted)
        self._first: dict[int, dict[int, int]] = {}  # epoch -> pool -> batches before it

    def indices(self, epoch: int, start: int, stop: int) -> Array:
        """The samples at these positions."""
        found = [np.zeros(0, np.int64)]
        while start < stop:
            pool, low = divmod(start, self._pool_samples)
            high = min(self._pool_samples, low + stop - start)
            found.append(self._pool(epoch, pool)[0][low:high])
            start += high - low
        return np.concatenate(found)

    def windows(self, epoch: int, start: int, step: int) -> Iterator[list[Span | None]]:
        """Those that lie in one pool."""
        pool, first = self._find(epoch, start)
        number, width = start, 1
        while pool * self._pool_samples < self._samples:
            ends = self._pool(epoch, pool)[1]
            bounds = [pool * self._pool_samples + end for end in [0, *ends.tolist()]]
            behind = first + len(ends)
            while number < behind:
                window = range(number - first, min(len(ends), number - first + width * step), step)
                yield [(bounds[i], bounds[i + 1]) for i in window]
                number, width = first + window[-1] + step, 2 * width
            pool, first = pool + 1, behind
            self._remember(epoch, pool, first)
        ranks_begin = start - start % step
        if self.batches is None and number < ranks_begin + -(-(first - ranks_begin) // step) * step:
            yield [None]

    def resume(self, epoch: int, batches: int, position: int) -> int:
        """The batch at this position, without a look at the pools before."""
        if self._max_tokens is None:
            return EqualBatches(self.order, self._batch_size, 1, False, False).resume(
                epoch, batches, position
            )
        pool, within = divmod(position, self._pool_samples)
        if position < self._samples:
            ends = [0, *self._pool(epoch, pool)[1].tolist()]
            if within not in ends:
                raise ConfigError(f"no batch begins behind sample {position} of epoch {epoch}")
            self._remember(epoch, pool, batches - ends.index(within))
        return batches

    def identity(self) -> dict[str, Any]:
        """What a batch depends on."""
        return {
            "pool_samples": self._pool_samples,
            "batch_size": self._batch_size,
            "max_tokens": self._max_tokens,
            "padded": self._padded,
        }

    def _find(self, epoch: int, batch: int) -> tuple[int, int]:
        """The pool that has this batch, or one behind the last; and the batches before it."""
        if self._max_tokens is None:
            each = self._pool_samples // self._batch_size
            return batch // each, batch // each * each
        known = {0: 0, **self._first.get(epoch, {})}
        pool, first = max((p, b) for p, b in known.items() if b <= batch)
        while pool * self._pool_samples < self._samples:
            behind = first + len(self._pool(epoch, pool)[1])
            if batch < behind:
                break
            pool, first = pool + 1, behind
            self._remember(epoch, pool, first)
        return pool, first

    def _remember(self, epoch: int, pool: int, first: int) -> None:
        for past in [other for other in self._first if other < epoch - 1]:
            self._first.pop(past, None)
        self._first.setdefault(epoch, {})[pool] = first

    def _sorted(self, epoch: int, pool: int) -> tuple[Array, Array]:
        """The samples of a pool in their final order, and where each batch ends, from 0 on."""
        start = pool * self._pool_samples
        stop = min(start + self._pool_samples, self._samples)
        samples = self.order.indices(epoch, start, stop)
        whole = len(samples)
        if self._max_tokens is None:  # the rest of an epoch stays as it came: a last batch
            whole -= whole % self._batch_size
        lengths = self._lengths(samples[:whole])
        by_length = np.argsort(-lengths, kind="stable")
        ends = self._cut(lengths[by_length])
        batches = np.split(samples[by_length], ends[:-1])
        if self._shuffled and len(batches) > 1:
            key = (_OF_BATCHES, epoch, pool)
            order = Permutation(len(batches), self.order.seed, *key).take(0, len(batches))
            batches = [batches[i] for i in order]
        if whole < len(samples):
            batches.append(samples[whole:])
        batches = [batch for batch in batches if len(batch)]
        ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)
        return np.concatenate([samples[:0], *batches]), ends

    def _cut(self, lengths: Array) -> Array:
        """Where the batches of samples that are sorted from the longest on end."""
        n, size, limit = len(lengths), self._batch_size, self._max_tokens
        if limit is None:
            return np.arange(size, n + 1, size)
        sums = np.concatenate([[0], np.cumsum(lengths)])
        ends, start = [], 0
        while start < n:
            if self._padded:
                fits = limit // max(1, int(lengths[start]))
            else:
                fits = int(np.searchsorted(sums, sums[start] + limit, side="right")) - 1 - start
            start = min(n, start + max(1, min(size, fits)))
            ends.append(start)
        return np.array(ends, np.int64)


def indices_of(batching: Batching, epoch: int, window: list[Span | None]) -> Array:
    """The samples of these batches."""
    spans = [span or (0, 0) for span in window]
    return np.concatenate([batching.indices(epoch, *span) for span in _runs(spans)])


def parts_of(window: list[Span | None], samples: int) -> Iterator[list[Span | None]]:
    """The batches of a window, so many together that they have this many samples."""
    part: list[Span | None] = []
    room = samples
    for span in window:
        part.append(span)
        room -= span[1] - span[0] if span else 0
        if room <= 0:
            yield part
            part, room = [], samples
    if part:
        yield part


def _runs(spans: Sequence[Span]) -> Iterator[Span]:
    """Spans that follow one another as one."""
    start, stop = spans[0]
    for low, high in spans[1:]:
        if low != stop:
            yield start, stop
            start = low
        stop = high
    yield start, stop
