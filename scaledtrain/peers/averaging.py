"""Parameters that two ranks average between them, whatever other ranks do meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["AveragingPeer", "averaging_neighbours"]


class AveragingPeer:
    r"""One rank's parameters x, which meet another rank's half way.

    A rank i sends s = x_i. Rank j computes d = (s - x_j) / 2, x_j <- x_j + d, and answers d; then
    x_i <- x_i - d. If nothing else happens meanwhile, both have the mean. If x_i has changed
    meanwhile (by a gradient, or by others that called i), it keeps that change: whatever
    interleaves, sum_i x_i plus what is on its way stays the same, up to rounding.

    Args:
        parameters: initial values; copied.

    Attributes:
        parameters: x, for an optimizer.
        tensors: the same memory, for everybody else.

    Example:
        >>> i, j = AveragingPeer([torch.tensor([0.0])]), AveragingPeer([torch.tensor([4.0])])
        >>> answer = j.receive(0, i.tensors)
        >>> i.finish(answer)
        >>> i.tensors[0].item(), j.tensors[0].item()
        (2.0, 2.0)
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
        self.tensors: list[Tensor] = [p.detach() for p in self.parameters]
        self._half: list[Tensor] = []  # made for the first that calls

    def receive(self, sender: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Go half the way to the sender's parameters; answers how far that was."""
        if not self._half:
            self._half = [torch.empty_like(t) for t in self.tensors]
        torch._foreach_copy_(self._half, list(tensors))
        torch._foreach_sub_(self._half, self.tensors)
        torch._foreach_mul_(self._half, 0.5)
        torch._foreach_add_(self.tensors, self._half)
        return self._half

    def finish(self, answer: Sequence[Tensor]) -> None:
        """Go the other half, as far as the other rank's answer says."""
        torch._foreach_sub_(self.tensors, list(answer))

    @torch.no_grad()
    def read(self, into: Sequence[Tensor]) -> None:
        """Copy x out."""
        torch._foreach_copy_(list(into), self.tensors)

    def write(self, parameters: Sequence[Tensor]) -> None:
        """Let x be these."""
        torch._foreach_copy_(self.tensors, list(parameters))


def averaging_neighbours(rank: int, present: Sequence[int]) -> list[int]:
    """Whom a rank calls: of those present every other one, the first included, calls the rest.

    Were two ranks to call each other at the same time, each would go half way to where the other
    was, and half a way more by the answer: they would only swap their parameters. Between a half
    that calls and a half that is called that cannot be.

    Args:
        rank: one of ``present``.
        present: the ranks that take part, in order.

    Returns:
        Ranks, empty for one that is called.

    Example:
        >>> averaging_neighbours(0, [0, 1, 2, 3]), averaging_neighbours(1, [0, 1, 2, 3])
        ([1, 3], [])
    """
    return list(present[1::2]) if present.index(rank) % 2 == 0 else []
