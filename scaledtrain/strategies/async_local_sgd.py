"""Local SGD without rounds: each replica gives what it has learned when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.optim import DelayedNesterov
from scaledtrain.replica import MakeOptimizer, Replica
from scaledtrain.strategies.alone import Alone
from scaledtrain.strategies.centre import Centre
from scaledtrain.strategies.round import Round

__all__ = ["AsyncLocalSGD"]


class AsyncLocalSGD(Alone):
    r"""Each replica trains for itself, pushes how far it came, pulls, and goes on from there.

    A replica that pulled theta and made ``sync_every`` local steps to theta_i pushes the "gradient"
    g = theta - theta_i, which the server's ``outer_optimizer`` uses at once, however much the
    server's parameters have moved meanwhile. The run ends with the server's parameters, which are
    also what is evaluated; a replica that ends between two pushes pushes what it has.

    With ``proportional_steps`` a replica of speed v_i, local steps per second of its last round,
    makes max(1, floor(sync_every v_i / max_j v_j)) of them, so that all need the same time and no
    push is much staler than the others. Two such runs are never equal: times differ.

    ``step`` and ``max_steps`` count this replica's own local steps; one without an update counts.

    Sent: g up and the parameters down, once a round. Waits: for nobody, but at the end. A stop that
    one replica asks for reaches the others when they pull. A crash of the server's rank loses the
    parameters; a crash of another one the round that it was in. Memory: one more copy of the
    parameters.

    Args:
        sync_every: local steps in a round, >= 1.
        outer_optimizer: of the server; default `DelayedNesterov` with lr=0.7, momentum=0.9 and the
            number of replicas n as its delay. Another one, which makes a whole update of every
            push, wants a learning rate about n times smaller than in synchronous rounds.
        proportional_steps: let slower replicas make fewer steps in a round.

    Raises:
        ConfigError: an argument is outside its range.

    Example:
        >>> import scaledtrain
        >>> model, strategy = torch.nn.Linear(2, 1), AsyncLocalSGD(sync_every=2)
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.AdamW, lr=0.01))
        >>> with scaledtrain.connect() as link:
        ...     strategy.attach(replica, link)
        ...     strategy.start(max_steps=4)
        ...     while strategy.before_forward():
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         strategy.apply_gradients()
        ...         strategy.after_step()
        ...     strategy.settle()
        >>> strategy.step
        4

    References:
        Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling, arXiv 2401.09135;
        with ``proportional_steps`` its "DN + DyLU".
    """

    def __init__(
        self,
        sync_every: int = 50,
        outer_optimizer: MakeOptimizer | None = None,
        proportional_steps: bool = False,
    ) -> None:
        if sync_every < 1:
            raise ConfigError(f"AsyncLocalSGD: sync_every is {sync_every}; it counts steps, >= 1")
        super().__init__()
        self.outer_optimizer = outer_optimizer
        self._round = Round(sync_every, proportional_steps)

    def attach(self, replica: Replica, link: Link) -> None:
        """Start replicas and server with rank 0's parameters."""
        super().attach(replica, link)
        make_outer = self.outer_optimizer or partial(
            DelayedNesterov, lr=0.7, momentum=0.9, delay=link.group.size
        )
        self._centre = Centre(replica, link, make_outer)
        self._anchor: list[Tensor] = [p.detach().clone() for p in replica.parameters]

    def start(self, max_steps: int | None) -> None:
        """A run begins that ends when ``step`` reaches ``max_steps``, or when one asks for it."""
        super().start(max_steps)
        self._centre.start()

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """False once this replica has made its steps, or has heard that the run is to end."""
        self._round.begin_step(self._timeline.now())
        return not self._centre.stopped and super().before_forward(microbatches, weight)

    def after_step(self) -> None:
        """Count the step; at the end of a round push, pull, and see how long the next one is."""
        super().after_step()
        self._centre.beat()
        self.staleness = None
        self._round.end_step(self._timeline.now())
        if self._round.complete:
            self._push()
            self._pull()
            self._round.restart(self._centre.fastest)
            self.staleness = self._centre.staleness

    @torch.no_grad()
    def _push(self) -> None:
        # Ranks that have the replica together make the same steps, whatever each has measured.
        self._round.seconds = self._replica.largest(self._round.seconds)
        own: list[Tensor] = list(self._replica.parameters)
        self._centre.push(torch._foreach_sub(self._anchor, own), self._round.speed)

    @torch.no_grad()
    def _pull(self) -> None:
        torch._foreach_copy_(self._anchor, self._centre.fetch())
        torch._foreach_copy_(list[Tensor](self._replica.parameters), self._anchor)

    def agree_to_stop(self, vote: bool) -> bool:
        """Tell the server, which tells the others when they pull."""
        if vote:
            self._centre.stop()
        return vote

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Inside, the replica has the server's parameters."""
        with self._centre.lent():
            yield

    def settle(self) -> None:
        """Push what is left, wait for all replicas; all take the server's parameters."""
        if self._round.made > 0:
            self._push()
            self._round.restart()
        complete = self._centre.settle()
        for anchor, own in zip(self._anchor, self._replica.parameters, strict=True):
            anchor.copy_(own.detach())
        if complete:
            super().settle()

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizer, where the round began and how far it is; on its rank the server."""
        return {
            **super().state_dict(),
            "centre": self._centre.state_dict(),
            "anchor": [p.clone() for p in self._anchor],
            "round": self._round.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before any replica makes a step."""
        super().load_state_dict(state)
        self._centre.load_state_dict(state["centre"])
        torch._foreach_copy_(self._anchor, state["anchor"])
        self._round.load_state_dict(state["round"])
