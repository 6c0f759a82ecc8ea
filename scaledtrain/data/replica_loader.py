"""Which part of a loader's batches each replica trains on, and with which weight.

The batches of an epoch are numbered; batch i goes to replica i modulo the number of replicas, and a
step takes ``gradient_accumulation_steps`` batches on every replica. So the samples of a step are
the same whatever the number of replicas, every sample is used exactly once, and all replicas make
the same number of steps: where the epoch ends unevenly, some replicas get fewer samples, or none,
and a smaller weight in the mean.

A step may also be given as a number of batches for all replicas together, of which then no multiple
need be made: of 4 batches on 3 replicas one makes 2, in the next step another one.

Replicas that are in step with no other go on counting batches where an epoch ends, so that each has
its part also of a data set with fewer batches than there are replicas: batch i of epoch e, of b
batches each, goes to replica (e b + i) modulo their number. None of them makes a step on nothing.
Of an iterable without a length b is not known, and each has the same places in every epoch.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from scaledtrain.data.cut import count_samples, to_device
from scaledtrain.data.loaders import StatefulLoader, StridedLoader, known_length
from scaledtrain.data.map_style import SamplerOrder, rebuilt
from scaledtrain.data.steps import StepBatch, Weigh, counted
from scaledtrain.errors import ConfigError

__all__ = ["EPOCH_SEEDS", "ReplicaLoader", "first_batch"]


EPOCH_SEEDS = 1_000_003  # apart from each other by more than there are ranks


def first_batch(loader: Iterable[Any], seed: int = 0) -> Any:
    """The first batch of an epoch, the same on every rank.

    Raises:
        ConfigError: the loader has none, or none that could be read.
    """
    with closing(ReplicaLoader(loader, seed=seed).epoch(0)) as steps:
        for step in steps:
            for batch in step.microbatches:
                return batch
    raise ConfigError("no batch of the loader could be read; see its warnings, and mend the data")


class _EveryNth:
    """The batches of one replica from a sampler that yields batches of indices."""

    def __init__(self, order: SamplerOrder, replicas: int) -> None:
        self._order = order
        self._replicas = replicas
        self._epoch = self._first = 0

    def begin(self, epoch: int, first: int) -> None:
        """The next iteration is of this epoch's order, from that batch on."""
        self._epoch, self._first = epoch, first

    def __iter__(self) -> Iterator[Any]:
        return islice(self._order.epoch(self._epoch), self._first, None, self._replicas)

    def __len__(self) -> int:
        return len(range(self._first, len(self._order), self._replicas))


class _Strided:
    """The batches of one replica from a loader that can give them alone."""

    def __init__(self, loader: StridedLoader, replicas: int, seed: int) -> None:
        self._loader = loader
        self._replicas = replicas
        self._seed = seed
        self._epoch = self._first = 0

    def begin(self, epoch: int, first: int) -> None:
        """The next iteration is of this epoch, from that batch on."""
        self._epoch, self._first = epoch, first

    def __iter__(self) -> Iterator[Any]:
        return self._loader.batches(self._epoch, self._first, self._replicas, self._seed)


