"""Momentum for asynchronous workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError
from scaledtrain.server.correction import Arrival, Context, Corrected, Correction

__all__ = ["Dana"]


@dataclass(frozen=True)
class Dana(Correction):
    r"""DANA: a momentum for each worker, who computes where the others will have moved x.

    v_i <- mu v_i + g, x <- x - eta v_i for the worker i that pushed. Who pulls is sent
    x - (eta mu / c) sum_j v_j, c gradients to an update: x after the momentum of one more push by
    everybody. One momentum for all workers, which the optimizer would keep, carries the parameters
    n of its steps away while a worker computes one gradient, and diverges where n is large.
    Measured on digits (benchmarks/README.md) it was the best of all corrections with 8, 16 and 32
    workers (3.1, 3.9, 5.9 % wrong), and slower than no momentum at very small learning rates.

    v_i takes the gradient's place before the optimizer, which therefore keeps no momentum of its
    own. With SGD this is the algorithm; with an optimizer that scales its gradients the guess is a
    rough one. The weight decay of the optimizer does not enter v_i.

    One worker: Nesterov's accelerated gradient in its original form, hence not plain SGD; mu = 0 is
    plain SGD, bit for bit. What ``Server.parameters`` holds, and training ends with, is x; what a
    worker evaluates on the way are the parameters it was sent.

    Sent: nothing more. Memory: one copy of the parameters per worker, and one for their sum. A
    crash of the server loses these: save ``state_dict``. That of a worker: its momentum is
    forgotten.

    Args:
        momentum: mu, in [0, 1).

    References:
        Hakimi et al. 2019, Taming Momentum in a Distributed Asynchronous Environment (arXiv
        1907.11612), DANA-Zero.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"Dana: momentum is {self.momentum}; it is in [0, 1)")

    def start(self, server: Context) -> None:
        """All is at rest."""
        if any(server.option("momentum")):
            raise ConfigError(
                "Dana keeps a momentum for each worker, but the optimizer has one of its own; make "
                "it with momentum=0"
            )
        server.shared["sum"] = [torch.zeros_like(p.data) for p in server.parameters]

    def correct(self, arrival: Arrival, server: Context) -> Corrected:
        """Take the gradient into the worker's momentum, which is used in its place."""
        velocity = server.of_worker.get(arrival.worker)
        if velocity is None:
            velocity = [torch.zeros_like(p.data) for p in server.parameters]
            server.of_worker[arrival.worker] = velocity
        total, gradient = server.shared["sum"], list(arrival.gradient)
        torch._foreach_sub_(total, velocity, alpha=1.0 - self.momentum)
        torch._foreach_add_(total, gradient)
        torch._foreach_mul_(velocity, self.momentum)
        torch._foreach_add_(velocity, gradient)
        return Corrected([v.clone() for v in velocity])  # an optimizer may write to its gradients

    def outgoing(self, server: Context) -> Sequence[Tensor]:
        """The parameters, moved by everybody's momentum."""
        if self.momentum == 0.0:
            return server.parameters
        factor = self.momentum / server.gradients_per_update
        rates, total = server.option("lr"), server.shared["sum"]
        return [
            torch.sub(p.data, s, alpha=lr * factor)
            for p, s, lr in zip(server.parameters, total, rates, strict=True)
        ]

    def forget(self, worker: int, server: Context) -> None:
        """The worker's momentum no longer counts."""
        velocity = server.of_worker.pop(worker, None)
        if velocity is not None:
            torch._foreach_sub_(server.shared["sum"], velocity)
