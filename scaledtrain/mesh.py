"""Over how many ranks a job is laid out, and in which way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scaledtrain.errors import ConfigError

__all__ = ["Mesh", "Place"]


class Place(NamedTuple):
    """Where in a mesh a rank is: its coordinate on each axis."""

    replicate: int
    pipe: int
    shard: int


@dataclass(frozen=True)
class Mesh:
    """The layout of the ranks: replicas of the model, each of ``pipe`` times ``shard`` ranks.

    Rank = (replicate * pipe + pipe's coordinate) * shard + shard's: the ranks of a replica are
    neighbours, and what is sent most, between shards, stays nearest.

    Args:
        replicate: number of replicas of the model, which a strategy keeps together; None: as many
            as the ranks are enough for.
        pipe: ranks that have different stages of a replica; see `scaledtrain.parallel.Pipeline`.
        shard: ranks that have different shards of every parameter of a replica, or of its stage;
            see `scaledtrain.parallel.FullyShard`.

    Raises:
        ConfigError: an axis is shorter than 1.

    Example:
        >>> mesh = Mesh(pipe=2, shard=2)
        >>> mesh.replicas(8), mesh.place(6)
        (2, Place(replicate=1, pipe=1, shard=0))
        >>> mesh.ranks(mesh.place(6), "shard")
        [6, 7]
    """

    replicate: int | None = None
    pipe: int = 1
    shard: int = 1

    def __post_init__(self) -> None:
        for axis in ("replicate", "pipe", "shard"):
            length = getattr(self, axis)
            if length is not None and length < 1:
                raise ConfigError(f"mesh.{axis} is {length}; it is a number of ranks, >= 1")

    @property
    def ranks_per_replica(self) -> int:
        """How many ranks have a piece of each replica."""
        return self.pipe * self.shard

    def check(self, ranks: int) -> None:
        """Raise ConfigError unless the mesh has exactly this many ranks."""
        each = self.ranks_per_replica
        wanted = None if self.replicate is None else self.replicate * each
        if ranks == wanted or (wanted is None and ranks % each == 0):
            return
        job = f"the job has {ranks} rank{'s' if ranks > 1 else ''}"
        if wanted is None:
            raise ConfigError(
                f"mesh.pipe={self.pipe} times mesh.shard={self.shard} makes {each} ranks for each "
                f"replica, but {job}, which is no multiple of that; start it with "
                f"--nproc-per-node {each} (workers={each}), or change the mesh"
            )
        product = f" (times {each} ranks for each: {wanted})" if each > 1 else ""
        raise ConfigError(
            f"mesh.replicate is {self.replicate}{product}, but {job}; start it with "
            f"--nproc-per-node {wanted} (workers={wanted}), or leave mesh.replicate out"
        )

    def replicas(self, ranks: int) -> int:
        """How many replicas so many ranks make."""
        return ranks // self.ranks_per_replica

    def place(self, rank: int) -> Place:
        """Where a rank is."""
        rest, shard = divmod(rank, self.shard)
        replicate, pipe = divmod(rest, self.pipe)
        return Place(replicate, pipe, shard)

    def rank(self, place: Place) -> int:
        """Which rank is there."""
        return (place.replicate * self.pipe + place.pipe) * self.shard + place.shard

    def ranks(self, place: Place, *axes: str, replicas: int = 1) -> list[int]:
        """The ranks that differ from a place on these axes alone, and that place's, in order.

        Args:
            place: of one of them.
            axes: ``"replicate"``, ``"pipe"``, ``"shard"``.
            replicas: how many there are.
        """
        lengths = {"replicate": replicas, "pipe": self.pipe, "shard": self.shard}
        found = [place]
        for axis in axes:
            found = [p._replace(**{axis: i}) for p in found for i in range(lengths[axis])]
        return sorted(map(self.rank, found))
