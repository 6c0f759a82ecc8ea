"""Smaller learning rates for stale stages of an asynchronous pipeline, as training begins."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scaledtrain.errors import ConfigError
from scaledtrain.replica import MakeScheduler

__all__ = ["PipeMare", "pipemare"]


def pipemare(
    staleness: int, anneal_steps: int, make_scheduler: MakeScheduler | None = None
) -> MakeScheduler:
    """PipeMare's learning-rate correction, around a schedule if there is one.

    Args:
        staleness: tau of this rank's stage, `PipeDreamSchedule.delay`.
        anneal_steps: updates until nothing is corrected any more.
        make_scheduler: makes the schedule that is corrected; None: a constant learning rate.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
        >>> scheduler = pipemare(staleness=4, anneal_steps=2)(optimizer)
        >>> for _ in range(3):  # 0.8 / 4, 0.8 / 4^(1/2), 0.8
        ...     print(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        0.2
        0.4
        0.8
    """

    def make(optimizer: Optimizer) -> LRScheduler:
        inner = None if make_scheduler is None else make_scheduler(optimizer)
        return PipeMare(optimizer, staleness, anneal_steps, inner)

    return make


class PipeMare(LRScheduler):
    r"""Divides the learning rate by a power of the staleness that goes from 1 to 0.

        lr_k = lr(k) / tau^(1 - min(k / K, 1))

    k updates have been made, K is ``anneal_steps``; a stage without staleness is not corrected.

    Args:
        optimizer: whose learning rates are set.
        staleness: tau.
        anneal_steps: K.
        inner: gives lr(k); None: what the optimizer has now.

    Raises:
        ConfigError: a negative staleness, or K < 1.

    References:
        Yang et al. 2021, PipeMare: Asynchronous Pipeline Parallel DNN Training, arXiv 1910.05124
        (technique 1).
    """

    def __init__(
        self, optimizer: Optimizer, staleness: int, anneal_steps: int, inner: LRScheduler | None
    ) -> None:
        if staleness < 0 or anneal_steps < 1:
            raise ConfigError(
                f"PipeMare with staleness {staleness} and anneal_steps {anneal_steps}; they are "
                ">= 0 and >= 1"
            )
        self._tau = max(staleness, 1)
        self._anneal_steps = anneal_steps
        self._inner = inner
        self._uncorrected = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """An update has been made (or, at first, nothing)."""
        begun = self.last_epoch >= 0
        if begun and self._inner is not None:
            for group, lr in zip(self.optimizer.param_groups, self._uncorrected, strict=True):
                group["lr"] = lr
            self._inner.step()
            self._uncorrected = [float(group["lr"]) for group in self.optimizer.param_groups]
        super().step()

    def get_lr(self) -> list[float | Any]:
        """Of the next update."""
        power = 1.0 - min(self.last_epoch / self._anneal_steps, 1.0)
        return [lr / self._tau**power for lr in self._uncorrected]

    def state_dict(self) -> dict[str, Any]:
        """Of this and of the schedule inside."""
        own = {k: self.__dict__[k] for k in ("last_epoch", "_step_count", "_uncorrected")}
        return {**own, "inner": None if self._inner is None else self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        state = dict(state)
        inner = state.pop("inner")
        self.__dict__.update(state)
        if self._inner is not None:
            self._inner.load_state_dict(inner)
