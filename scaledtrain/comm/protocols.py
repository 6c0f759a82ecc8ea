"""What a strategy may ask of the outside world: a group, a store, peers, a board.

All are small on purpose: everything that costs communication goes through these few calls, so that
another world (shared memory, gloo, NCCL, a simulator) is one more implementation and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from scaledtrain.clock import Clock
    from scaledtrain.comm.compress import Codec
    from scaledtrain.comm.notes import Notes
    from scaledtrain.comm.serving.partition import Piece
    from scaledtrain.schedule import Pace
    from scaledtrain.server import Server
    from scaledtrain.timeline import Timeline

__all__ = [
    "Board",
    "Group",
    "Handle",
    "Link",
    "MakeServer",
    "Peer",
    "Peers",
    "Pulled",
    "ReduceOp",
    "ServeOptions",
    "Store",
]

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


class Pulled(NamedTuple):
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
    """The largest speed that a worker still alive told last; 0 if none did."""
    complete: bool = True
    """No worker has been lost since the job began."""


class Store(Protocol):
    """One worker's access to the server's parameters."""

    def start(self, last_version: int | None) -> None:
        """Wait until every worker has come here; a stop that was asked for before is over.

        No update is made beyond this version; None: there is no limit.
        """

    def push(self, update: Sequence[Tensor], version: int, speed: float = 0.0) -> None:
        """Hand over a gradient taken at ``version``. The tensors may be reused on return.

        One that is not finite, or of other shapes, is counted and not sent.

        Args:
            update: one tensor for each parameter.
            version: as the pull told it.
            speed: of this worker, in any unit that all of them use, for ``Pulled.fastest``.
        """

    def skip(self) -> None:
        """Say that this worker's step ended without a gradient."""

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Let these hold the server's parameters; waits where the admission policy says so.

        Tensors on the CPU may be given other memory, which the store goes on using: do not keep
        views of them.

        Raises:
            WaitTimeoutError: the policy, or the server, made this worker wait too long.
            PeerLostError: the rank that holds the server died.
        """

    def version(self) -> int:
        """Updates that the server's parameters have received by now."""

    def stop(self) -> None:
        """Ask that every worker ends: from now on every pull says ``stopped``."""

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait until every worker has come here, then pull; the run is over until `start`.

        The tensors are in memory of their own again.
        """

    def state_dict(self) -> dict[str, Any]:
        """Of the server's part on this rank, and of what a compression keeps; empty if neither."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before any worker pulls."""

    def close(self) -> None:
        """Tell the server that this worker leaves."""


MakeServer = Callable[["Sequence[Piece]"], "Server"]
"""From the pieces of the parameters that a shard holds to the server of this shard."""


@dataclass(frozen=True)
class ServeOptions:
    """Where a server lives, and how its workers reach it.

    Args:
        shards: ranks over which its parameters are divided.
        cut: whether a tensor may be divided, too; see `Partition`.
        overlap: pull while computing: a worker gets what it asked for one step earlier.
        compression: of pushed gradients; None sends them as they are.
    """

    shards: int = 1
    cut: bool = True
    overlap: bool = False
    compression: Codec | None = None


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

    def lock(self) -> AbstractContextManager[object]:
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

    @property
    def clock(self) -> Clock:
        """By which this rank computes and waits."""

    def part(self, name: str, ranks: Sequence[int], pieces: str | None = None) -> Link:
        """The link among some of the ranks, who call this together; it ends with this one.

        Args:
            name: of the part, the same on its ranks, and no other part's; it may be made again.
            ranks: of this link, in the order of their ranks in the part.
            pieces: the name of a part made before, of the ranks that have this rank's replica
                together: for each of them a part like the new one is made, and a server of these
                has a shard for each. None: each rank of the new part has a whole replica.

        Raises:
            ConfigError: ranks here are never divided.
        """

    @property
    def pieces(self) -> Group:
        """The ranks that have this rank's replica together."""

    def process_group(self) -> ProcessGroup:
        """torch.distributed's own group of these ranks, who call this together the first time.

        Raises:
            ConfigError: there is none here.
        """

    def pace(self, seed: int) -> Pace | None:
        """How long computing takes on this rank's device; None: as long as it really does.

        Args:
            seed: of what is drawn.
        """

    @property
    def bytes_sent(self) -> int:
        """Of the tensors that this rank has handed to a transport so far."""

    @property
    def timeout_seconds(self) -> float:
        """The longest that a rank waits for another."""

    event_log: Path | None
    """Where the next server that is made writes its events; None: nowhere."""

    @property
    def returned(self) -> bool:
        """This rank died, or was lost, and came back to a job that had gone on without it.

        It has no group then; only strategies with a server can take it back.
        """

    def serve(
        self, like: Sequence[Tensor], make_server: MakeServer, options: ServeOptions
    ) -> Store:
        """Start one server, made where it will live, and connect this worker to it. Collective.

        Args:
            like: tensors with the shapes and dtypes of the server's parameters.
            make_server: makes one shard of it.
            options: where it lives, and how it is reached.
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

    def notes(self) -> Notes | None:
        """Notes of their own for the caller; None where ranks cannot hang. All ranks call it."""

    def meet(self, like: Sequence[Tensor], peer: Peer, answers: bool) -> Peers:
        """Let all ranks send messages to each other's peers from now on. Collective.

        Args:
            like: tensors with the shapes and dtypes of every message, and of every answer.
            peer: this rank's.
            answers: whether messages are answered.
        """
