"""Staleness corrections: the learning rate, or the gradient itself, answers to how late it comes.

Each goes with every admission policy and every torch optimizer. Where nothing is stale (one worker,
`Synchronous`, `BackupWorkers`, `Rennala`) all of these leave training as it is, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError
from scaledtrain.server.correction import Arrival, Context, Corrected, Correction

__all__ = [
    "AdaptiveDelayCompensated",
    "DelayAdaptive",
    "DelayCompensated",
    "GapAware",
    "StalenessAware",
]


@dataclass(frozen=True)
class StalenessAware(Correction):
    r"""The learning rate of a gradient is divided by its staleness.

    eta(tau) = eta / max(1, tau), on the learning rate (see ``Corrected.scale``). Rescues runs whose
    learning rate is too large for their staleness; with one that is already small, it only slows
    down. Measured on digits with 8, 16 and 32 equal workers (benchmarks/README.md): it bears rates
    10 to 30 times larger than without, and at its best ends at 3.6, 5.9 and 12.1 % wrong (without:
    3.9, 7.4, 12.7 %); at a rate of 0.03 it ends at 27, 58 and 76 % (without: 6, 7, 16 %).

    Sent and lost in a crash: nothing more than without it.

    References:
        Zhang et al. 2016, Staleness-aware Async-SGD for Distributed Deep Learning (arXiv
        1511.05950).
    """

    def correct(self, arrival: Arrival, server: Context) -> Corrected:
        """Scale by 1 / staleness."""
        return Corrected(arrival.gradient, 1.0 / max(1, arrival.staleness))


@dataclass(frozen=True)
class DelayAdaptive(Correction):
    r"""The learning rate is reduced only for gradients later than the number of workers explains.

    eta(tau) = eta n / max(n, tau), n workers taking part, on the learning rate (see
    ``Corrected.scale``). Whatever the largest delay is, convergence then depends on n alone.
    Workers that are equally fast have a staleness of about n - 1, so for them it changes nothing.

    Sent and lost in a crash: nothing more than without it.

    References:
        Mishchenko et al. 2022, Asynchronous SGD Beats Minibatch SGD Under Arbitrary Delays
        (arXiv 2206.07638).
    """

    def correct(self, arrival: Arrival, server: Context) -> Corrected:
        """Scale by n / max(n, staleness)."""
        n = server.n_members
        return Corrected(arrival.gradient, n / max(n, arrival.staleness))


@dataclass(frozen=True)
class DelayCompensated(Correction):
    r"""DC-ASGD with a constant lambda: a first-order guess of the gradient at today's parameters.

    g <- g + lambda0 g * g * (w - w_sent), elementwise, where w are the server's parameters and
    w_sent those that this worker computed with; g * g stands for the diagonal of the Hessian. It is
    the gradient that changes; the optimizer then treats it like any other. lambda0 = 0 is no
    correction, bit for bit. Measured on digits with 8 to 32 workers (benchmarks/README.md), the
    default made no difference beyond the standard error, at any learning rate.

    Sent: nothing more. Memory: one copy of the parameters for each version that a worker computes
    with, at most one per worker and one more where it pulls ahead. A crash loses these copies: save
    ``state_dict``.

    Args:
        lambda0: strength, >= 0. The correction overshoots where lambda0 |g| |w - w_sent| exceeds 1.

    References:
        Zheng et al. 2017, Asynchronous Stochastic Gradient Descent with Delay Compensation (arXiv
        1609.08326), DC-ASGD-c.
    """

    needs_sent: ClassVar[bool] = True
    lambda0: float = 0.04

    def __post_init__(self) -> None:
        _check_strength("DelayCompensated", self.lambda0)

    def correct(self, arrival: Arrival, server: Context) -> Corrected:
        """Move the gradient along the distance that the parameters went meanwhile."""
        if self.lambda0 == 0.0 or arrival.staleness == 0:
            return Corrected(arrival.gradient)
        drift = _drift(arrival, server)
        torch._foreach_mul_(drift, list(arrival.gradient))
        torch._foreach_mul_(drift, list(arrival.gradient))
        return Corrected(torch._foreach_add(list(arrival.gradient), drift, alpha=self.lambda0))


@dataclass(frozen=True)
class AdaptiveDelayCompensated(Correction):
    r"""DC-ASGD with a lambda for each element, smaller where gradients are large.

    m <- decay m + (1 - decay) g * g, over the accepted gradients of all workers;
    g <- g + lambda0 / sqrt(m + 1e-7) * g * g * (w - w_sent), elementwise, as `DelayCompensated`.
    lambda0 = 0 is no correction, bit for bit. Diverges where eta lambda0 sqrt(n) is too large, n
    workers: there a smaller lambda0 helps as a smaller learning rate does. Measured on digits
    (benchmarks/README.md): it makes the next half decade of learning rates usable with 8 and 16
    workers, and changes little at rates that are small enough without it.

    Sent: nothing more. Memory: as `DelayCompensated`, and m. A crash loses both: save
    ``state_dict``.

    Args:
        lambda0: strength, >= 0.
        decay: of the mean square m, in [0, 1).

    References:
        Zheng et al. 2017, Asynchronous Stochastic Gradient Descent with Delay Compensation (arXiv
        1609.08326), DC-ASGD-a.
    """

    needs_sent: ClassVar[bool] = True
    lambda0: float = 2.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        _check_strength("AdaptiveDelayCompensated", self.lambda0)
        _check_decay("AdaptiveDelayCompensated", self.decay)

    def start(self, server: Context) -> None:
        """No gradient has come yet."""
        server.shared["mean_square"] = _zeros(server)

    def correct(self, arrival: Arrival, server: Context) -> Corrected:
        """Take the gradient into the mean square, then move it."""
        gradient, mean_square = list(arrival.gradient), server.shared["mean_square"]
        torch._foreach_mul_(mean_square, self.decay)
        torch._foreach_addcmul_(mean_square, gradient, gradient, 1.0 - self.decay)
        if self.lambda0 == 0.0 or arrival.staleness == 0:
            return Corrected(gradient)
        root = torch._foreach_add(mean_square, 1e-7)
        torch._foreach_sqrt_(root)
        drift = _drift(arrival, server)
        torch._foreach_mul_(drift, gradient)
        torch._foreach_mul_(drift, gradient)
        torch._foreach_div_(drift, root)
        return Corrected(torch._foreach_add(gradient, drift, alpha=self.lambda0))


@dataclass(frozen=True)
class GapAware(Correction):
    r"""Each element of a gradient is divided by how many typical steps it has missed.

    g <- g / (1 + |w - w_sent| / C) with the typical step C = eta_max (sqrt(mean(v * v)) + 1e-8),
    all elementwise. v is the step that the optimizer made divided by its learning rate, which is
    the momentum buffer of SGD and g without momentum; its mean is exponential and bias-corrected.
    eta_max is the largest learning rate so far: as it decays, parameters move less and gradients
    are divided by less. Weight decay that the optimizer adds to the gradient (SGD, Adam) is divided
    too; decoupled decay (AdamW) is not.

    It is the gradient that changes, since no two elements change alike; an optimizer that
    normalises gradients undoes the part that is common to all of them. Measured on digits with
    momentum 0.9 (benchmarks/README.md): it bears rates 10 to 30 times larger than without, and is
    very slow at small ones; its best is worse with 8 and 16 workers (6.4 and 14.2 % wrong, without
    4.4 and 8.9 %) and better with 32 (11.6, without 13.1 %).

    Sent: nothing more. Memory: as `DelayCompensated`, and the mean. A crash loses both: save
    ``state_dict``.

    Args:
        decay: of the mean of the squared steps, in [0, 1).

    References:
        Barkai et al. 2020, Gap-Aware Mitigation of Gradient Staleness (arXiv 1909.10802).
    """

    needs_sent: ClassVar[bool] = True
    decay: float = 0.999

    def __post_init__(self) -> None:
        _check_decay("GapAware", self.decay)

    def start(self, server: Context) -> None:
        """No step has been made yet."""
        server.shared["mean_square_step"] = _zeros(server)
        server.numbers["weight_of_mean"] = [0.0 for _ in server.parameters]
        server.numbers["peak_lr"] = server.option("lr")

    def correct(self, arrival: Arrival, server: Context) -> Corrected:
        """Divide by 1 + the distance in typical steps."""
        if arrival.staleness == 0:
            return Corrected(arrival.gradient)
        decays = server.option("weight_decay")
        decoupled = server.option("decoupled_weight_decay")
        gradient = []
        for i, gap in enumerate(_drift(arrival, server)):
            divisor = gap.abs_().div_(self._typical_step(server, i)).add_(1.0)
            divided = arrival.gradient[i] / divisor
            if decays[i] and not decoupled[i]:  # (g + d w) / divisor, less the d w to be added yet
                share = divisor.reciprocal_().sub_(1.0)
                divided.addcmul_(server.parameters[i], share, value=decays[i])
            gradient.append(divided)
        return Corrected(gradient)

    def before_update(self, server: Context) -> None:
        """Remember where the step begins, and its learning rate."""
        server.shared["before"] = [p.detach().clone() for p in server.parameters]
        server.numbers["lr"] = rates = server.option("lr")
        server.numbers["peak_lr"] = list(map(max, server.numbers["peak_lr"], rates))

    def after_update(self, server: Context) -> None:
        """Take the step into the mean."""
        before, means = server.shared.pop("before"), server.shared["mean_square_step"]
        weights = server.numbers["weight_of_mean"]
        for i, lr in enumerate(server.numbers.pop("lr")):
            if lr > 0:
                step = before[i].sub_(server.parameters[i]).div_(lr)
                means[i].mul_(self.decay).addcmul_(step, step, value=1.0 - self.decay)
                weights[i] = self.decay * weights[i] + 1.0 - self.decay

    def _typical_step(self, server: Context, i: int) -> Tensor:
        mean = server.shared["mean_square_step"][i] / (server.numbers["weight_of_mean"][i] or 1.0)
        typical = mean.sqrt_().add_(1e-8).mul_(server.numbers["peak_lr"][i])
        return typical.add_(torch.finfo(typical.dtype).tiny)  # while every learning rate was 0


def _drift(arrival: Arrival, server: Context) -> list[Tensor]:
    """How far the parameters have moved since the worker was sent its own."""
    now = [p.data for p in server.parameters]
    return list(torch._foreach_sub(now, list(arrival.sent)))


def _zeros(server: Context) -> list[Tensor]:
    return [torch.zeros_like(p, requires_grad=False) for p in server.parameters]


def _check_strength(correction: str, lambda0: float) -> None:
    if not lambda0 >= 0.0:
        raise ConfigError(f"{correction}: lambda0 is {lambda0}; it is a strength, at least 0")


def _check_decay(correction: str, decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ConfigError(f"{correction}: decay is {decay}; it is in [0, 1)")
