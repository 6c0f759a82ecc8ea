"""The group, the board and the peers of one: what a job on a single device talks to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from scaledtrain.comm.notes import Notes
from scaledtrain.comm.protocols import Handle, ReduceOp
from scaledtrain.errors import ClusterError, ConfigError, PeerLostError, WaitTimeoutError

__all__ = ["AbsentGroup", "Done", "LocalBoard", "LocalGroup", "LocalPeers", "Undivided"]


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


class Undivided:
    """What a link lacks whose ranks are always whole replicas."""

    timeout_seconds = math.inf
    pieces = LocalGroup()

    def part(self, name: str, ranks: Sequence[int], pieces: str | None = None) -> Any:
        """Raise ConfigError."""
        raise self._error()

    def process_group(self) -> Any:
        """Raise ConfigError."""
        raise self._error()

    def notes(self) -> Notes | None:
        """None: ranks that wait here for ever are found by whatever runs them."""
        return None

    def _error(self) -> ConfigError:
        return ConfigError(
            "mesh.pipe, mesh.shard and engine are for real ranks: here, in a simulation, a replay "
            "or an estimate of memory, each rank is a whole replica; set both to 1, and leave "
            "engine out"
        )


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


class LocalBoard:
    """The board of a rank that is alone."""

    def __init__(self) -> None:
        self._word = 0

    def write(self, word: int) -> None:
        """Keep the word."""
        self._word = word

    def read(self) -> Sequence[int]:
        """This rank's own word."""
        return [self._word]

    def wait(self, until: Callable[[Sequence[int]], bool], doing: str) -> None:
        """Return at once; nobody else can write, so that to wait would be for ever."""
        if not until(self.read()):
            raise WaitTimeoutError(f"{doing} waits for another rank, but this job is one process")


class LocalPeers:
    """The peers of a rank that is alone: there is nobody to call, and nobody calls."""

    def lock(self) -> AbstractContextManager[object]:
        """Nothing to keep out."""
        return nullcontext()

    def call(self, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> Handle:
        """Fail: there is no such rank."""
        raise PeerLostError(f"there is no rank {rank}: this job is one process")
