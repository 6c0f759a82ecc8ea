"""Faults on purpose: what a test of a distributed run needs to see it fail."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable

from scaledtrain.callbacks import Callback
from scaledtrain.errors import ConfigError
from scaledtrain.trainer import Trainer

__all__ = ["FaultInjector"]


class FaultInjector(Callback):
    """Makes a rank fail at a step, in one of four ways; give it to every rank's ``callbacks``.

    Steps are the rank's own, counted from 1 over all fits with this object. A fault happens when
    the step's gradients are computed, before they are used or sent; several at one step happen in
    the order in which they were asked for, and each happens once.

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
        """The gradients become NaN."""

        def spoil(trainer: Trainer) -> None:
            for gradient in trainer.replica.gradients():
                gradient.fill_(float("nan"))

        return self._at(rank, step, spoil)

    def stall_at(self, rank: int, step: int, seconds: float) -> FaultInjector:
        """The rank does nothing for a while, as one that swaps, or whose network hangs."""
        if not seconds > 0:
            raise ConfigError(f"a stall of {seconds} s is none; seconds is > 0")
        return self._at(rank, step, lambda _: time.sleep(seconds))

    def _at(self, rank: int, step: int, fault: Callable[[Trainer], None]) -> FaultInjector:
        if rank < 0 or step < 1:
            raise ConfigError(
                f"a fault on rank {rank} at step {step} would never happen; ranks count from 0, "
                "steps from 1"
            )
        self._faults[rank, step].append(fault)
        return self

    def on_fit_start(self, trainer: Trainer) -> None:
        """Look whether there are such ranks."""
        size = trainer.link.group.size
        for rank, step in self._faults:
            if rank >= size:
                raise ConfigError(
                    f"a fault on rank {rank} at step {step} would never happen: the job has "
                    f"{size} rank{'s' if size > 1 else ''}, from 0 to {size - 1}"
                )

    def on_gradients(self, trainer: Trainer) -> None:
        """Count the step, and do what is due."""
        self._step += 1
        for fault in self._faults.get((trainer.link.group.rank, self._step), []):
            fault(trainer)
