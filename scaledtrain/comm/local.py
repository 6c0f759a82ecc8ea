"""The group of one: what a job on a single device talks to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scaledtrain.comm.protocols import Handle, ReduceOp

__all__ = ["Done", "LocalGroup"]


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
