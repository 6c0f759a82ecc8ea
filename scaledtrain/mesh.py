"""Over how many ranks a job is laid out, and in which way."""

from __future__ import annotations

from dataclasses import dataclass

from scaledtrain.errors import ConfigError

__all__ = ["Mesh"]


@dataclass(frozen=True)
class Mesh:
    """The layout of the ranks.

    Args:
        replicate: number of replicas of the model; None: one on every rank.
    """

    replicate: int | None = None

    def check(self, ranks: int) -> None:
        """Raise ConfigError unless the mesh has exactly this many ranks."""
        if self.replicate is not None and self.replicate != ranks:
            raise ConfigError(
                f"mesh.replicate is {self.replicate}, but the job has {ranks} rank"
                f"{'s' if ranks > 1 else ''}; start it with --nproc-per-node {self.replicate} "
                f"(workers={self.replicate}), or leave mesh.replicate out"
            )
