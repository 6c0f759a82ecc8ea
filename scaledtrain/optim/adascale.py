"""AdaScale: learning rates and schedules that follow how much a larger batch helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

from scaledtrain.errors import ConfigError
from scaledtrain.optim.noise_scale import GradientNoise

__all__ = ["AdaScale", "adascale_gain"]

_STEP_BY_STEP = (
    schedules.ChainedScheduler,
    schedules.CosineAnnealingWarmRestarts,
    schedules.MultiplicativeLR,
    schedules.ReduceLROnPlateau,
    schedules.SequentialLR,
)
_KEPT = ("last_epoch", "_step_count", "progress", "_squared_norm", "_variance", "_weight", "_batch")


def adascale_gain(squared_norm: float, variance: float, scale: float) -> float:
    r"""How many steps with the reference batch one with a batch ``scale`` times as large is worth.

    With the true gradient's squared norm mu^2 and the variance sigma^2 of a reference batch's
    gradient, all components together::

        gain = (sigma^2 + mu^2) / (sigma^2 / scale + mu^2),   in [1, scale]

    Args:
        squared_norm: mu^2; a negative estimate counts as 0.
        variance: sigma^2: of one sample (S of the gradient noise scale) over the reference batch.
        scale: batch over reference batch.

    Example:
        >>> adascale_gain(squared_norm=1.0, variance=0.0, scale=8)   # no noise: as good as one step
        1.0
        >>> adascale_gain(squared_norm=0.0, variance=1.0, scale=8)   # only noise: as good as eight
        8.0
        >>> adascale_gain(squared_norm=1.0, variance=1.0, scale=4)   # 2 / 1.25
        1.6

    References:
        Johnson et al. 2020, AdaScale SGD, arXiv 2007.05105.
    """
    if not (scale > 0.0 and variance >= 0.0 and math.isfinite(squared_norm + variance)):
        raise ConfigError(
            f"AdaScale's gain from a squared norm of {squared_norm}, a variance of {variance} and "
            f"a scale of {scale}; they are finite, and the latter >= 0 and > 0"
        )
    signal = max(squared_norm, 0.0)
    if signal + variance == 0.0:
        return 1.0
    return (variance + signal) / (variance / scale + signal)


class Leader(Protocol):
    """Who measures the noise: `scaledtrain.NoiseScale`."""

    def lead(self, follower: Any) -> None:
        """Call the follower's ``observe`` with each measurement, before the update."""


