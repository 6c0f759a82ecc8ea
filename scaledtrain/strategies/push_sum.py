"""Push-sum: shares of parameters flow one way, and nobody waits for an answer."""

from __future__ import annotations

from typing import Any

import torch

from scaledtrain.comm.protocols import Link
from scaledtrain.peers import PushSumPeer, exponential_neighbour
from scaledtrain.replica import Replica
from scaledtrain.strategies.alone import Alone
from scaledtrain.strategies.courier import Courier
from scaledtrain.strategies.roster import Roster

__all__ = ["PushSum"]


class PushSum(Alone):
    r"""SGP: after each step a replica gives half of its parameters away, and uses what has come.

    Replica i holds a share (x_i, w_i), at first (parameters, 1), and computes at z_i = x_i / w_i:
    z_i <- z_i - lr g(z_i) by its own optimizer, x_i <- w_i z_i; then half of the share goes to one
    other replica, whose share it is added to whenever it arrives. In turn that is the 1st, 2nd,
    4th, 8th ... next replica on a ring (the directed exponential graph). The sums of x and of w
    change by gradients alone. Where all are equally fast w stays about 1; one that is slow has
    more, and one whose w has fallen below 1/2 gives nothing until something comes.

    Replicas wait for no share, so this is asynchronous SGP: no run is equal to another. A replica
    evaluates its own z; at the end all have sum x / sum w.

    Where a replica is divided over ranks, each piece gives and gets shares of its own.

    ``step`` and ``max_steps`` count this replica's own steps, also those without an update.

    Sent: the parameters to one other replica per step. Waits: until that one has received them, or
    with ``overlap`` only before the next is sent; never for another one's computing; at the end for
    all. A crash loses the share that the replica held. The others then begin anew with their z and
    w = 1, leave it out, and end with parameters of their own. Memory: two more copies of the
    parameters.

    For a state that is exact for several replicas save it between two runs; saved in the middle,
    each replica's is of another moment.

    Args:
        overlap: send while the next step computes; what is on its way is one step older.

    Example:
        >>> from functools import partial
        >>> import scaledtrain
        >>> model, push_sum = torch.nn.Linear(2, 1), PushSum()
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     push_sum.attach(replica, link)
        ...     push_sum.start(max_steps=3)
        ...     while push_sum.before_forward():
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         push_sum.apply_gradients()
        ...         push_sum.after_step()
        ...     push_sum.settle()
        >>> push_sum.step
        3

    References:
        Assran, Loizou, Ballas, Rabbat 2019, Stochastic Gradient Push for Distributed Deep Learning,
        arXiv 1811.10792; Assran, Rabbat 2018, Asynchronous Gradient-Push, arXiv 1803.08950.
    """

    def __init__(self, overlap: bool = False) -> None:
        super().__init__()
        self.overlap = overlap

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's state, and let the others reach this one's."""
        super().attach(replica, link)
        self._peer = PushSumPeer(replica.parameters, replica.device)
        self._message = self._peer.message()
        self._peers = link.meet(self._message, self._peer, answers=False)
        self._roster = Roster(link.board(), link.group.rank, link.timeline.now)
        self._courier = Courier(self._peers, self._roster, link.timeline)
        self._dead = self._roster.dead

    def start(self, max_steps: int | None) -> None:
        """A run begins that ends when ``step`` reaches ``max_steps``, or when one asks for it."""
        super().start(max_steps)
        self._roster.begin()

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """False if the run is over for this replica."""
        return not self._roster.stopped and super().before_forward(microbatches, weight)

    def apply_gradients(self) -> None:
        """Update z as it is now, and so x."""
        with self._peers.lock():
            self._peer.read(self._replica.parameters)
            super().apply_gradients()
            self._peer.write(self._replica.parameters)

    def after_step(self) -> None:
        """Count the step, give half away, compute with what has come."""
        super().after_step()
        self._end_sending()
        if (dead := self._roster.dead) != self._dead:
            self._dead = dead
            with self._peers.lock():
                self._peer.restart()
        ring = self._roster.present()
        neighbour = exponential_neighbour(self._group.rank, ring, self.step)
        if neighbour is not None:
            self._give(neighbour)
        with self._peers.lock():
            self._peer.read(self._replica.parameters)
        self._roster.beat()

    def _give(self, neighbour: int) -> None:
        with self._peers.lock():
            if not self._peer.may_give:
                return
            self._peer.give(self._message)
        self._courier.begin(neighbour, self._message)
        if not self.overlap:
            self._end_sending()

    def _end_sending(self) -> None:
        if self._courier.end() is False:  # it comes back
            with self._peers.lock():
                self._peer.receive(self._group.rank, self._message)

    def agree_to_stop(self, vote: bool) -> bool:
        """Tell the others, who look before each step."""
        if vote:
            self._roster.stop()
        return vote

    def settle(self) -> None:
        """Wait for all replicas; all take sum x / sum w, and rank 0's buffers."""
        self._end_sending()
        if self._roster.leave("the end of PushSum"):
            with self._peers.lock():  # who is through already may begin its next run, and send
                self._group.all_reduce(self._peer.share, "sum").wait()
                self._peer.restart()
            super().settle()
        with self._peers.lock():
            self._peer.read(self._replica.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizer and share."""
        self._end_sending()
        with self._peers.lock():
            share = [t.clone() for t in self._peer.share]
        return {**super().state_dict(), "share": share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before any replica makes a step."""
        super().load_state_dict(state)
        with self._peers.lock():
            torch._foreach_copy_(self._peer.share, state["share"])
            self._peer.read(self._replica.parameters)
