"""Warmup and decay of learning rates, in steps, epochs or samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scaledtrain.errors import ConfigError

__all__ = ["Unit", "WarmupDecay", "units_per_update"]

Unit = Literal["steps", "epochs", "samples"]


def units_per_update(
    unit: Unit, updates_per_epoch: float | None = None, samples_per_update: float | None = None
) -> float:
    """How far one update of the parameters brings a run.

    Args:
        unit: of what: a step is an update.
        updates_per_epoch: for epochs.
        samples_per_update: for samples: of all replicas and accumulated batches.

    Raises:
        ConfigError: it is not known.
    """
    if unit not in ("steps", "epochs", "samples"):
        raise ConfigError(f"lr_scheduler.unit is {unit!r}; it is steps, epochs or samples")
    if unit == "steps":
        return 1.0
    of = {
        "epochs": ("updates_per_epoch", updates_per_epoch),
        "samples": ("samples_per_update", samples_per_update),
    }
    name, value = of[unit]
    if value is None or not value > 0:
        raise ConfigError(
            f"lr_scheduler.unit is {unit}, but {name} is {value}; it follows from data of known "
            "length, or give it (> 0)"
        )
    return 1.0 / value if unit == "epochs" else value


class WarmupDecay(LRScheduler):
    r"""A learning rate that rises linearly, then decays.

        lr = lr_0 f(x),   f = start_factor + (1 - start_factor) x / warmup     up to the warmup
                          f = the decay's, after it

    x is how far the run is, in steps, epochs or samples. It advances with updates of the
    parameters, wherever they are made: once for all accumulated batches, and once on every replica
    of a synchronous run, however many there are. On a parameter server it counts the server's
    updates: an epoch has passed when as many gradients have made updates as all workers together
    compute in one, and samples are those of gradients that made updates; rejected ones do not
    count.

    ``step`` is called once after each update, and not once an epoch.

    Args:
        optimizer: with lr_0.
        total: x at which the decay ends, in the unit; None: there is none (constant, milestones).
        unit: of all numbers here.
        warmup: how long it is.
        start_factor: lr_0 times this is the first learning rate. Goyal's gradual warmup begins
            with that of the reference batch: 1 / `LearningRateScaling.factor`.
        decay: ``"cosine"`` (half of one, down to ``end_factor``), ``"linear"`` (the same), or
            ``"milestones"`` (times ``gamma`` at each of them), ``"constant"``.
        end_factor: lr_0 times this is the last learning rate.
        milestones: x where the rate drops, in rising order.
        gamma: by which.
        updates_per_epoch: for the unit epochs.
        samples_per_update: for the unit samples.

    Raises:
        ConfigError: arguments that do not fit each other.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
        >>> schedule = WarmupDecay(sgd, 4.0, unit="epochs", warmup=1.0, start_factor=0.25,
        ...                        decay="linear", updates_per_epoch=2)
        >>> for _ in range(4):                 # epochs 0, 0.5, 1, 1.5
        ...     print(round(sgd.param_groups[0]["lr"], 6))
        ...     sgd.step()
        ...     schedule.step()
        0.2
        0.5
        0.8
        0.666667
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: float | None = None,
        *,
        unit: Unit = "steps",
        warmup: float = 0.0,
        start_factor: float = 0.0,
        decay: Literal["cosine", "linear", "milestones", "constant"] = "cosine",
        end_factor: float = 0.0,
        milestones: Sequence[float] = (),
        gamma: float = 0.1,
        updates_per_epoch: float | None = None,
        samples_per_update: float | None = None,
    ) -> None:
        if decay not in ("cosine", "linear", "milestones", "constant"):
            raise ConfigError(
                f"lr_scheduler.decay is {decay!r}; it is cosine, linear, milestones or constant"
            )
        self._rate = units_per_update(unit, updates_per_epoch, samples_per_update)
        if not warmup >= 0.0:
            raise ConfigError(f"lr_scheduler.warmup is {warmup}; it counts {unit}, >= 0")
        if decay in ("cosine", "linear") and (total is None or not total > warmup):
            raise ConfigError(
                f"lr_scheduler: decay {decay} ends after {total} {unit}, which is not after the "
                f"warmup's {warmup:g}; shorten the warmup, or give another total"
            )
        if (decay == "milestones") != bool(milestones) or list(milestones) != sorted(milestones):
            raise ConfigError(
                f"lr_scheduler.milestones are {list(milestones)} with decay {decay}; they are "
                "numbers in rising order with decay milestones, and none with others"
            )
        self._total, self._warmup, self._start = total, warmup, start_factor
        self._decay, self._end = decay, end_factor
        self._milestones, self._gamma = list(milestones), gamma
        self._since = (0, 0.0)  # update and progress from which the rate holds
        super().__init__(optimizer)

    @property
    def progress(self) -> float:
        """How far the run is, in the unit."""
        update, progress = self._since
        # As a quotient, so that the end of an epoch is a whole number.
        return progress + (self.last_epoch - update) / (1.0 / self._rate)

    def factor(self, progress: float) -> float:
        """What the learning rate is multiplied by there."""
        if progress < self._warmup:
            return self._start + (1.0 - self._start) * progress / self._warmup
        if self._decay == "milestones":
            # Of many small parts of an epoch the sum may be a little less than the whole.
            return float(self._gamma ** sum(progress + 1e-9 >= m for m in self._milestones))
        if self._decay == "constant" or self._total is None:
            return 1.0
        done = min((progress - self._warmup) / (self._total - self._warmup), 1.0)
        left = 1.0 - done if self._decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self._end + (1.0 - self._end) * left

    def get_lr(self) -> list[float | Any]:
        """Of the next update, by group."""
        factor = self.factor(self.progress)
        return [lr * factor for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Where it is; all else is what it is made with."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "progress": self.progress,
            "rate": self._rate,
            "since": self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there, also with updates of another number of samples."""
        self.last_epoch, self._step_count = state["last_epoch"], state["step_count"]
        same = state["rate"] == self._rate
        self._since = tuple(state["since"]) if same else (self.last_epoch, state["progress"])
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
