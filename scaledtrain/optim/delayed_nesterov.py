"""Nesterov's momentum for gradients that come one by one from many workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.errors import ConfigError

__all__ = ["DelayedNesterov"]


class DelayedNesterov(Optimizer):
    r"""Uses every gradient at once, and renews the momentum only with every N-th of them.

    With gradients g_0, g_1, ..., learning rate eps, momentum beta, N = ``delay`` and
    c = ``activation``, m_0 = 0:

    * at every N-th, m <- beta m + (mean of the last N gradients), and
      theta <- theta - eps (g / N + (1 - c N + c) beta m);
    * at every other one, theta <- theta - eps (g / N + c beta m).

    N gradients move theta by eps times their mean and eps beta m, however c shares the latter out
    among them: as one step of SGD with Nesterov momentum does with their mean, which N = 1 is.
    A momentum renewed with each single gradient would move theta N times as often in a direction
    that is N - 1 gradients old.

    Memory: two buffers of the parameters' size.

    Args:
        params: parameters, or (name, parameter) pairs, or groups.
        lr: eps, >= 0.
        momentum: beta, in [0, 1).
        delay: N, >= 1; the number of workers, if each gives a gradient in turn.
        activation: c, in [0, 1 / N]; 0, the paper's choice, moves by the momentum at every N-th
            gradient alone.

    Raises:
        ConfigError: an argument is outside its range.

    Example:
        >>> theta = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DelayedNesterov([theta], lr=1.0, momentum=0.5, delay=2)
        >>> for g in (0.25, 0.75):     # m = 0.5; theta = 1 - 0.25/2 - (0.75/2 + 0.5 * 0.5) = 0.25
        ...     theta.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> theta.item()
        0.25

    References:
        Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling, arXiv 2401.09135.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.7,
        momentum: float = 0.9,
        delay: int = 1,
        activation: float = 0.0,
    ) -> None:
        if not lr >= 0.0:
            raise ConfigError(f"DelayedNesterov: lr is {lr}; it is >= 0")
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"DelayedNesterov: momentum is {momentum}; it is in [0, 1)")
        if delay < 1:
            raise ConfigError(f"DelayedNesterov: delay is {delay}; it counts gradients, >= 1")
        if not 0.0 <= activation <= 1.0 / delay:
            raise ConfigError(
                f"DelayedNesterov: activation is {activation}; it is in [0, 1 / delay], here "
                f"[0, {1.0 / delay:g}], so that {delay} gradients use the momentum once in all"
            )
        defaults = {"lr": lr, "momentum": momentum, "delay": delay, "activation": activation}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Use the gradients in ``.grad``; a parameter without one is left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["sum"] = torch.zeros_like(parameter)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        lr, beta, n, c = (group[key] for key in ("lr", "momentum", "delay", "activation"))
        total, momentum = state["sum"], state["momentum_buffer"]
        state["step"] += 1
        total.add_(gradient)
        share = c
        if state["step"] % n == 0:
            momentum.mul_(beta).add_(total, alpha=1.0 / n)
            total.zero_()
            share = 1.0 - c * n + c
        if share:
            parameter.add_(momentum, alpha=-lr * share * beta)
        parameter.add_(gradient, alpha=-lr / n)
