"""The asynchronous family: workers that push gradients to a server and pull parameters from it."""

from __future__ import annotations

from typing import Any

from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group, Link, Pulled
from scaledtrain.replica import Replica
from scaledtrain.server import Admission, Asynchronous, Correction, Server, Uncorrected
from scaledtrain.strategies.strategy import Strategy

__all__ = ["ParameterServer"]

_ALONE = LocalGroup()


class ParameterServer(Strategy):
    """Each worker pulls parameters, computes a gradient, pushes it, and goes on.

    Which gradients are accepted, how many make an update and who must wait is the admission
    policy's choice, what a stale gradient is worth the correction's; any policy goes with any
    correction, and with any optimizer: see `scaledtrain.server`. The server lives on rank 0, beside
    its worker.

    A parameter that a step gives no gradient counts as one of gradient zero.

    Sent: parameters down and a gradient up, once per step and worker. Waits: only where the policy
    says so. A crash of the server's rank loses parameters and optimizer (save ``state_dict``).

    Args:
        admission: the policy; default `Asynchronous`.
        correction: of stale gradients; default none.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> import scaledtrain
        >>> model, server = torch.nn.Linear(2, 1), ParameterServer()
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     server.attach(replica, link)
        ...     server.start(max_steps=3)
        ...     while server.before_forward():
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         server.apply_gradients()
        ...     server.settle()
        >>> server.step
        3

    References:
        Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server; Dean et al.
        2012, Large Scale Distributed Deep Networks.
    """

    def __init__(
        self, admission: Admission | None = None, correction: Correction | None = None
    ) -> None:
        self.admission = admission if admission is not None else Asynchronous()
        self.correction = correction if correction is not None else Uncorrected()
        super().__init__()
        self._learning_rate = 0.0
        self._has_gradient = True
        self._pushed = False

    def attach(self, replica: Replica, link: Link) -> None:
        """Start the server with rank 0's parameters."""
        self._replica = replica
        link.group.broadcast([*replica.parameters, *replica.frozen, *replica.buffers])

        def make_server() -> Server:
            return Server(
                replica.parameters,
                replica.updater,
                link.group.size,
                self.admission,
                self.correction,
            )

        self._group = link.group
        self._store = link.serve(replica.parameters, make_server)

    @property
    def gradients_per_step(self) -> int:
        """As many as the admission policy asks for."""
        return self.admission.gradients_per_update(self._group.size)

    def start(self, max_steps: int | None) -> None:
        """Let the server make no update beyond ``max_steps``."""
        self._store.limit(max_steps)

    @property
    def learning_rate(self) -> float:
        """Of the server's next update."""
        return self._learning_rate

    @property
    def lockstep(self) -> Group:
        """This worker alone."""
        return _ALONE

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """Pull; False once the last update has been made, or somebody asked for the end."""
        pulled = self._store.pull(self._replica.parameters)
        self._note(pulled)
        return not pulled.stopped

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Nothing is combined here; a replica without samples (weight 0) has nothing to push."""
        self._has_gradient = weight > 0.0

    def apply_gradients(self) -> None:
        """Push the gradient."""
        if self._has_gradient:
            self._store.push(self._replica.gradients(), self.step)
            self._pushed = True

    def after_step(self) -> None:
        """The server keeps the clocks: tell it of a step without a gradient."""
        if not self._pushed:
            self._store.skip()
        self._pushed = False

    def agree_to_stop(self, vote: bool) -> bool:
        """Tell the server, which tells the others when they pull."""
        if vote:
            self._store.stop()
        return vote

    def settle(self) -> None:
        """Wait for all workers; take the final parameters, and rank 0's buffers."""
        self._note(self._store.settle(self._replica.parameters))
        self._group.broadcast(self._replica.buffers)

    def _note(self, pulled: Pulled) -> None:
        self.step = pulled.version
        self._learning_rate = pulled.learning_rate
        self.staleness = pulled.staleness if pulled.staleness >= 0 else None

    def state_dict(self) -> dict[str, Any]:
        """The step, and on rank 0 the server's state."""
        return {"step": self.step, "server": self._store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore step and server, before any worker pulls; all of them take part again."""
        self.step = state["step"]
        if state["server"]:
            self._store.load_state_dict(state["server"])
