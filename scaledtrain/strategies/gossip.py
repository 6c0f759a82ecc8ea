"""Gossip: each replica averages with one other at a time, and nobody waits for all."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Link
from scaledtrain.peers import AveragingPeer, averaging_neighbours
from scaledtrain.replica import Replica
from scaledtrain.strategies.alone import Alone
from scaledtrain.strategies.courier import Courier
from scaledtrain.strategies.roster import Roster

__all__ = ["Gossip"]


class Gossip(Alone):
    r"""AD-PSGD: while a replica computes a gradient it averages with another one, drawn at random.

    In each step replica i computes g at x_i, meanwhile sends x_i to a replica j, and both move half
    way: d = (x_i - x_j) / 2, x_j <- x_j + d, x_i <- x_i - d. Then x_i <- x_i - lr g by its own
    optimizer, though g is of x_i before averaging. Both additions are made to whatever x is at that
    moment, so that the mean over all replicas moves by gradients alone.

    Every other replica calls, the rest are called: two that call each other would swap, not
    average. j is uniform over the called ones that still take part, by (seed, rank, step). A
    replica evaluates its own parameters; at the end all have the mean of all replicas' parameters.

    ``step`` and ``max_steps`` count this replica's own steps, also those without an update.

    Sent: the parameters to another replica, and half the difference back, once in a step of each
    that calls. Waits: for that answer alone, for nobody's computing; at the end for all. A crash
    loses what the replica had not yet passed on; the others leave it out, and each ends with its
    own parameters, as no mean of all can be taken. Memory: two more copies of the parameters.

    Where a replica is divided over ranks, each piece averages with the same piece of the other
    replica, which the first one draws for all; it may be of another moment than the other pieces.

    For a state that is exact for several replicas save it between two runs; saved in the middle,
    each replica's is of another moment.

    Args:
        seed: of the choice of neighbours.

    Example:
        >>> from functools import partial
        >>> import scaledtrain
        >>> model, gossip = torch.nn.Linear(2, 1), Gossip()
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     gossip.attach(replica, link)
        ...     gossip.start(max_steps=3)
        ...     while gossip.before_forward():
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         gossip.reduce_gradients()
        ...         gossip.apply_gradients()
        ...         gossip.after_step()
        ...     gossip.settle()
        >>> gossip.step
        3

    References:
        Lian, Zhang, Zhang, Liu 2018, Asynchronous Decentralized Parallel Stochastic Gradient
        Descent, arXiv 1710.06952.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's state, and let the others reach this one's."""
        super().attach(replica, link)
        self._pieces = link.pieces
        self._peer = AveragingPeer(replica.parameters)
        for reached, own in zip(self._peer.parameters, replica.parameters, strict=True):
            if own.grad_dtype != own.dtype:
                reached.grad_dtype = own.grad_dtype
        self._updater = replica.updater(self._peer.parameters)
        self._answer: list[Tensor] = []  # made when this replica first calls
        self._peers = link.meet(self._peer.tensors, self._peer, answers=True)
        self._roster = Roster(link.board(), link.group.rank, link.timeline.now)
        self._courier = Courier(self._peers, self._roster, link.timeline)

    def start(self, max_steps: int | None) -> None:
        """A run begins that ends when ``step`` reaches ``max_steps``, or when one asks for it."""
        super().start(max_steps)
        self._roster.begin()

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """Begin to average if this replica calls; False if the run is over for it."""
        self._end_exchange()
        going = not self._roster.stopped and super().before_forward(microbatches, weight)
        neighbours = averaging_neighbours(self._group.rank, self._roster.present())
        draw = random.Random(f"{self.seed} {self._group.rank} {self.step}")
        neighbour = draw.choice(neighbours) if neighbours else None
        if self._pieces.size > 1:  # each may see another moment: the first one decides
            told = torch.tensor([int(going), -1 if neighbour is None else neighbour])
            self._pieces.broadcast([told])
            going, neighbour = bool(told[0]), None if told[1] < 0 else int(told[1])
        if going and neighbour is not None:
            self._answer = self._answer or [torch.empty_like(t) for t in self._peer.tensors]
            sent = [p.detach() for p in self._replica.parameters]
            self._courier.begin(neighbour, sent, self._answer)
        return going

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Nothing is combined; the averaging ends."""
        self._end_exchange()

    def _end_exchange(self) -> None:
        if self._courier.end():
            with self._peers.lock():
                self._peer.finish(self._answer)

    def apply_gradients(self) -> None:
        """Update the parameters that the others reach."""
        pairs = list(zip(self._peer.parameters, self._replica.parameters, strict=True))
        for reached, own in pairs:
            reached.grad = own.grad
        with self._peers.lock():
            super().apply_gradients()
        for reached, _ in pairs:
            reached.grad = None

    def after_step(self) -> None:
        """Count the step; compute with what the parameters have become."""
        super().after_step()
        self._end_exchange()  # if there were no gradients to reduce
        self._take()
        self._roster.beat()

    def _take(self) -> None:
        with self._peers.lock():
            self._peer.read(self._replica.parameters)

    def agree_to_stop(self, vote: bool) -> bool:
        """Tell the others, who look before each step."""
        if vote:
            self._roster.stop()
        return vote

    def settle(self) -> None:
        """Wait for all replicas; all take the mean, and rank 0's buffers."""
        self._end_exchange()
        if self._roster.leave("the end of Gossip"):
            with self._peers.lock():  # who is through already may begin its next run, and call
                self._group.all_reduce(self._peer.tensors, "mean").wait()
            super().settle()
        self._take()

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizer and parameters."""
        with self._peers.lock():
            parameters = [t.clone() for t in self._peer.tensors]
        return {**super().state_dict(), "parameters": parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before any replica makes a step."""
        super().load_state_dict(state)
        with self._peers.lock():
            self._peer.write(state["parameters"])
        self._take()
