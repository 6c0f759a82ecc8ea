"""A ``DataLoader`` over a map-style data set, given other batches of the same order."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from scaledtrain.errors import ConfigError
from scaledtrain.seeding import kept_generators, seed_everything

__all__ = ["SamplerOrder", "rebuilt"]


class SamplerOrder:
    """The batches of indices that a sampler yields, the same on every rank.

    Args:
        sampler: of batches of indices.
        seed: with the epoch, of their order.

    Attributes:
        batch_size: samples in a full batch, of one of torch's samplers.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.batch_size = sampler.batch_size if isinstance(sampler, BatchSampler) else None
        self._sampler = sampler
        self._seed = seed
        self._random = _random_sampler(sampler)

    @classmethod
    def of(cls, loader: DataLoader[Any], seed: int) -> SamplerOrder:
        """That of a loader, whose own samplers are left as they are.

        Raises:
            ConfigError: it has only a part of the samples (``DistributedSampler``).
        """
        one_by_one = loader.batch_sampler is None  # batch_size=None: the sampler yields the batches
        sampler: Any = copy.copy(loader.sampler if one_by_one else loader.batch_sampler)
        if isinstance(sampler, BatchSampler):
            sampler.sampler = copy.copy(sampler.sampler)
        if isinstance(loader.sampler, DistributedSampler) or isinstance(
            getattr(sampler, "sampler", None), DistributedSampler
        ):
            raise ConfigError(
                "the loader has a DistributedSampler, but the Trainer shards loaders itself, so "
                "most samples would never be seen; pass the loader as for one process "
                "(shuffle=True)"
            )
        return cls(sampler, seed)

    def __len__(self) -> int:
        """Batches in an epoch.

        Raises:
            TypeError: that is not known.
        """
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """All batches of an epoch."""
        order: Iterable[Any] = self._sampler
        seed = self._seed + epoch
        if self._random is not None:
            self._random.generator = torch.Generator().manual_seed(seed)
        elif not _is_sequential(order):
            # It may draw from global generators, whose state differs between the replicas.
            with kept_generators():
                seed_everything(seed)
                order = list(order)
        return iter(order)


def _random_sampler(sampler: Any) -> Any:
    """The random sampler inside ``sampler``, if there is one of torch's, with its own generator."""
    while isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    own_generator = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    return sampler if isinstance(sampler, own_generator) else None


def _is_sequential(sampler: Any) -> bool:
    while isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    return isinstance(sampler, SequentialSampler)


def rebuilt(
    loader: DataLoader[Any], batches: Iterable[Any], generator: torch.Generator
) -> DataLoader[Any]:
    """A loader as the given one, of other batches.

    Args:
        loader: over a map-style data set.
        batches: of indices.
        generator: of the seeds of its workers.
    """
    one_by_one = loader.batch_sampler is None
    options: dict[str, Any] = {"sampler": batches, "batch_size": None}
    return DataLoader(
        loader.dataset,
        **(options if one_by_one else {"batch_sampler": batches}),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
