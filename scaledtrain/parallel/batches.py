"""Batches for ranks that train one replica together, each on a part of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator
from typing import Any

import torch

from scaledtrain.comm.protocols import Group
from scaledtrain.data.cut import to_device
from scaledtrain.data.steps import StepBatch, Steps
from scaledtrain.errors import ConfigError
from scaledtrain.mesh import Mesh

__all__ = ["AgreedBatches", "Steps", "share_out"]


def share_out(
    batches_per_step: int, accumulation: int, mesh: Mesh, ranks: int, replicas_equal: bool
) -> int:
    """The most batches that a rank has in a step of so many for all of them.

    Args:
        batches_per_step: of all replicas together.
        accumulation: what was asked for of each, which must be nothing.
        mesh: the layout.
        ranks: of the job.
        replicas_equal: every update is made from the mean over all samples of a step, so that it
            does not matter who has which.

    Raises:
        ConfigError: it is below 1, or both were asked for; or the ranks must each have as many,
            but are no divisor of it.

    Example:
        >>> share_out(4, 1, Mesh(), ranks=3, replicas_equal=True)
        2
    """
    mesh.check(ranks)
    if batches_per_step < 1:
        raise ConfigError(f"batches_per_step is {batches_per_step}; a step has batches, >= 1")
    if accumulation != 1:
        raise ConfigError(
            f"batches_per_step is {batches_per_step} and gradient_accumulation_steps "
            f"{accumulation}; the second follows from the first and the number of replicas: give "
            "one of them"
        )
    data_ranks = mesh.replicas(ranks) * mesh.shard
    least, rest = divmod(batches_per_step, data_ranks)
    if rest and (mesh.pipe > 1 or not replicas_equal):
        why = (
            "mesh.pipe is above 1, whose schedule has equally many in every step"
            if mesh.pipe > 1
            else "replicas that train on for a while without each other must see equally many"
        )
        raise ConfigError(
            f"a step has {batches_per_step} batches, which do not divide by {data_ranks} ranks "
            f"with data of their own, and {why}; choose smaller batches, so that there is a "
            "multiple of all numbers of ranks that may come, or other numbers of ranks"
        )
    return least + bool(rest)


class AgreedBatches:
    """Steps of a loader in which all ranks of a group run equally many microbatches.

    They run the model together, so one that has fewer microbatches, or none, where the data end
    runs one that it has had before, or that another rank lends it; it counts as one of no samples.
    The weight of a step is that of all ranks' samples.

    Args:
        loader: of this rank, a `ReplicaLoader` or one that balances.
        group: the ranks.
        device: where batches go.
    """

    def __init__(self, loader: Steps, group: Group, device: torch.device) -> None:
        self._loader = loader
        self._group = group
        self._device = device
        self._spare: Any = None
        self._has_spare = False

    @property
    def multiple(self) -> int:
        """How many steps are made as one."""
        return self._loader.multiple

    @multiple.setter
    def multiple(self, value: int) -> None:
        self._loader.multiple = value

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

    def indices(self, epoch: int, step: int) -> list[Any] | None:
        """What the sampler gave for each batch of a step here; None if there is none."""
        return self._loader.indices(epoch, step)

    def epoch(
        self, epoch: int, start: int = 0, ready: Callable[[], None] | None = None
    ) -> Generator[StepBatch, None, None]:
        """The steps of one epoch, from step ``start`` on; see `ReplicaLoader.epoch`."""
        for step in self._loader.epoch(epoch, start, ready):
            yield self._agree(step)

    def _agree(self, step: StepBatch) -> StepBatch:
        if step.microbatches and not self._has_spare:
            self._spare, self._has_spare = step.microbatches[0], True
        own = [len(step.microbatches), step.samples, step.weight, int(self._has_spare)]
        told = self._group.all_gather([torch.tensor(own, dtype=torch.float64)])
        lengths, samples, weights, has = torch.stack([of_rank[0] for of_rank in told]).T.tolist()
        if 0.0 < sum(has) < self._group.size:
            self._lend(has.index(1.0))
        lacking = int(max(lengths)) - len(step.microbatches)
        mean = step.gradient_samples
        if mean is None:
            mean = sum(samples) / self._group.size
        return StepBatch(
            step.microbatches + [self._spare] * lacking,
            step.sizes + [0] * lacking,
            weight=sum(weights) / self._group.size,
            gradient_samples=mean,
            multiple=step.multiple,
            even_share=step.even_share,
            samples_per_rank=step.samples_per_rank,
        )

    def _lend(self, lender: int) -> None:
        """Give all ranks a batch of one of them, unless they have had one."""
        packed = b""
        if self._group.rank == lender:
            packed = pickle.dumps(to_device(self._spare, torch.device("cpu")))
        length = torch.tensor([len(packed)])
        self._group.broadcast([length], lender)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self._group.rank == lender:
            content = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self._group.broadcast([content], lender)
        if not self._has_spare:
            spare = pickle.loads(content.numpy().tobytes())
            self._spare, self._has_spare = to_device(spare, self._device), True
