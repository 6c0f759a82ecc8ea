"""Synchronous SGD."""

from __future__ import annotations

import torch

from scaledtrain.strategies.strategy import Strategy

__all__ = ["Sync"]


class Sync(Strategy):
    r"""Every step uses the mean gradient of all replicas: data-parallel training as it is known.

    g = sum_i w_i g_i / sum_i w_i over the replicas i, w_i their numbers of samples, so the update
    is that of one process on the whole batch. Each replica keeps its own optimizer; as all start
    equal and see equal gradients, they stay equal.

    Sent: one all-reduce of the gradients per step. Waits: for the slowest replica, in every step.
    A crash of any replica ends the run for all; nothing is lost but the step.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> import scaledtrain
        >>> model, sync = torch.nn.Linear(2, 1), Sync()
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     sync.attach(replica, link)
        ...     model(torch.ones(4, 2)).mean().backward()
        ...     sync.reduce_gradients()
        ...     sync.apply_gradients()
        ...     sync.after_step()
        >>> sync.step
        1

    References:
        Goyal et al. 2017, Accurate, Large Minibatch SGD, arXiv 1706.02677.
    """

    def __init__(self) -> None:
        super().__init__()
        self._some_missing = True  # until a step shows that no parameter is without a gradient

    @property
    def gradients_per_step(self) -> int:
        """One of every replica."""
        return self._group.size

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Replace the gradients by their mean over the replicas.

        A parameter without a gradient on some replicas counts as zero there; one without a
        gradient on all of them has none, as in a single process. Whether there are such is found
        out in the first step: a parameter that is left out only later counts as zero.
        """
        if self._group.size == 1:
            return
        if self._some_missing:
            missing = self._missing_everywhere()
            self._some_missing = bool(missing)
        gradients = self._replica.gradients()
        self._group.all_reduce(gradients, "mean", weight).wait()
        if self._some_missing:
            for index in missing:
                self._replica.parameters[index].grad = None

    def _missing_everywhere(self) -> list[int]:
        present = [int(p.grad is not None) for p in self._replica.parameters]
        flags = torch.tensor(present, device=self._replica.device)
        self._group.all_reduce([flags], "max").wait()
        return [index for index, flag in enumerate(flags.tolist()) if not flag]
