"""Faults on purpose: what a test of a distributed run needs to see it fail."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from scaledtrain.callbacks import Callback
from scaledtrain.errors import ConfigError
from scaledtrain.trainer import Trainer

__all__ = ["FaultInjector"]


class FaultInjector(Callback):
    """Makes a rank fail at a step, in one of four ways; give it to every rank's ``callbacks``.

    Steps are the rank's own, counted from 1 over all fits with this object. NaN come while the
    step's gradients are computed, before anything is sent. The other faults happen when they are
    computed, before they are used; several at one step in the order in which they were asked for.
    Each happens once.

    Raises:
        ConfigError: a step below 1, a rank below 0, or (when the fit starts) one that is not in the
            job: such a fault would never happen, and the test that waits for it proves nothing.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> faults = FaultInjector().stall_at(0, 2, seconds=0.01).nan_at(0, 3)
        >>> trainer = Trainer(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss,
        ...                   partial(torch.optim.SGD, lr=0.1), callbacks=[faults], console=False)
        >>> result = trainer.fit([(torch.ones(4, 2), torch.ones(4, 1))], max_steps=3)
        >>> trainer.model.weight.tolist()
        [[nan, nan]]
    """

    def __init__(self) -> None:
        self._faults: dict[tuple[int, int], list[Callable[[Trainer], None]]] = defaultdict(list)
        self._nan: set[tuple[int, int]] = set()
        self._hooks: list[RemovableHandle] = []
        self._rank = 0
        self._step = 0

    def fail_at(self, rank: int, step: int) -> FaultInjector:
        """The process is killed, as by ``kill -9``: no ``finally`` runs, nobody is told."""
        return self._at(rank, step, lambda _: os.kill(os.getpid(), signal.SIGKILL))

    def raise_at(self, rank: int, step: int, error: Exception | None = None) -> FaultInjector:
        """The training loop raises ``error``; default a RuntimeError that names rank and step."""
        raised = error or RuntimeError(f"fault injected on rank {rank} at its step {step}")

        def fail(trainer: Trainer) -> None:
            raise raised

        return self._at(rank, step, fail)

    def nan_at(self, rank: int, step: int) -> FaultInjector:
        """The gradients become NaN, those that are sent during the backward pass included."""
        self._check(rank, step)
        self._nan.add((rank, step))
        return self

    def stall_at(self, rank: int, step: int, seconds: float) -> FaultInjector:
        """The rank does nothing for a while, as one that swaps, or whose network hangs."""
        if not seconds > 0:
            raise ConfigError(f"a stall of {seconds} s is none; seconds is > 0")
        return self._at(rank, step, lambda _: time.sleep(seconds))

    def _at(self, rank: int, step: int, fault: Callable[[Trainer], None]) -> FaultInjector:
        self._check(rank, step)
        self._faults[rank, step].append(fault)
        return self

    def _check(self, rank: int, step: int) -> None:
        if rank < 0 or step < 1:
            raise ConfigError(
                f"a fault on rank {rank} at step {step} would never happen; ranks count from 0, "
                "steps from 1"
            )

    def on_fit_start(self, trainer: Trainer) -> None:
        """Look whether there are such ranks, and be ready to spoil gradients."""
        size = trainer.link.group.size
        for rank, step in [*self._faults, *self._nan]:
            if rank >= size:
                raise ConfigError(
                    f"a fault on rank {rank} at step {step} would never happen: the job has "
                    f"{size} rank{'s' if size > 1 else ''}, from 0 to {size - 1}"
                )
        self._rank = trainer.link.group.rank
        self.on_fit_end(trainer)  # the last one may have ended in an error
        if any(rank == self._rank for rank, _ in self._nan):
            self._hooks = [
                p.register_hook(self._spoil)  # type: ignore[no-untyped-call]
                for p in trainer.replica.parameters
            ]

    def on_fit_end(self, trainer: Trainer) -> None:
        """Leave the parameters alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _spoil(self, gradient: Tensor) -> Tensor | None:
        """What is added to a parameter's gradient in the step under way; None: it as it is."""
        under_way = (self._rank, self._step + 1)
        return torch.full_like(gradient, math.nan) if under_way in self._nan else None

    def on_gradients(self, trainer: Trainer) -> None:
        """Count the step, and do what is due."""
        self._step += 1
        for fault in self._faults.get((self._rank, self._step), []):
            fault(trainer)
