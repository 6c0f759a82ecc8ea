"""A model on the ranks of a mesh: what each rank has of it, and whom it talks to about what."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group, Link
from scaledtrain.data.replica_loader import ReplicaLoader, StepBatch
from scaledtrain.errors import ClusterError, ConfigError
from scaledtrain.mesh import Mesh
from scaledtrain.parallel.batches import AgreedBatches
from scaledtrain.parallel.shard import FullyShard, Shards
from scaledtrain.schedule import Abandon, Computed, Schedule

if TYPE_CHECKING:
    from scaledtrain.loss_scale import LossScaler
    from scaledtrain.precision import Precision

__all__ = ["Layout", "Steps", "lay_out"]


class Steps(Protocol):
    """What a rank trains on, step by step."""

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch; None if that is not known yet."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None if only the end will tell."""

    def epoch(self, epoch: int, start: int = 0) -> Generator[StepBatch, None, None]:
        """The steps of one epoch, from step ``start`` on."""


class Layout:
    """One rank's piece of a model, and the ranks that this rank shares it, or the model, with.

    Made by `lay_out`. It composes what each axis of the mesh asks for; nothing knows more than one.

    Args:
        model: this rank's piece of it.
        link: to the ranks that have the same piece of other replicas: the strategy's.
        pieces: all ranks of this replica; None: this one.
        shards: of this rank's piece, and the ranks that have the others; None: it is whole.

    Attributes:
        model: as given.
        link: as given.
        pieces: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        link: Link,
        pieces: Group | None = None,
        shards: tuple[Shards, Group] | None = None,
    ) -> None:
        self.model = model
        self.link = link
        self.pieces: Group = pieces or LocalGroup()
        self._shards = shards

    @property
    def _shard_group(self) -> Group:
        return LocalGroup() if self._shards is None else self._shards[1]

    @property
    def data_ranks(self) -> int:
        """How many ranks of this replica train on different samples."""
        return self._shard_group.size

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's tensors, also frozen ones, in the model's order."""
        if self._shards is None:
            return list(self.model.named_parameters())
        return self._shards[0].named_parameters

    def steps(
        self,
        loader: Iterable[Any],
        replica: int,
        replicas: int,
        *,
        accumulation: int = 1,
        seed: int = 0,
        alone: bool = False,
    ) -> Steps:
        """This rank's share of a loader's batches.

        Args:
            loader: see `ReplicaLoader`, also for the rest.
            replica: this rank's.
            replicas: how many share the batches.
            accumulation: batches of a step on each rank.
            seed: of the order of the samples.
            alone: this replica is in step with no other.
        """
        group, device = self._shard_group, self.link.device
        if alone:  # all ranks of a replica have the same places in the epoch
            rank, ranks, share = replica, replicas, (group.rank, group.size)
        else:
            rank, ranks, share = replica * group.size + group.rank, replicas * group.size, (0, 1)
        own = ReplicaLoader(
            loader,
            rank=rank,
            replicas=ranks,
            accumulation=accumulation,
            seed=seed,
            device=device,
            alone=alone,
            share=share,
        )
        return own if self._shards is None else AgreedBatches(own, group)

    def schedule(self, loop: Schedule, scaler: LossScaler) -> Schedule:
        """Let the gradients of a schedule get to `named_parameters`."""
        return loop if self._shards is None else _ShardedSchedule(loop, self._shards[0], scaler)

    def refresh(self) -> None:
        """Let the model compute with the values that `named_parameters` have now."""
        if self._shards is not None:
            self._shards[0].refresh()

    def agree(self, vote: bool) -> bool:
        """Whether a rank of this replica says so; all of them ask together."""
        if self.pieces.size == 1:
            return vote
        votes = torch.tensor([int(vote)])
        self.pieces.all_reduce([votes], "max").wait()
        return bool(votes.item())

    def sum(self, values: Tensor) -> None:
        """Add up, in place, over the ranks of this replica that train on different samples."""
        self._shard_group.all_reduce([values], "sum").wait()


class _ShardedSchedule:
    """Hands gradients over from a sharded model to the shards that the optimizer has."""

    def __init__(self, loop: Schedule, shards: Shards, scaler: LossScaler) -> None:
        self._loop = loop
        self._shards = shards
        self._scaler = scaler

    def run(self, batch: StepBatch, abandon: Abandon = None) -> Computed | None:
        """As the schedule inside."""
        self._shards.refresh()
        computed = self._loop.run(batch)
        self._scaler.hand_over(*self._shards.take_gradients())
        return computed


def lay_out(
    model: nn.Module,
    link: Link,
    mesh: Mesh,
    precision: Precision,
    engine: FullyShard | None = None,
) -> Layout:
    """Give each rank of a mesh its piece of a model. Collective.

    Args:
        model: on the link's device, in the precision's format. It is changed where it is divided.
            Rank 0's values count.
        link: to all ranks.
        mesh: the layout.
        precision: in which the model computes.
        engine: what divides parameters where ``mesh.shard`` is above 1; default `FullyShard`.

    Raises:
        ConfigError: the mesh does not fit the job, or the model cannot be divided so.
    """
    mesh.check(link.group.size)
    if mesh.ranks_per_replica == 1:
        if engine is not None:
            raise ConfigError(
                f"engine is {engine}, but mesh.shard is 1, so that there is nothing to divide; set "
                "mesh.shard to the number of ranks that have a replica together, or leave engine "
                "out"
            )
        return Layout(model, link)
    place, replicas = mesh.place(link.group.rank), mesh.replicas(link.group.size)
    if link.returned:
        raise ClusterError(
            f"rank {link.group.rank} came back, but it has only a piece of replica "
            f"{place.replicate}, whose other ranks have ended with it; restart the whole job, from "
            "its last checkpoint if it keeps any"
        )
    # All start with the same values, whose parts are taken below.
    link.group.broadcast([*model.parameters(), *model.buffers()])
    of_replica = f"replica/{place.replicate}"
    pieces = link.part(of_replica, mesh.ranks(place, "pipe", "shard")).group
    of_strategy = link.part(
        f"replicas/{place.pipe}/{place.shard}",
        mesh.ranks(place, "replicate", replicas=replicas),
        of_replica,
    )
    among_shards = link.part(f"shards/{place.replicate}/{place.pipe}", mesh.ranks(place, "shard"))
    shards = (engine or FullyShard()).apply(model, among_shards.process_group(), precision)
    return Layout(model, of_strategy, pieces, (shards, among_shards.group))
