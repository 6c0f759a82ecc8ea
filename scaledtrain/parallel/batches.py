"""Batches for ranks that train one replica together, each on a part of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch

from scaledtrain.comm.protocols import Group
from scaledtrain.data.replica_loader import ReplicaLoader, StepBatch
from scaledtrain.errors import ConfigError

__all__ = ["AgreedBatches"]


class AgreedBatches:
    """Steps of a `ReplicaLoader` in which all ranks of a group run equally many microbatches.

    They run the model together, so one that has fewer microbatches, or none, where the data end
    runs one that it has had before; it counts as one of no samples. The weight of a step is that of
    all ranks' samples.

    Args:
        loader: of this rank.
        group: the ranks.
    """

    def __init__(self, loader: ReplicaLoader, group: Group) -> None:
        self._loader = loader
        self._group = group
        self._spare: Any = None
        self._has_spare = False

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch."""
        return self._loader.batch_size

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None if only the end will tell."""
        return self._loader.steps_per_epoch

    @property
    def step_size(self) -> tuple[int, int | None]:
        """Batches of a step, of all ranks together, and samples of a batch if that is known."""
        return self._loader.step_size

    def moved(self, steps: int, step_size: tuple[int, int | None]) -> int:
        """How many steps are as many samples as those of another loader."""
        return self._loader.moved(steps, step_size)

    def state_dict(self) -> Any:
        """That of a loader which keeps its own place."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """The next epoch goes on where ``state_dict`` was called."""
        self._loader.load_state_dict(state)

    def epoch(
        self, epoch: int, start: int = 0, ready: Callable[[], None] | None = None
    ) -> Generator[StepBatch, None, None]:
        """The steps of one epoch, from step ``start`` on; see `ReplicaLoader.epoch`."""
        for step in self._loader.epoch(epoch, start, ready):
            yield self._agree(step)

    def _agree(self, step: StepBatch) -> StepBatch:
        if step.microbatches and not self._has_spare:
            self._spare, self._has_spare = step.microbatches[0], True
        own = [len(step.microbatches), step.samples, step.weight]
        told = self._group.all_gather([torch.tensor(own, dtype=torch.float64)])
        lengths, samples, weights = torch.stack([of_rank[0] for of_rank in told]).T.tolist()
        lacking = int(max(lengths)) - len(step.microbatches)
        if lacking and not self._has_spare:
            raise ConfigError(
                f"{self._group.size} ranks train a replica together, but the first step has no "
                f"batch for rank {self._group.rank} of them; take a smaller batch, more data or "
                "a smaller mesh.shard"
            )
        return StepBatch(
            step.microbatches + [self._spare] * lacking,
            step.sizes + [0] * lacking,
            sum(weights) / self._group.size,
            sum(samples) / self._group.size,
        )
