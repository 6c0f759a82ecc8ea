"""SlowMo: local SGD with a momentum from period to period."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica
from scaledtrain.strategies.periodic import Fragment, Periodic

__all__ = ["SlowMo"]


class SlowMo(Periodic):
    r"""Local SGD whose periods have a momentum: where the replicas went on average, they go on.

    With x_start the parameters at a period's start, x_mean the mean over the replicas at its end,
    gamma the mean learning rate of its steps, alpha and beta ``slow_lr`` and ``slow_momentum``::

        u <- beta u + (x_start - x_mean) / gamma
        x <- x_start - alpha gamma u

    so that u stays in the unit of a gradient when the learning rate changes. alpha = 1, beta = 0 is
    local SGD, bit for bit. An unfinished period ends with the mean, without momentum. Each
    replica's optimizer keeps its own state.

    Sent: one all-reduce of the parameters every H steps. Waits: for the slowest replica, then only.
    A crash of any replica ends the run for all, and loses what was not saved.

    Args:
        sync_every: H, steps that a replica makes alone.
        slow_momentum: beta, in [0, 1).
        slow_lr: alpha, > 0.

    Raises:
        ConfigError: one of them is out of its range.

    Example:
        >>> from functools import partial
        >>> import scaledtrain
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> slow = SlowMo(sync_every=1, slow_momentum=0.5)
        >>> with scaledtrain.connect() as link:
        ...     slow.attach(scaledtrain.Replica(model, partial(torch.optim.SGD, lr=1.0)), link)
        ...     for _ in range(2):  # a gradient of 1: x = -1, then -1 - (1 + 0.5)
        ...         slow.reduce_gradients()
        ...         model.weight.grad = torch.ones(1, 1)
        ...         slow.apply_gradients()
        ...         slow.after_step()
        >>> model.weight.item()
        -2.5

    References:
        Wang et al. 2020, SlowMo: Improving Communication-Efficient Distributed SGD with Slow
        Momentum, arXiv 1910.00643.
    """

    def __init__(self, sync_every: int, slow_momentum: float = 0.5, slow_lr: float = 1.0) -> None:
        super().__init__(sync_every)
        if not 0.0 <= slow_momentum < 1.0:
            raise ConfigError(
                f"slow_momentum is {slow_momentum}; it is in [0, 1) (0: none, which is local SGD)"
            )
        if not slow_lr > 0.0:
            raise ConfigError(f"slow_lr is {slow_lr}; it is > 0 (1: as in local SGD)")
        self.slow_momentum = slow_momentum
        self.slow_lr = slow_lr
        self._learning_rates = 0.0  # summed over the steps of the period

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's parameters; the first period begins. Collective; once."""
        super().attach(replica, link)
        self._momentum = [torch.zeros_like(p) for p in replica.parameters]

    def _divide(self, parameters: Sequence[nn.Parameter]) -> list[Fragment]:
        return [Fragment(parameters, anchored=True)]

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Take note of samples and learning rate; each replica uses its own gradients."""
        super().reduce_gradients(weight)
        self._learning_rates += self.learning_rate

    @torch.no_grad()
    def _synchronise_if_due(self) -> None:
        if self.step % self.sync_every:
            return
        (everything,) = self._fragments
        parameters = everything.parameters
        # Its mean as well: where a replica's loop left updates out, its schedule may be behind.
        rate = torch.tensor([self._learning_rates / everything.steps], device=self._replica.device)
        everything.reduce(self._group, [*parameters, rate]).wait()
        gamma = float(rate.item())
        moved = torch._foreach_sub(everything.anchor, parameters)
        # x_start - alpha gamma u, arranged so that it is exactly the mean if alpha = 1, beta = 0.
        torch._foreach_add_(parameters, moved, alpha=1.0 - self.slow_lr)
        push = -self.slow_lr * self.slow_momentum * gamma
        torch._foreach_add_(parameters, self._momentum, alpha=push)
        torch._foreach_mul_(self._momentum, self.slow_momentum)
        if gamma > 0.0:  # else nothing has moved
            torch._foreach_add_(self._momentum, moved, alpha=1.0 / gamma)
        everything.begin()
        self._learning_rates = 0.0

    def settle(self) -> None:
        """End an unfinished period with the mean; buffers are rank 0's."""
        super().settle()
        self._learning_rates = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizer, slow momentum and the period under way; every replica's is its own."""
        momentum = [u.clone() for u in self._momentum]
        return {
            **super().state_dict(),
            "momentum": momentum,
            "learning_rates": self._learning_rates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on this rank; after ``attach``."""
        super().load_state_dict(state)
        torch._foreach_copy_(self._momentum, state["momentum"])
        self._learning_rates = state["learning_rates"]
