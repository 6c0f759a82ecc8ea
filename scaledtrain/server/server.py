"""The parameter server as pure logic: no clock, no threads, no input or output.

It owns the parameters, their optimizer and a version counter, and answers pushes. Who carries the
messages (a direct call, shared memory, sockets, a simulator) and when is not its business, so that
one implementation serves them all and every rule can be tested by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaledtrain.copies import copied
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Updater
from scaledtrain.server.admission import Admission
from scaledtrain.server.checks import find_misfit, find_not_finite
from scaledtrain.server.correction import (
    Arrival,
    Context,
    Correction,
    Uncorrected,
)
from scaledtrain.server.ledger import Ledger
from scaledtrain.server.mean import WeightedMean
from scaledtrain.server.policies import Asynchronous
from scaledtrain.server.sent import Sent

__all__ = ["Pushed", "Server"]


class Pushed(NamedTuple):
    """What became of a push."""

    accepted: bool
    staleness: int
    fault: str | None = None
    """What is wrong with the gradient and whose it is; None for one that only came too late."""


class Server:
    r"""Parameters that many workers update, each with gradients of a version it pulled before.

    A gradient taken at version v that arrives at version k has staleness tau = k - v. The admission
    policy says whether it is accepted and how many accepted gradients g_1..g_c make one update with
    their mean, after which the version grows by one; the correction says what a stale one is worth.

    Args:
        parameters: initial values; copied, on their device. Floats of less than 32 bits are kept in
            float32, whatever the workers compute in.
        make_updater: makes optimizer and schedule over the server's copy.
        n_workers: workers, numbered from 0; all take part at first.
        admission: the policy; default `Asynchronous`.
        correction: of stale gradients; default none.

    A crash loses the parameters and the optimizer's state: save ``state_dict``.

    Example:
        >>> from functools import partial
        >>> from scaledtrain.replica import Replica
        >>> replica = Replica(nn.Linear(1, 1, bias=False), partial(torch.optim.SGD, lr=0.5))
        >>> _ = nn.init.constant_(replica.parameters[0], 1.0)
        >>> server = Server(replica.parameters, replica.updater, n_workers=2)
        >>> server.push(0, [torch.tensor([[2.0]])], version=0)   # 1 - 0.5 * 2 = 0
        Pushed(accepted=True, staleness=0, fault=None)
        >>> server.push(1, [torch.tensor([[2.0]])], version=0)   # 0 - 0.5 * 2 = -1
        Pushed(accepted=True, staleness=1, fault=None)
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
        correction: Correction | None = None,
    ) -> None:
        self._admission = admission if admission is not None else Asynchronous()
        self._correction = correction if correction is not None else Uncorrected()
        self.ledger = Ledger(n_workers, self._admission)
        self.parameters = [nn.Parameter(_wide_copy(p)) for p in parameters]
        self._updater = make_updater(self.parameters)
        self._context = Context(self.parameters, self._updater.optimizer, n_workers, 1)
        self._members_changed()
        self._correction.start(self._context)
        self._sent = Sent()
        self._mean = WeightedMean(self.parameters)

    @property
    def n_workers(self) -> int:
        """Workers that there are numbers for, taking part or not."""
        return self.ledger.n_workers

    @property
    def members(self) -> AbstractSet[int]:
        """Workers taking part."""
        return self.ledger.members

    @property
    def version(self) -> int:
        """Updates made."""
        return self.ledger.version

    @property
    def clocks(self) -> Sequence[int]:
        """For each worker, the steps it has finished: its pushes, accepted or not, and skips."""
        return self.ledger.clocks

    @property
    def last_version(self) -> int | None:
        """No update is made beyond this version; None: no limit."""
        return self.ledger.last_version

    @last_version.setter
    def last_version(self, version: int | None) -> None:
        self.ledger.last_version = version

    @property
    def finished(self) -> bool:
        """Whether the last update that was allowed has been made."""
        return self.ledger.finished

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._updater.learning_rate

    def may_go_on(self, worker: int) -> bool:
        """Whether this worker may pull and begin its next step now."""
        return self.ledger.may_go_on(worker)

    def pull(self, worker: int) -> Sequence[Tensor]:
        """What a worker that ``may_go_on`` computes with; valid until the next push.

        Raises:
            ConfigError: the worker does not take part.
        """
        self.ledger.pull(worker)
        with torch.no_grad():
            outgoing = self._correction.outgoing(self._context)
        if self._correction.needs_sent:
            self._sent.keep(worker, self.version, outgoing)
        return outgoing

    def push(
        self, worker: int, gradient: Sequence[Tensor], version: int, finite: bool = False
    ) -> Pushed:
        """Take a worker's gradient.

        Args:
            worker: who computed it.
            gradient: one tensor for each parameter, of its shape; read before the return. Another
                floating dtype is cast.
            version: at which parameters it was computed.
            finite: that it holds no NaN and no infinity is known, and need not be looked at.

        Returns:
            Whether it was accepted, and its staleness: the number of updates made between the pull
            of those parameters and the arrival of this gradient. A rejected one changes no
            parameter and no state but the worker's clock and counts. With ``fault`` it is one that
            no policy can use: of a wrong number or shape, not finite, of a version that the worker
            cannot have, or from a worker that does not take part.

        Raises:
            ConfigError: there is no such worker.
        """
        staleness = self.version - version
        sent = self._sent.take(worker, version) if self._correction.needs_sent else []
        fault = self._find_fault(worker, gradient, version, sent)
        admitted = fault is None and self.ledger.admits(worker, staleness)
        if admitted:
            gradient = [g.to(p) for g, p in zip(gradient, self.parameters, strict=True)]
            fault = None if finite else _of(worker, find_not_finite(gradient))
        accepted = admitted and fault is None
        self.ledger.push(worker, version, accepted)
        if accepted:
            self._gather(Arrival(worker, gradient, staleness, sent or []))
        return Pushed(accepted, staleness, fault)

    def reject(self, worker: int, version: int, why: str) -> Pushed:
        """Count a worker's push of a gradient that was found unusable before it came here.

        Raises:
            ConfigError: there is no such worker.
        """
        staleness = self.version - version
        if self._correction.needs_sent:
            self._sent.take(worker, version)
        self.ledger.push(worker, version, accepted=False)
        return Pushed(False, staleness, f"worker {worker}: {why}")

    def skip(self, worker: int) -> None:
        """A worker's step ended without a gradient (no samples, an overflow): advance its clock."""
        self.ledger.skip(worker)

    def to_abandon(self) -> list[int]:
        """Workers that should give up what they compute, pull and begin anew: it came too late."""
        return self.ledger.to_abandon()

    def remove(self, worker: int, done: bool = False) -> None:
        """Forget a worker that died, or that is done: nobody waits for it any more.

        Gradients that it gave are used. If the others waited only for it, this makes the update.

        Args:
            worker: which.
            done: it has ended a run, and will be back for the next one: what the correction keeps
                of it stays.
        """
        self.ledger.remove(worker)
        self._forget(worker, done)
        self._members_changed()
        if self.ledger.completes:
            self._update()

    def add(self, worker: int) -> None:
        """Let a worker take part (again), with nothing under way and level with the slowest."""
        if worker in self.members:
            self.remove(worker)
        self.ledger.add(worker)
        self._members_changed()

    def _find_fault(
        self, worker: int, gradient: Sequence[Tensor], version: int, sent: Sequence[Tensor] | None
    ) -> str | None:
        if worker not in self.members:
            return f"worker {worker} does not take part (any more); add({worker}) lets it"
        if version > self.version:
            return f"worker {worker}: version {version} does not exist yet; this is {self.version}"
        if sent is None:
            return f"worker {worker} pushed a gradient of version {version}, which it did not pull"
        return _of(worker, find_misfit(gradient, self.parameters))

    @torch.no_grad()
    def _gather(self, arrival: Arrival) -> None:
        gradient, scale = self._correction.correct(arrival, self._context)
        if not scale > 0.0:
            raise ConfigError(
                f"{self._correction} scales the learning rate by {scale}; not above 0"
            )
        completes = self.ledger.completes
        self._mean.add(gradient, scale, last=completes)
        if completes:
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        scale = self._mean.finish()
        self._correction.before_update(self._context)
        self._updater.step(scale)
        self._correction.after_update(self._context)
        self._mean.clear()
        self.ledger.update()

    @torch.no_grad()
    def _forget(self, worker: int, done: bool = False) -> None:
        self._sent.forget(worker)
        if not done:
            self._correction.forget(worker, self._context)

    def _members_changed(self) -> None:
        n = self._context.n_members = len(self.members)
        self._context.gradients_per_update = max(1, self._admission.gradients_per_update(n))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future depends on, gradients that wait for others included."""
        return {
            "parameters": copied([p.detach() for p in self.parameters]),
            "mean": self._mean.state_dict(),
            "updater": self._updater.state_dict(),
            "ledger": self.ledger.state_dict(),
            "correction": self._context.state_dict(),
            "sent": self._sent.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, also from another number of workers."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self._mean.load_state_dict(state["mean"])
        self._updater.load_state_dict(state["updater"])
        self.ledger.load_state_dict(state["ledger"])
        self._context.load_state_dict(state["correction"])
        self._sent.load_state_dict(state["sent"], self.parameters)
        for worker in range(self.n_workers, len(state["ledger"]["clocks"])):
            self._forget(worker)
        self._members_changed()
        if self.ledger.completes:  # the others, who are no more
            self._update()


def _wide_copy(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def _of(worker: int, fault: str | None) -> str | None:
    return None if fault is None else f"worker {worker}: {fault}"
