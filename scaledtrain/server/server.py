"""The parameter server as pure logic: no clock, no threads, no input or output.

It owns the parameters, their optimizer and a version counter, and answers pushes. Who carries the
messages (a direct call, shared memory, sockets, a simulator) and when is not its business, so that
one implementation serves them all and every rule can be tested by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.replica import Updater
from scaledtrain.server.admission import Admission, Asynchronous

__all__ = ["Pushed", "Server"]


class Pushed(NamedTuple):
    """What became of a push."""

    accepted: bool
    staleness: int


class Server:
    r"""Parameters that many workers update, each with gradients of a version it pulled before.

    A gradient taken at version v that arrives at version k has staleness tau = k - v. The admission
    policy says whether it is accepted and how many accepted gradients g_1..g_c make one update with
    their mean, after which the version grows by one.

    Args:
        parameters: initial values; copied, on their device.
        make_updater: makes optimizer and schedule over the server's copy.
        n_workers: workers, numbered from 0.
        admission: the policy.

    A crash loses the parameters and the optimizer's state: save ``state_dict``.

    Example:
        >>> from functools import partial
        >>> from scaledtrain.replica import Replica
        >>> replica = Replica(nn.Linear(1, 1, bias=False), partial(torch.optim.SGD, lr=0.5))
        >>> _ = nn.init.constant_(replica.parameters[0], 1.0)
        >>> server = Server(replica.parameters, replica.updater, n_workers=2)
        >>> server.push(0, [torch.tensor([[2.0]])], version=0)   # 1 - 0.5 * 2 = 0
        Pushed(accepted=True, staleness=0)
        >>> server.push(1, [torch.tensor([[2.0]])], version=0)   # 0 - 0.5 * 2 = -1
        Pushed(accepted=True, staleness=1)
        >>> server.parameters[0].item(), server.version
        (-1.0, 2)

    References:
        Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        make_updater: Callable[[Sequence[nn.Parameter]], Updater],
        n_workers: int,
        admission: Admission | None = None,
    ) -> None:
        if n_workers < 1:
            raise ConfigError(f"n_workers is {n_workers}; a server needs at least one worker")
        self.parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
        self.n_workers = n_workers
        self.version = 0
        self.last_version: int | None = None
        self.clocks = [0] * n_workers
        self.pulled = [-1] * n_workers
        self._updater = make_updater(self.parameters)
        self._admission: Admission = admission if admission is not None else Asynchronous()
        self._gathered = 0

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._updater.learning_rate

    @property
    def finished(self) -> bool:
        """Whether the last update that was allowed has been made."""
        return self.last_version is not None and self.version >= self.last_version

    def may_go_on(self, worker: int) -> bool:
        """Whether this worker may pull and begin its next step now."""
        return self.finished or self._admission.releases(worker, self)

    def pull(self, worker: int) -> Sequence[Tensor]:
        """The parameters, for a worker that ``may_go_on``; valid until the next push."""
        self.pulled[worker] = self.version
        return self.parameters

    def push(self, worker: int, gradient: Sequence[Tensor], version: int) -> Pushed:
        """Take a worker's gradient.

        Args:
            worker: who computed it.
            gradient: one tensor for each parameter, of its shape and dtype; read before the return.
            version: at which parameters it was computed.

        Returns:
            Whether it was accepted, and its staleness: the number of updates made between the pull
            of those parameters and the arrival of this gradient. A rejected one changes no
            parameter.
        """
        staleness = self.version - version
        self.clocks[worker] += 1
        if self.finished or not self._admission.accepts(staleness):
            return Pushed(False, staleness)
        needed = self._admission.gradients_per_update(self.n_workers)
        with torch.no_grad():
            for parameter, g in zip(self.parameters, gradient, strict=True):
                g = g.to(parameter.device)  # itself, unless it comes from another device
                if parameter.grad is None:
                    # A lone gradient is used where it lies; one that waits for others is kept.
                    parameter.grad = g if needed == 1 else g.clone()
                else:
                    parameter.grad.add_(g)
        self._gathered += 1
        if self._gathered >= needed:
            self._update()
        return Pushed(True, staleness)

    def _update(self) -> None:
        if self._gathered > 1:
            gathered = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_div_(gathered, self._gathered)
        self._updater.step()
        for parameter in self.parameters:
            parameter.grad = None
        self._gathered = 0
        self.version += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future depends on, gradients that wait for others included."""
        return {
            "parameters": [p.detach().clone() for p in self.parameters],
            "gathered": [None if p.grad is None else p.grad.clone() for p in self.parameters],
            "n_gathered": self._gathered,
            "updater": self._updater.state_dict(),
            "version": self.version,
            "clocks": list(self.clocks),
            "pulled": list(self.pulled),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        with torch.no_grad():
            for parameter, value, grad in zip(
                self.parameters, state["parameters"], state["gathered"], strict=True
            ):
                parameter.copy_(value)
                parameter.grad = None if grad is None else grad.clone()
        self._gathered = state["n_gathered"]
        self._updater.load_state_dict(state["updater"])
        self.version = state["version"]
        self.clocks = list(state["clocks"])
        self.pulled = list(state["pulled"])
