"""What a strategy may ask of the outside world: a `Group` of peers, a `Store` of parameters.

Both are small on purpose: everything that costs communication goes through these few calls, so that
another world (shared memory, gloo, NCCL, a simulator) is one more implementation and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scaledtrain.server import Server
    from scaledtrain.timeline import Timeline

__all__ = ["Group", "Handle", "Link", "Pulled", "ReduceOp", "Store"]

ReduceOp = Literal["sum", "mean", "max"]


class Handle(Protocol):
    """A collective that has begun."""

    def wait(self) -> None:
        """Return when the result is in the tensors."""


class Group(Protocol):
    """Ranks that call the same collectives in the same order."""

    @property
    def rank(self) -> int:
        """This rank's place, from 0."""

    @property
    def size(self) -> int:
        """How many ranks take part."""

    @property
    def overlaps(self) -> bool:
        """Whether an all-reduce goes on by itself before ``wait``, while this rank computes."""

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has handed to the transport so far.

        An all-reduce and an all-gather count as the bytes of this rank's tensors, a broadcast as
        those of the tensors on rank ``src`` and as none elsewhere. What the transport makes of it
        is not in it: to all-reduce B bytes a ring of n ranks sends 2 (n - 1) / n B from each.
        """

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        """Begin to replace every tensor, in place, by its reduction over the ranks.

        Args:
            tensors: contiguous tensors, the same shapes and dtypes in the same order on every rank.
            op: ``"sum"``, ``"max"`` or ``"mean"``. The mean is weighted: sum_i w_i x_i / sum_i w_i.
            weight: w of this rank in a mean, >= 0; at least one rank's is positive. A rank of
                weight 0 does not change the result, whatever its tensors hold.

        Raises:
            WaitTimeoutError: (here or in ``Handle.wait``) a rank did not come in time.
            PeerLostError: (here or in ``Handle.wait``) a rank died.
        """

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Replace every tensor, in place, by rank ``src``'s; returns when it is there."""

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every rank's tensors, by rank; returns when all are there.

        Args:
            tensors: contiguous tensors, the same shapes and dtypes in the same order on every rank.
                They are this rank's entry of the result, not copied.
        """


@dataclass(frozen=True)
class Pulled:
    """What a worker learns when it pulls."""

    version: int
    """Updates that the parameters have received."""
    staleness: int
    """Staleness of this worker's push since its last pull; -1 if there was none."""
    learning_rate: float
    """Of the server's next update."""
    stopped: bool
    """The run is over: some worker asked for the end, or the last update has been made."""


class Store(Protocol):
    """One worker's access to the server's parameters."""

    def push(self, update: Sequence[Tensor], version: int) -> None:
        """Hand over a gradient taken at ``version``. The tensors may be reused on return."""

    def skip(self) -> None:
        """Say that this worker's step ended without a gradient."""

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Copy the server's parameters into these; waits where the admission policy says so.

        Raises:
            WaitTimeoutError: the policy, or the server, made this worker wait too long.
            PeerLostError: the rank that holds the server died.
        """

    def limit(self, last_version: int | None) -> None:
        """Let the server make no update beyond this version (None: no limit)."""

    def stop(self) -> None:
        """Ask that every worker ends: from now on every pull says ``stopped``."""

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait until every worker has come here, then pull; a stop that was asked for is over."""

    def state_dict(self) -> dict[str, Any]:
        """The server's state between two pushes, where it lives; empty elsewhere."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before any worker pulls."""

    def close(self) -> None:
        """Tell the server that this worker leaves."""


class Link(Protocol):
    """The world a strategy is attached to: its peers, and a place where a server can live."""

    @property
    def group(self) -> Group:
        """All replicas."""

    @property
    def transport(self) -> str:
        """How bytes move, for people to read."""

    @property
    def timeline(self) -> Timeline:
        """Where group and stores record the time they spend."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    def serve(self, like: Sequence[Tensor], make_server: Callable[[], Server]) -> Store:
        """Start one server, made where it will live, and connect this worker to it. Collective.

        Args:
            like: tensors with the shapes and dtypes of the server's parameters.
            make_server: called on one rank only.
        """
