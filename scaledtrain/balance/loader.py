"""Steps of which each replica takes as many samples as a balancer says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from scaledtrain.balance.balancer import Balancer
from scaledtrain.balance.division import Divisible, Division
from scaledtrain.data.cut import count_samples, to_device
from scaledtrain.data.map_style import SamplerOrder, rebuilt
from scaledtrain.data.replica_loader import EPOCH_SEEDS, ReplicaLoader
from scaledtrain.data.steps import StepBatch, Weigh, counted
from scaledtrain.errors import ConfigError

__all__ = ["BalancedLoader"]

Part = tuple[list[Any], int]
"""A rank's microbatches of a step, or their indices, and how many samples it has on all ranks."""


class BalancedLoader:
    """One rank's share of any loader, step by step, in parts that need not be equal.

    A step has the same samples as with `ReplicaLoader`: accumulation x replicas batches of the
    loader, one after the other. Of these, in their order, replica 0 takes the first ones, replica 1
    the next, as many as the balancer says; an epoch's last step, which may have fewer, is shared
    out in the same proportions. So the samples of a step, and of an epoch, do not depend on the
    shares. Where steps are made of several (``multiple``), or of a number of batches that is no
    multiple of the ranks, nothing is different.

    Only this rank's samples are read from a ``DataLoader`` over a map-style data set and from a
    `ShardedLoader`; of any other loader all ranks read everything, as it comes, and keep their own.

    Args:
        loader: as in `ReplicaLoader`.
        balancer: tells the shares; after a step in which they, or ``multiple``, changed, a rank
            that reads its own samples alone begins to read anew there.
        replica: this rank's, of the balancer's.
        piece: (i, n): of the replica's samples this rank takes the i-th of n equal parts.
        accumulation: batches of a step on each rank, if shares are even; no rank has fewer
            microbatches, unless it has fewer samples.
        seed: of the order of the samples and of the loader's workers.
        device: where the batches go.
        alone: this replica is in step with no other, and its gradient counts by its samples.
        weigh: how much a batch counts in the mean loss; default: its samples.
        batches_per_step: of all ranks together, instead of ``accumulation`` on each.

    Raises:
        ConfigError: as `ReplicaLoader` does.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        balancer: Balancer,
        *,
        replica: int = 0,
        piece: tuple[int, int] = (0, 1),
        accumulation: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        alone: bool = False,
        weigh: Weigh | None = None,
        batches_per_step: int | None = None,
    ) -> None:
        self._weigh = weigh or count_samples
        self._loader = loader
        self._balancer = balancer
        self._replica = replica
        self._piece = piece
        self._accumulation = accumulation
        self._ranks = balancer.replicas * piece[1]
        self._batches = batches_per_step or accumulation * self._ranks
        self._seed = seed
        self._device = device if device is not None and device.type != "cpu" else None
        self._alone = alone
        # Of all ranks' batches: it knows their number, and reads what cannot be read in parts.
        self._whole = ReplicaLoader(
            loader,
            accumulation=self._batches,
            seed=seed,
            alone=alone,
            batches_per_step=batches_per_step,
        )
        self._order: SamplerOrder | None = None
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            self._read_own_of(loader)

    def _read_own_of(self, loader: DataLoader[Any]) -> None:
        order = SamplerOrder.of(loader, self._seed)
        gives_indices = loader.batch_sampler is not None or order.batch_size is not None
        if gives_indices and self._whole.steps_per_epoch is not None:
            self._order = order
            self._generator = torch.Generator()  # of the seeds of the loader's workers
            self._place = (0, 0)  # epoch and batch at which the next iteration begins
            self._found: deque[tuple[int, int]] = deque()
            self._own = rebuilt(loader, _Batches(self._indices), self._generator)

    @property
    def multiple(self) -> int:
        """How many steps are made as one from the next one on; see `ReplicaLoader`."""
        return self._whole.multiple

    @multiple.setter
    def multiple(self, value: int) -> None:
        self._whole.multiple = value

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch of the loader."""
        return self._whole.batch_size

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None if only the end will tell."""
        return self._whole.steps_per_epoch

    @property
    def step_size(self) -> tuple[int, int | None]:
        """Batches of a step, of all ranks together, and samples of a batch if that is known."""
        return self._whole.step_size

    def moved(self, steps: int, step_size: tuple[int, int | None]) -> int:
        """How many steps are as many samples as those of another loader."""
        return self._whole.moved(steps, step_size)

    def state_dict(self) -> Any:
        """That of a loader which keeps its own place."""
        return self._whole.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """The next epoch goes on where ``state_dict`` was called."""
        self._whole.load_state_dict(state)

    def indices(self, epoch: int, step: int) -> list[Any] | None:
        """The indices of each microbatch of a step here; None if there are none."""
        if self._order is None:
            return None
        return next(self._shared_out(epoch, step * self._batches), ([], 0))[0]

    def epoch(
        self, epoch: int, start: int = 0, ready: Callable[[], None] | None = None
    ) -> Generator[StepBatch, None, None]:
        """The steps of one epoch, from step ``start`` on; see `ReplicaLoader.epoch`."""
        step, is_over = start, False
        while not is_over:
            begun, is_over = (self._balancer.decisions, self.multiple), True
            with closing(self._parts(epoch, step, ready or (lambda: None))) as parts:
                for microbatches, samples in parts:
                    step += self.multiple
                    if microbatches or not self._alone:
                        yield self._step(microbatches, samples)
                    if self._reads_own and begun != (self._balancer.decisions, self.multiple):
                        is_over = False
                        break
            ready = None
        if step == 0:
            raise ConfigError(
                "the loader has no batch; check the data set's length and drop_last, and that it "
                "can be iterated more than once (a generator cannot: give a list or a DataLoader)"
            )

    @property
    def _reads_own(self) -> bool:
        """Whether what is read depends on the shares."""
        return self._order is not None or isinstance(self._loader, Divisible)

    def _division(self, samples: int = 0) -> Division:
        """This rank's part of a step with so many, if that is not known from the batch size."""
        full = (self.batch_size or 0) * self._window or samples
        shares = self._balancer.begin(full, self.multiple)
        most = self._balancer.balance.max_local_batch_size or self.batch_size
        at_least = self._accumulation * self.multiple
        return Division(shares, self._replica, self._piece, at_least, most)

    @property
    def _window(self) -> int:
        """Batches of the next step, of all ranks together."""
        return self._batches * self.multiple

    def _parts(
        self, epoch: int, step: int, ready: Callable[[], None]
    ) -> Generator[Part, None, None]:
        if self._order is not None:
            rank = self._replica * self._piece[1] + self._piece[0]
            self._generator.manual_seed(self._seed + rank + EPOCH_SEEDS * epoch)
            self._place, self._found = (epoch, step * self._batches), deque()
            ready()
            yield from _regrouped(iter(self._own), self._found)
        elif isinstance(self._loader, Divisible):
            ready()
            yield from self._loader.parts(
                epoch, step * self._batches, self._window, self._division(), self._seed
            )
        else:  # all ranks read everything
            with closing(self._whole.epoch(epoch, step, ready)) as steps:
                for whole in steps:
                    yield self._division(whole.samples).take(whole.microbatches)

    def _indices(self) -> Iterator[list[Any]]:
        """Of this rank's microbatches; tells in advance what each step has."""
        found = self._found
        for pieces, samples in self._shared_out(*self._place):
            found.append((len(pieces), samples))
            yield from pieces

    def _shared_out(self, epoch: int, first: int) -> Iterator[Part]:
        """The same, step by step from a batch of an epoch on."""
        assert self._order is not None
        size = self._window
        batches = islice(self._order.epoch(epoch), first, None)
        while window := list(islice(batches, size)):
            indices = [index for batch in window for index in batch]
            division = self._division(len(indices))
            pieces = division.pieces(*division.part(len(indices)), division.microbatches)
            yield [indices[low:high] for low, high in pieces], len(indices)

    def _step(self, microbatches: list[Any], samples: int) -> StepBatch:
        own = sum(count_samples(batch) for batch in microbatches)
        sizes = [counted(self._weigh, batch) for batch in microbatches]
        self._balancer.handed_out(own)
        if self._device is not None:
            microbatches = [to_device(batch, self._device) for batch in microbatches]
        of_sample = sum(sizes) / own if own else 1.0
        even = of_sample * sum(self._balancer.shares or ()) / (self._ranks * self.multiple)
        mean = of_sample * samples / self._ranks
        weight = sum(sizes) * self._ranks / ((self.batch_size or 1) * self._window)
        return StepBatch(
            microbatches,
            sizes,
            # Where all gradients are counted alike, they are made to count by samples.
            weight=1.0 if self._alone else weight,
            gradient_samples=mean if self._alone else None,
            multiple=self.multiple,
            even_share=even,
            samples_per_rank=mean,
        )


class _Batches:
    """Batches of indices, as a sampler."""

    def __init__(self, make: Callable[[], Iterator[list[Any]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[Any]]:
        return self._make()


_END = object()


def _regrouped(batches: Iterator[Any], found: deque[tuple[int, int]]) -> Iterator[Part]:
    """Steps of the batches that a loader gives, by what its sampler said when it was asked.

    The sampler is always ahead of what has been read of it; of a step in which this rank has no
    sample it tells before it gives those of the next one.
    """
    read: Any = None
    while True:
        if not found:
            read = next(batches, _END)
            if not found:
                return
        count, samples = found.popleft()
        mine: list[Any] = []
        while len(mine) < count:
            mine.append(next(batches) if read is None else read)
            read = None
        yield mine, samples
