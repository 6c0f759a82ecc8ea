"""Shares of parameters that flow one way, and a weight that tells how much has arrived."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PushSumPeer", "exponential_neighbour"]


class PushSumPeer:
    r"""One rank's share (x, w) of what all ranks have; its parameters are z = x / w.

    A share begins as (parameters, 1). A rank that sends gives away half of its share, a rank that
    receives adds what comes: whatever the order, the sums of x and of w over all ranks, and over
    the messages on their way, stay the same (w, halves of 1, exactly; x up to rounding). So if
    nothing is added every z tends to sum x / sum w, the mean of the beginning, though no rank knows
    how often the others send and none waits for an answer.

    A rank whose weight has fallen below 1/2 should keep what it has until something arrives: else
    one that is slow, or evaluates, would gather all that the others have.

    Args:
        parameters: initial values; copied.
        device: where w is; None: where the parameters are.

    Attributes:
        share: x, one tensor for each parameter, and behind them w (float64, of one element).

    Example:
        >>> i, j = PushSumPeer([torch.tensor([0.0])]), PushSumPeer([torch.tensor([3.0])])
        >>> message = i.message()
        >>> i.give(message)            # i keeps (0, 1/2)
        >>> j.receive(0, message)      # j has (3, 3/2)
        []
        >>> z = [torch.empty(1)]
        >>> j.read(z)
        >>> z[0].item(), j.weight
        (2.0, 1.5)
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device | None = None) -> None:
        self.share = [p.detach().clone() for p in parameters]
        device = device or parameters[0].device
        self.share.append(torch.ones(1, dtype=torch.float64, device=device))

    @property
    def weight(self) -> float:
        """How many replicas' worth the share is: w."""
        return float(self.share[-1].item())

    @property
    def may_give(self) -> bool:
        """Whether the weight is at least 1/2."""
        return self.weight >= 0.5

    def message(self) -> list[Tensor]:
        """Room for what is given away."""
        return [torch.zeros_like(t) for t in self.share]

    def receive(self, sender: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add a share; there is no answer."""
        torch._foreach_add_(self.share, list(tensors))
        return []

    def give(self, message: Sequence[Tensor]) -> None:
        """Move half of the share into a message."""
        torch._foreach_mul_(self.share, 0.5)
        torch._foreach_copy_(list(message), self.share)

    @torch.no_grad()
    def read(self, into: Sequence[Tensor]) -> None:
        """Copy z = x / w out."""
        z: list[Tensor] = list(into)
        torch._foreach_copy_(z, self.share[:-1])
        if self.weight != 1.0:
            torch._foreach_div_(z, self.weight)

    @torch.no_grad()
    def write(self, parameters: Sequence[Tensor]) -> None:
        """Let z be these: x = w z."""
        torch._foreach_copy_(self.share[:-1], list(parameters))
        if self.weight != 1.0:
            torch._foreach_mul_(self.share[:-1], self.weight)

    def restart(self) -> None:
        """Begin anew with the present z and weight 1, when shares were lost with a rank."""
        torch._foreach_div_(self.share, self.weight)


def exponential_neighbour(rank: int, present: Sequence[int], turn: int) -> int | None:
    """To whom a rank sends in its turn: on a ring, by turns 1, 2, 4, 8 ... places on.

    After log2 n turns in step, what each rank of n began with has reached all.

    Args:
        rank: who sends; one of ``present``.
        present: the ranks that take part, in order; the ring.
        turn: counts on from 0.

    Returns:
        Another rank; None if there is none.

    Example:
        >>> [exponential_neighbour(6, range(8), turn) for turn in range(4)]
        [7, 0, 2, 7]
    """
    distances = (len(present) - 1).bit_length()
    if distances == 0:
        return None
    place = present.index(rank) + (1 << turn % distances)
    return present[place % len(present)]
