"""The group of one, and the peers of one who is alone: what a job on a single device talks to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from scaledtrain.comm.protocols import Handle, ReduceOp
from scaledtrain.errors import PeerLostError

__all__ = ["Done", "LocalGroup", "LocalPeers"]


class Done:
    """A handle of something already finished."""

    def wait(self) -> None:
        """Return at once."""


class LocalGroup:
    """A group whose only member is this rank: every reduction is the value itself."""

    rank = 0
    size = 1

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        """Leave the tensors as they are."""
        return Done()

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Leave the tensors as they are."""


class LocalPeers:
    """The peers of a rank that is alone: there is nobody to call, and nobody calls."""

    def __init__(self) -> None:
        self._word = 0

    def lock(self) -> AbstractContextManager[None]:
        """Nothing to keep out."""
        return nullcontext()

    def call(self, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> Handle:
        """Fail: no such rank."""
        raise PeerLostError(f"there is no rank {rank}: this job is one process")

    def say(self, word: int) -> None:
        """Keep the word."""
        self._word = word

    def heard(self) -> Sequence[int]:
        """This rank's own word."""
        return [self._word]
