"""DiLoCo: local training inside, an optimizer over the replicas' progress outside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.replica import MakeOptimizer, Replica
from scaledtrain.strategies.outer import OuterUpdate, split_by_bytes
from scaledtrain.strategies.periodic import Fragment, Periodic

__all__ = ["DiLoCo"]

_NESTEROV = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class DiLoCo(Periodic):
    r"""Each replica trains alone for ``sync_every`` steps; their mean progress is a gradient.

    With theta the outer parameters, the same on every replica, and theta_i those of replica i after
    its H local steps from there::

        delta = theta - mean_i theta_i        # weighted by the samples of the period
        theta <- OuterOptimizer(theta, delta)
        theta_i <- theta

    An unfinished period ends with the mean, without an outer step. The inner optimizers keep their
    own states. With plain SGD of learning rate 1 outside this is local SGD, up to rounding.

    *Streaming DiLoCo*: the model is cut into ``fragments`` (whole tensors, in model order, about
    the same bytes) that synchronise in turn, evenly spread over the period: the same bytes in all,
    a fraction of them at a time. *Overlap*: a fragment's reduction begins after step t and is used
    ``overlap_steps`` later, when the replica has gone on meanwhile, so it keeps a share of its
    own::

        theta_i <- mixing theta_i + (1 - mixing) theta

    (Between CPUs of one host, over shared memory, the bytes are copied when they are needed.)

    Sent: one all-reduce of every fragment's delta per H steps. Waits: for the slowest replica, when
    a reduction is used; with overlap only as far as it lags behind more than those steps. Memory: a
    copy of the parameters, the outer optimizer's state (with momentum another copy), and what is
    under way. A crash of any replica ends the run for all, and loses what was not saved;
    ``state_dict`` waits for reductions under way and saves their results.

    Args:
        sync_every: H, steps from one synchronisation of a fragment to its next. Fragment p of P is
            due after the steps floor(H (p + 1) / P) + n H.
        outer_optimizer: a factory, as the replica's; default SGD of learning rate 0.7 with Nesterov
            momentum 0.9. Each fragment has one.
        fragments: P; 1 is DiLoCo as it was first published.
        overlap_steps: steps between the begin of a reduction and its use, < H.
        mixing: the share that stays local, in [0, 1]; 0 takes the outer parameters and forgets the
            steps made meanwhile. Without overlap there are none, and it is not used.

    Raises:
        ConfigError: a number out of its range; (in ``attach``) more fragments than tensors.

    Example:
        >>> import scaledtrain
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> diloco = DiLoCo(sync_every=2, outer_optimizer=partial(torch.optim.SGD, lr=0.5))
        >>> with scaledtrain.connect() as link:
        ...     diloco.attach(scaledtrain.Replica(model, partial(torch.optim.SGD, lr=1.0)), link)
        ...     for _ in range(2):  # a gradient of 1: two steps to -2, of which half counts
        ...         diloco.reduce_gradients()
        ...         model.weight.grad = torch.ones(1, 1)
        ...         diloco.apply_gradients()
        ...         diloco.after_step()
        >>> model.weight.item()
        -1.0

    References:
        Douillard et al. 2023, DiLoCo: Distributed Low-Communication Training of Language Models,
        arXiv 2311.08105; Douillard et al. 2025, Streaming DiLoCo with Overlapping Communication,
        arXiv 2501.18512.
    """

    def __init__(
        self,
        sync_every: int,
        outer_optimizer: MakeOptimizer | None = None,
        fragments: int = 1,
        overlap_steps: int = 0,
        mixing: float = 0.5,
    ) -> None:
        super().__init__(sync_every)
        if fragments < 1:
            raise ConfigError(f"fragments is {fragments}; it is >= 1 (1: the whole model at once)")
        if not 0 <= overlap_steps < sync_every:
            raise ConfigError(
                f"overlap_steps is {overlap_steps} with sync_every {sync_every}; a reduction must "
                "be used before the next of its fragment begins: 0 <= overlap_steps < sync_every"
            )
        if not 0.0 <= mixing <= 1.0:
            raise ConfigError(f"mixing is {mixing}; it is the share that stays local, in [0, 1]")
        self.overlap_steps = overlap_steps
        self.mixing = mixing if overlap_steps else 0.0
        self._n_fragments = fragments
        self._make_outer = outer_optimizer or _NESTEROV

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's parameters; the first period begins. Collective; once."""
        super().attach(replica, link)
        names = iter(replica.names)
        self._outer = [
            OuterUpdate(fragment, list(islice(names, len(fragment.parameters))), self._make_outer)
            for fragment in self._fragments
        ]

    def _divide(self, parameters: Sequence[nn.Parameter]) -> list[Fragment]:
        pieces = split_by_bytes(parameters, self._n_fragments)
        return [Fragment(piece, anchored=True) for piece in pieces]

    def _synchronise_if_due(self) -> None:
        for number, outer in enumerate(self._outer, start=1):
            offset = self.sync_every * number // self._n_fragments
            since = (self.step - offset) % self.sync_every
            if since == 0:
                outer.begin(self._group)
            if since == self.overlap_steps:
                outer.finish(self.mixing)

    def settle(self) -> None:
        """End unfinished periods with the mean: it holds what reductions under way would bring."""
        for outer in self._outer:
            outer.drop()
        super().settle()

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizers and the periods under way; every replica's is its own."""
        return {**super().state_dict(), "outer": [outer.state_dict() for outer in self._outer]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on this rank; after ``attach``."""
        super().load_state_dict(state)
        for outer, saved in zip(self._outer, state["outer"], strict=True):
            outer.load_state_dict(saved)
