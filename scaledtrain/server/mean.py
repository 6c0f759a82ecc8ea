"""The mean of gradients that come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightedMean"]


class WeightedMean:
    """sum_i s_i g_i / sum_i s_i, gathered where an optimizer looks for it: in ``parameter.grad``.

    Args:
        parameters: whose gradients come.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._count = 0
        self._weight = 0.0
        self._borrowed = False

    def add(self, gradient: Sequence[Tensor], weight: float, last: bool) -> None:
        """Take one more gradient; a lone one, first and ``last``, is used where it lies."""
        self._borrowed = last and self._count == 0
        if self._count > 0:
            torch._foreach_add_(self._sum(), list(gradient), alpha=weight)
        else:
            for parameter, g in zip(self._parameters, gradient, strict=True):
                parameter.grad = g if self._borrowed else g * weight
        self._count += 1
        self._weight += weight

    def finish(self) -> float:
        """Turn the sum into the mean; returns the mean of the weights."""
        if not self._borrowed:
            torch._foreach_div_(self._sum(), self._weight)
        return self._weight / self._count

    def clear(self) -> None:
        """Begin anew."""
        for parameter in self._parameters:
            parameter.grad = None
        self._count, self._weight = 0, 0.0

    def _sum(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sum so far."""
        return {
            "sum": [g.clone() for g in self._sum()],
            "count": self._count,
            "weight": self._weight,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.clear()
        self._borrowed = False
        self._count, self._weight = state["count"], state["weight"]
        if self._count > 0:
            for parameter, g in zip(self._parameters, state["sum"], strict=True):
                parameter.grad = g.to(parameter, copy=True)
