"""Elastic averaging: replicas on springs around a centre."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica
from scaledtrain.strategies.alone import Alone
from scaledtrain.strategies.centre import Centre

__all__ = ["EASGD"]

_BETA = 0.9  # alpha times the number of replicas; the paper's


class EASGD(Alone):
    r"""Replicas train for themselves; now and then each moves towards a centre, and it to them.

    Every ``sync_every`` steps replica i fetches the centre c from its server and
    d = alpha (x_i - c); x_i <- x_i - d; c <- c + d. Between the first of these and the last the
    centre may have moved by other replicas' d: they add up. The run ends with the centre, which is
    also what is evaluated. One replica is a spring with two ends, hence not plain training.

    ``step`` and ``max_steps`` count this replica's own steps, also those without an update.

    Sent: the centre down and d up, every ``sync_every`` steps. Waits: for nobody, but at the end.
    A stop that one replica asks for reaches the others when they fetch the centre. A crash of the
    server's rank loses the centre, that of another one what it had not given to the centre.

    Args:
        sync_every: steps between two moves, >= 1.
        alpha: strength of the spring, in (0, 1]; default 0.9 / (number of replicas).

    Raises:
        ConfigError: an argument is outside its range.

    Example:
        >>> import scaledtrain
        >>> model, easgd = torch.nn.Linear(2, 1), EASGD(sync_every=2)
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     easgd.attach(replica, link)
        ...     easgd.start(max_steps=3)
        ...     while easgd.before_forward():
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         easgd.apply_gradients()
        ...         easgd.after_step()
        ...     easgd.settle()
        >>> easgd.step
        3

    References:
        Zhang, Choromanska, LeCun 2015, Deep Learning with Elastic Averaging SGD (arXiv 1412.6651),
        its asynchronous algorithm.
    """

    def __init__(self, sync_every: int = 10, alpha: float | None = None) -> None:
        if sync_every < 1:
            raise ConfigError(f"EASGD: sync_every is {sync_every}; it counts steps, >= 1")
        if alpha is not None and not 0.0 < alpha <= 1.0:
            raise ConfigError(f"EASGD: alpha is {alpha}; it is in (0, 1]")
        super().__init__()
        self.sync_every = sync_every
        self.alpha = alpha

    def attach(self, replica: Replica, link: Link) -> None:
        """Start replicas and centre with rank 0's parameters."""
        super().attach(replica, link)
        # Its "gradient" is -d, so that a step of plain SGD at learning rate 1 adds d.
        self._centre = Centre(replica, link, partial(torch.optim.SGD, lr=1.0))
        self._alpha = _BETA / link.group.size if self.alpha is None else self.alpha

    def start(self, max_steps: int | None) -> None:
        """A run begins that ends when ``step`` reaches ``max_steps``, or when one asks for it."""
        super().start(max_steps)
        self._centre.start()

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """False once this replica has made its steps, or has heard that the run is to end."""
        return not self._centre.stopped and super().before_forward(microbatches, weight)

    def after_step(self) -> None:
        """Count the step; with every ``sync_every``-th one, move."""
        super().after_step()
        self._centre.beat()
        self.staleness = None
        if self.step % self.sync_every == 0:
            self._move()

    @torch.no_grad()
    def _move(self) -> None:
        own: list[Tensor] = list(self._replica.parameters)
        moves = torch._foreach_sub(own, self._centre.fetch())
        torch._foreach_mul_(moves, self._alpha)
        torch._foreach_sub_(own, moves)
        torch._foreach_neg_(moves)
        self._centre.push(moves)
        self.staleness = self._centre.staleness

    def agree_to_stop(self, vote: bool) -> bool:
        """Tell the server, which tells the others when they fetch the centre."""
        if vote:
            self._centre.stop()
        return vote

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Inside, the replica has the centre's parameters."""
        with self._centre.lent():
            yield

    def settle(self) -> None:
        """Wait for all replicas; all take the centre, and rank 0's buffers."""
        if self._centre.settle():
            super().settle()

    def state_dict(self) -> dict[str, Any]:
        """Step and optimizer, and on the server's rank the centre."""
        return {**super().state_dict(), "centre": self._centre.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before any replica makes a step."""
        super().load_state_dict(state)
        self._centre.load_state_dict(state["centre"])
