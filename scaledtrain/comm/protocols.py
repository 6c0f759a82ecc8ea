"""What a strategy may ask of the outside world: a group, a store, peers, a board.

All are small on purpose: everything that costs communication goes through these few calls, so that
another world (shared memory, gloo, NCCL, a simulator) is one more implementation and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scaledtrain.server import Server
    from scaledtrain.timeline import Timeline

__all__ = ["Board", "Group", "Handle", "Link", "Peer", "Peers", "Pulled", "ReduceOp", "Store"]

ReduceOp = Literal["sum", "mean", "max"]


class Handle(Protocol):
    """A collective, or a message, that has begun."""

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
    fastest: float = 0.0
    """The largest speed that a worker taking part last told with a push; 0 if none told any."""


class Store(Protocol):
    """One worker's access to the server's parameters."""

    def push(self, update: Sequence[Tensor], version: int, speed: float = 0.0) -> None:
        """Hand over a gradient taken at ``version``. The tensors may be reused on return.

        Args:
            update: one tensor for each parameter.
            version: of the parameters that it belongs to.
            speed: of this worker, in whatever unit all of them use; all learn the largest.
        """

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


class Peer(Protocol):
    """What one rank keeps for the others to reach: pure, no clock, no threads, no I/O."""

    def receive(self, sender: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take a message whole.

        Called by whatever carries messages, one at a time, never while the rank holds its lock.

        Args:
            sender: the rank that it is from.
            tensors: valid only until the return.

        Returns:
            The answer, read before the next call; empty where messages have none.
        """


class Peers(Protocol):
    """One rank's way to the others' peers; nobody's computing is waited for."""

    def lock(self) -> AbstractContextManager[None]:
        """While it is held, no message reaches this rank's own peer; hold it briefly.

        Never hold it while waiting for a call: two ranks that call each other would be stuck.
        """

    def call(self, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> Handle:
        """Begin to send a message to another rank's peer; one at a time.

        The returned handle's ``wait`` returns once that peer has received it, so that a message is
        in flight only as long as somebody has to wait for it.

        Args:
            rank: not this one.
            tensors: the message; left alone until ``wait`` has returned.
            into: where the answer is written before ``wait`` returns; empty if there is none.

        Raises:
            WaitTimeoutError: (here or in ``Handle.wait``) that rank is there, but no answer came.
            PeerLostError: (here or in ``Handle.wait``) that rank died. Whether it received the
                message is not known.
        """


class Board(Protocol):
    """Where each rank writes one number for all to read: what it does, and that it still does it.

    For a number now and then, not for data.
    """

    def write(self, word: int) -> None:
        """Replace this rank's word, 0 at first, by another one, >= 0 and below 2^53."""

    def read(self) -> Sequence[int]:
        """By rank, the last word that is known here, or -1: the rank died. It never waits.

        This rank's own is always the last one; others' may lag a little.
        """

    def wait(self, until: Callable[[Sequence[int]], bool], doing: str) -> None:
        """Return as soon as the words, as ``read`` gives them, are such that ``until`` is true.

        Args:
            until: asked when a word has changed, or now and then.
            doing: what this rank is in, for the message.

        Raises:
            WaitTimeoutError: no word changed for too long; those that change only are slow.
        """


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

    def share(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors, zero at first, in memory that is the same for all ranks. Collective.

        They stay valid for as long as they are kept, also when the link is closed. Nothing orders
        what several ranks read and write at the same time.

        Args:
            like: tensors whose shapes and dtypes are taken.

        Raises:
            ConfigError: they are not on the CPU, or the ranks not on one host.
        """

    def board(self) -> Board:
        """A board of its own for the caller. Collective."""

    def meet(self, like: Sequence[Tensor], peer: Peer, answers: bool) -> Peers:
        """Let all ranks send messages to each other's peers from now on. Collective.

        Args:
            like: tensors with the shapes and dtypes of every message, and of every answer.
            peer: this rank's.
            answers: whether messages are answered.
        """
