"""Local SGD: replicas train alone and average their parameters now and then."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica
from scaledtrain.strategies.periodic import Periodic

__all__ = ["LocalSGD"]

_logger = logging.getLogger(__name__)


class LocalSGD(Periodic):
    r"""Each replica makes ``sync_every`` steps alone; then all take the mean of their parameters.

    x_i <- x_i - eta g_i(x_i) at every step, and after each H-th: x_i <- sum_j w_j x_j / sum_j w_j,
    w_j the samples that replica j used in the period. A step whose update was skipped counts with
    its samples.

    *Post-local SGD* averages after every step at first, and only later after each H-th:
    ``local_after`` says from when on.

    Averaged are parameters alone: each optimizer keeps a state (momentum) of its own. So with H = 1
    plain SGD is `Sync` up to rounding (with momentum, as long as the replicas' steps have equally
    many samples), but Adam is not.

    Sent: one all-reduce of the parameters every H steps. Waits: for the slowest replica, then only.
    A crash of any replica ends the run for all, and loses what was not saved.

    Args:
        sync_every: H, steps that a replica makes alone.
        local_after: average after every step up to this one; 0: from the start every H. With
            ``"lr_drop"``: until a replica's learning rate is below its highest so far. That suits
            a schedule in steps; one that falls all the time wants a number.

    Raises:
        ConfigError: ``sync_every`` < 1, ``local_after`` < 0.

    Example:
        >>> from functools import partial
        >>> import scaledtrain
        >>> model, local = torch.nn.Linear(2, 1), LocalSGD(sync_every=8)
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     local.attach(replica, link)
        ...     for _ in range(20):
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         local.reduce_gradients()
        ...         local.apply_gradients()
        ...         local.after_step()
        ...     local.settle()  # 4 steps of the third period are done: they count, too
        >>> local.step
        20

    References:
        Stich 2018, Local SGD Converges Fast and Communicates Little, arXiv 1805.09767; Lin et al.
        2020, Don't Use Large Mini-Batches, Use Local SGD, arXiv 1808.07217.
    """

    def __init__(self, sync_every: int, local_after: int | Literal["lr_drop"] = 0) -> None:
        super().__init__(sync_every)
        if local_after != "lr_drop" and (isinstance(local_after, str) or local_after < 0):
            raise ConfigError(
                f"local_after is {local_after!r}; it is the step up to which replicas average "
                "after every step (0: none), or 'lr_drop'"
            )
        self.local_after = local_after
        self._together_until = math.inf if local_after == "lr_drop" else local_after

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's parameters; the first period begins. Collective; once."""
        super().attach(replica, link)
        if self.local_after == "lr_drop" and not self._updater.has_schedule:
            _logger.warning(
                "local_after is 'lr_drop', but the learning rate has no schedule, so it never "
                "drops and replicas average after every step; give one (lr_scheduler=cosine, "
                "Trainer(lr_scheduler=...)), or a number of steps"
            )
        self._highest = self.learning_rate

    @torch.no_grad()
    def _synchronise_if_due(self) -> None:
        self._highest = max(self._highest, self.learning_rate)
        if self._together_until == math.inf:
            # They find out together: on one whose loop left an update out the rate may fall later.
            fallen = float(self.learning_rate < self._highest)
            vote = torch.tensor([fallen], device=self._replica.device)
            self._average([vote])
            if vote.item() > 0:
                self._together_until = self.step
        elif self.step <= self._together_until or self.step % self.sync_every == 0:
            self._average([])

    def _average(self, others: list[Tensor]) -> None:
        (everything,) = self._fragments
        everything.reduce(self._group, [*everything.parameters, *others]).wait()
        everything.begin()

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizer and the period under way; every replica's is its own."""
        watched = {"highest": self._highest, "together_until": self._together_until}
        return {**super().state_dict(), **watched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on this rank; after ``attach``."""
        super().load_state_dict(state)
        self._highest, self._together_until = state["highest"], state["together_until"]
