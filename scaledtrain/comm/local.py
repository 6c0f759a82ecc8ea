"""The group of one: what a job on a single device talks to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scaledtrain.comm.protocols import Handle, ReduceOp
from scaledtrain.errors import ClusterError

__all__ = ["AbsentGroup", "Done", "LocalGroup"]


class Done:
    """A handle of something already finished."""

    def wait(self) -> None:
        """Return at once."""


class LocalGroup:
    """A group whose only member is this rank: every reduction is the value itself."""

    rank = 0
    size = 1
    overlaps = False
    bytes_sent = 0

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        """Leave the tensors as they are."""
        return Done()

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Leave the tensors as they are."""

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """These tensors alone."""
        return [list(tensors)]


class AbsentGroup:
    """The group as a rank sees it that came back: the others went on without it.

    Args:
        rank: this rank.
        size: of the job.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    overlaps = False
    bytes_sent = 0

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        """Raise ClusterError."""
        raise self._error()

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Raise ClusterError."""
        raise self._error()

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Raise ClusterError."""
        raise self._error()

    def _error(self) -> ClusterError:
        return ClusterError(
            f"rank {self.rank} came back to a job that had gone on without it, and its strategy "
            "needs all ranks together; only ParameterServer takes a rank back: restart the whole "
            "job, from its last checkpoint if it keeps any"
        )