class ReplicaLoader:
    """One replica's share of any loader, step by step.

    Args:
        loader: a ``DataLoader`` over a map-style data set (only this replica's samples are read; a
            sampler draws its order by (seed, epoch), equally everywhere), a `StridedLoader` such as
            `scaledtrain.data.ShardedLoader` (the same, also where an epoch is entered in its
            middle), a ``DataLoader`` over an ``IterableDataset``, or any iterable of batches that
            is the same on every replica (each then reads all batches and keeps its own).
        rank: this replica.
        replicas: how many there are.
        accumulation: batches of a step on each replica.
        seed: of the order of the samples and of the loader's workers.
        device: where the batches go.
        alone: this replica is in step with no other.
        share: (i, n): of each n batches that fall to the replica this rank takes the i-th, and
            others the rest; ``accumulation`` is that of one rank.
        weigh: how much a batch counts; default: its samples.
        batches_per_step: of all replicas together, instead of ``accumulation`` on each.

    Attributes:
        batch_size: samples in a full batch; None until the first one of a plain iterable.
        multiple: how many steps are made as one from the next one on; places in an epoch are
            counted in steps all the same, so that a step passes over so many of them.

    Raises:
        ConfigError: the loader already shards (``DistributedSampler``), or has no batch; or
            ``batches_per_step`` of replicas that make steps of their own, or that is no multiple of
            the replicas where nobody knows how long an epoch is.

    Example:
        >>> batches = [torch.full((2, 1), float(i)) for i in range(5)]  # 5 batches of 2 samples
        >>> [[len(s.microbatches) for s in ReplicaLoader(batches, rank=r, replicas=2).epoch(0)]
        ...  for r in (0, 1)]
        [[1, 1, 1], [1, 1, 0]]
        >>> [[len(s.microbatches) for s in ReplicaLoader(batches, rank=r, replicas=3,
        ...   batches_per_step=4).epoch(0)] for r in (0, 1, 2)]
        [[2, 0], [1, 1], [1, 0]]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        rank: int = 0,
        replicas: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        alone: bool = False,
        share: tuple[int, int] = (0, 1),
        weigh: Weigh | None = None,
        batches_per_step: int | None = None,
    ) -> None:
        if alone and batches_per_step is not None:
            raise ConfigError(
                f"batches_per_step is {batches_per_step}, but replicas of this strategy make steps "
                "of their own, so that there is none of all together; set "
                "gradient_accumulation_steps (of each), or take a strategy in lockstep (sync)"
            )
        self._weigh = weigh or count_samples
        self._rank = rank
        self._alone = alone
        self._replicas = replicas
        self._share = share
        self._per_step = batches_per_step or replicas * accumulation * share[1]
        self.multiple = 1
        self._seed = seed
        self._device = device if device is not None and device.type != "cpu" else None
        self._order: _EveryNth | _Strided | None = None
        self.batch_size: int | None = None
        self._total: int | None = None
        self._length: int | None = None
        self._generator: torch.Generator | None = None
        self._own: Iterable[Any] = loader
        self._reads_all = True
        if isinstance(loader, DataLoader):
            self.batch_size = loader.batch_size
            if not isinstance(loader.dataset, IterableDataset):
                self._shard(loader)
        elif isinstance(loader, StridedLoader):
            self.batch_size = loader.batch_size
            self._total = self._length = known_length(loader)
            self._own = self._order = _Strided(loader, replicas, seed)
            self._reads_all = False
        else:
            self._length = known_length(loader)
        # One that gives all replicas' batches, and can go on inside an epoch by itself.
        self._stateful: StatefulLoader | None = None
        if self._reads_all and isinstance(loader, StatefulLoader):
            self._stateful = loader
        self._is_placed = False

    def _shard(self, loader: DataLoader[Any]) -> None:
        """Rebuild a map-style loader so that it reads only this replica's batches."""
        order = SamplerOrder.of(loader, self._seed)
        self.batch_size = order.batch_size or self.batch_size
        try:
            self._total = self._length = len(order)
        except TypeError:  # a sampler without a length: read everything, keep what is ours
            return
        own = self._order = _EveryNth(order, self._replicas)
        self._generator = torch.Generator()
        self._own = rebuilt(loader, own, self._generator)
        self._reads_all = False

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch, the same on every replica; None if only the end will tell."""
        if self._total is None:
            return None
        return math.ceil(self._total / self._per_step)

    @property
    def step_size(self) -> tuple[int, int | None]:
        """Batches of a step, of all replicas together, and samples of a batch if that is known."""
        return self._per_step, self.batch_size

    def moved(self, steps: int, step_size: tuple[int, int | None]) -> int:
        """How many steps of this loader pass over as many samples as those of another one.

        Args:
            steps: of the other one.
            step_size: of the other one.

        Raises:
            ConfigError: no number of whole steps does.
        """
        batches, samples = self.step_size
        batches_then, samples_then = step_size
        if samples is not None and samples_then is not None:
            batches, batches_then = batches * samples, batches_then * samples_then
        moved, rest = divmod(steps * batches_then, batches)
        if rest:
            raise ConfigError(
                f"the run was saved after {steps} steps of an epoch, of {batches_then} "
                f"{'batches' if samples is None or samples_then is None else 'samples'} each, and "
                f"is resumed with steps of {batches}, of which no number is as many; choose batch "
                "size and accumulation so that the global batch is the same"
            )
        return moved

    def state_dict(self) -> Any:
        """That of a loader which keeps its own place, as it is now; None: it does not."""
        return self._stateful.state_dict() if self._stateful is not None else None

    def load_state_dict(self, state: Any) -> None:
        """The next epoch goes on where ``state_dict`` was called."""
        if self._stateful is not None:
            self._stateful.load_state_dict(state)
            self._is_placed = True

    def indices(self, epoch: int, step: int) -> list[Any] | None:
        """What the sampler gave for each batch of a step here: indices; None if there is none."""
        if not isinstance(self._order, _EveryNth) or self._total is None:
            return None
        order = copy.copy(self._order)  # that of the epoch under way stays where it is
        start = step * self._per_step
        first = self._first(start, self._rank_in(epoch))
        stop = min(start + self._window, self._total)
        order.begin(epoch, first)
        own = islice(order, len(range(first, stop, self._replicas)))
        return list(own)[self._share[0] :: self._share[1]]

    def _rank_in(self, epoch: int) -> int:
        if self._alone and self._length is not None:
            return (self._rank - epoch * self._length) % self._replicas
        return self._rank

    def epoch(
        self, epoch: int, start: int = 0, ready: Callable[[], None] | None = None
    ) -> Generator[StepBatch, None, None]:
        """The steps of one epoch, from step ``start`` on.

        The order of the samples is the same for the same (seed, epoch). Of a loader over a
        map-style data set, or of a `StridedLoader`, no skipped sample is read.

        Args:
            epoch: its number, from 0.
            start: steps to skip.
            ready: called when they have been, before anything else is read.
        """
        self._ready = ready or (lambda: None)
        if self._generator is not None:  # of the seeds of the loader's workers
            self._generator.manual_seed(self._seed + self._rank + EPOCH_SEEDS * epoch)
        rank = self._rank_in(epoch)
        if self._order is not None:
            self._order.begin(epoch, self._first(start * self._per_step, rank))
        windows = self._of_all(start, rank) if self._reads_all else self._own_only(start, rank)
        window = next(windows, None)
        has_one = not (self._alone and self._length and rank >= self._length)
        if window is None and start == 0 and has_one:
            here = (
                f", or no batch for replica {self._rank} of {self._replicas}" if self._alone else ""
            )
            raise ConfigError(
                f"the loader has no batch{here}; check the data set's length and drop_last (a "
                "batch_size larger than the data set with drop_last=True leaves nothing), and that "
                "it can be iterated more than once (a generator cannot: give a list or a "
                "DataLoader)"
            )
        while window is not None:
            yield self._step(window[self._share[0] :: self._share[1]])
            window = next(windows, None)

    def _first(self, begin: int, rank: int) -> int:
        """This replica's first batch from that one on."""
        return begin + (rank - begin) % self._replicas

    @property
    def _window(self) -> int:
        """Batches of the next step, of all replicas together."""
        return self._per_step * self.multiple

    def _own_only(self, first: int, rank: int) -> Iterator[list[Any]]:
        """This replica's batches of each step, from a loader that yields no others."""
        if self._total is None:
            yield from self._own_of_unknown()
            return
        stop = first * self._per_step
        batches: Iterator[Any] | None = None
        while stop < self._total:
            start, stop = stop, min(stop + self._window, self._total)
            count = len(range(self._first(start, rank), stop, self._replicas))
            if count or not self._alone:
                if batches is None:
                    batches = iter(self._own)
                    self._ready()
                own = [batch for batch in islice(batches, count) if batch is not None]
                if own or not self._alone:
                    yield own

    def _own_of_unknown(self) -> Iterator[list[Any]]:
        """As `_own_only` where no length is known: it yields equally many on every replica."""
        accumulation, rest = divmod(self._per_step, self._replicas)
        if rest:
            raise ConfigError(
                f"a step has {self._per_step} batches for {self._replicas} replicas, of which each "
                "must have as many where nobody knows how many there are in an epoch; choose the "
                "local batch size so that the global one is a multiple of all of them, or a loader "
                "with a length"
            )
        batches = iter(self._own)
        self._ready()
        while given := list(islice(batches, accumulation * self.multiple)):
            own = [batch for batch in given if batch is not None]
            if own or not self._alone:
                yield own

    def _of_all(self, first: int, rank: int) -> Iterator[list[Any]]:
        """This replica's batches of each step, from an iterable that yields all replicas'."""
        begin = first * self._per_step
        batches = iter(self._own)
        if not self._is_placed:
            deque(islice(batches, begin), maxlen=0)
        self._is_placed = False
        self._ready()
        while window := list(islice(batches, self._window)):
            if self.batch_size is None:
                self.batch_size = count_samples(window[0])
            mine = window[(rank - begin) % self._replicas :: self._replicas]
            begin += len(window)
            if mine or not self._alone:
                yield mine

    def _step(self, microbatches: list[Any]) -> StepBatch:
        sizes = [counted(self._weigh, batch) for batch in microbatches]
        if self._device is not None:
            microbatches = [to_device(batch, self._device) for batch in microbatches]
        # Without a nominal size the weights are plain counts: only their ratios matter.
        full = (self.batch_size or 1) * (self._window / self._replicas)
        weight = sum(sizes) * self._share[1] / full
        return StepBatch(microbatches, sizes, weight, multiple=self.multiple)