class AdaScale(LRScheduler):
    r"""A schedule made for a reference batch, run with a larger one.

    Before each update it is told how noisy gradients are (`observe`), and::

        lr = gain lr(x),   x <- x + gain

    where lr(x) is the schedule's learning rate after x updates with the reference batch, so that a
    run needs the fewer updates the more noise there is, and never overshoots where there is none.
    Warmup is not needed: gains are small as training begins. It is for SGD; Adam divides by the
    gradient's size itself. A batch that changes changes the gain.

    S and |G|^2 are moving averages, each by itself, over about 1 / (1 - smoothing) measurements;
    the paper's are over 1000 / scale, scale = batch / reference_batch. Before the first `observe`
    the gain is 1.

    Args:
        optimizer: with the learning rate of the reference batch.
        reference_batch: samples, >= 1.
        make_scheduler: makes the schedule; None: the rate is constant. One whose rate follows from
            its ``last_epoch``, as `WarmupDecay` and most of torch's do.
        smoothing: in [0, 1); None: max(0, 1 - scale / 1000), the paper's.
        total: x at which the run is over; None: it does not say.
        leader: calls `observe`, a `scaledtrain.NoiseScale` that is a callback of the same Trainer,
            best with ``every=1``; None: your own loop does.

    Raises:
        ConfigError: an argument is outside its range, or the schedule goes on from the rate before.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> halves = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda x: 0.5 ** (x // 3))
        >>> schedule = AdaScale(sgd, reference_batch=16, make_scheduler=halves)
        >>> for _ in range(3):           # S > 0, |G|^2 = 0: gain 32 / 16 = 2, x = 0, 2, 4
        ...     schedule.observe(GradientNoise(squared_norm=0.0, variance=1.0), batch=32)
        ...     print(sgd.param_groups[0]["lr"])
        ...     sgd.step()
        ...     schedule.step()
        0.2
        0.2
        0.1

    References:
        Johnson et al. 2020, AdaScale SGD, arXiv 2007.05105.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        reference_batch: float,
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        smoothing: float | None = None,
        *,
        total: float | None = None,
        leader: Leader | None = None,
    ) -> None:
        if not (reference_batch >= 1.0 and math.isfinite(reference_batch)):
            raise ConfigError(
                f"AdaScale: reference_batch is {reference_batch}; it counts samples, >= 1"
            )
        if smoothing is not None and not 0.0 <= smoothing < 1.0:
            raise ConfigError(f"AdaScale: smoothing is {smoothing}; it is in [0, 1)")
        if total is not None and not total > 0.0:
            raise ConfigError(f"AdaScale: total is {total}; it counts updates, > 0")
        self._reference_batch = reference_batch
        self._smoothing = smoothing
        self._total = total
        self._inner = None if make_scheduler is None else make_scheduler(optimizer)
        if isinstance(self._inner, _STEP_BY_STEP):
            raise ConfigError(
                f"AdaScale: {type(self._inner).__name__} makes each rate from the one before, so "
                "that updates cannot be skipped; take scaledtrain.optim.WarmupDecay, or LambdaLR"
            )
        if self._inner is not None:  # it never steps again, but is asked; torch would warn of that
            self._inner._get_lr_called_within_step = True
        self._squared_norm = self._variance = self._weight = 0.0
        self._batch = reference_batch
        self.progress = 0.0
        """Updates with the reference batch that the run is worth so far: x."""
        self._constant = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer)
        if leader is not None:
            leader.lead(self)

    @property
    def gain(self) -> float:
        """Of the next update."""
        if not self._weight:
            return 1.0
        variance = self._variance / self._weight / self._reference_batch
        scale = self._batch / self._reference_batch
        return adascale_gain(self._squared_norm / self._weight, variance, scale)

    @property
    def is_over(self) -> bool:
        """Whether the run is worth ``total`` updates."""
        return self._total is not None and self.progress >= self._total

    def metrics(self) -> dict[str, float]:
        """Gain and progress."""
        return {"adascale_gain": self.gain, "adascale_progress": self.progress}

    def observe(self, noise: GradientNoise, batch: float) -> None:
        """Take in what this step's gradients show, before the update; it sets the learning rate.

        Args:
            noise: an estimate from them alone; where it is undefined, the gain stays.
            batch: samples in the step.
        """
        if math.isfinite(noise.squared_norm + noise.variance):
            scale = batch / self._reference_batch
            d = max(0.0, 1.0 - scale / 1000.0) if self._smoothing is None else self._smoothing
            self._squared_norm = d * self._squared_norm + (1.0 - d) * noise.squared_norm
            self._variance = d * self._variance + (1.0 - d) * noise.variance
            self._weight = d * self._weight + (1.0 - d)
            self._batch = batch
        self._set(self.get_lr())

    def step(self, epoch: int | None = None) -> None:
        """An update has been made (or, at first, nothing)."""
        if self.last_epoch >= 0:
            self.progress += self.gain
        super().step()

    def get_lr(self) -> list[float | Any]:
        """Of the next update, by group."""
        return [self.gain * lr for lr in self._unscaled()]

    def _unscaled(self) -> list[float | Any]:
        if self._inner is None:
            return list(self._constant)
        self._inner.last_epoch = int(self.progress)
        # What torch's schedules have beside a formula that starts from the rate before.
        rates = getattr(self._inner, "_get_closed_form_lr", self._inner.get_lr)
        return list(rates())

    def _set(self, rates: list[float | Any]) -> None:
        self._last_lr = rates
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Progress and averages."""
        return {name: self.__dict__[name] for name in _KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.__dict__.update(state)
        self._set(self.get_lr())
