"""A group whose sums are taken in the order of ranks, whatever moves the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaledtrain.comm.compress.group import Later
from scaledtrain.comm.protocols import Group, Handle, ReduceOp
from scaledtrain.comm.reduction import reduce_in_rank_order

__all__ = ["OrderedGroup"]


class OrderedGroup:
    """Gathers and adds up ((x0 + x1) + x2) + ..., where a backend adds in an order of its own.

    So a run over gloo or NCCL has the bits that it has in shared memory or simulated. Sent are the
    tensors whole, to every rank: n / 2 times what a ring sends; and each rank keeps all of them for
    a moment. Nothing goes on before ``wait``.

    Args:
        group: moves the bytes.

    Example:
        >>> from scaledtrain.comm.local import LocalGroup
        >>> x = torch.tensor([3.0])
        >>> OrderedGroup(LocalGroup()).all_reduce([x], "mean", weight=2.0).wait()  # 2 * 3 / 2
        >>> x
        tensor([3.])
    """

    overlaps = False

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank = group.rank
        self.size = group.size

    @property
    def bytes_sent(self) -> int:
        """Of the group below."""
        return self._group.bytes_sent

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        """Reduce when it is waited for; all ranks wait in the same order."""
        own = [t.detach() for t in tensors]
        factor = torch.tensor([weight], dtype=torch.float64, device=own[0].device)

        @torch.no_grad()
        def finish() -> None:
            by_rank = self._group.all_gather([*own, factor])
            weights = [float(of_rank[-1].item()) for of_rank in by_rank]
            values = [of_rank[:-1] for of_rank in by_rank]
            torch._foreach_copy_(own, reduce_in_rank_order(values, op, weights))

        return Later(finish)

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """As the group below."""
        self._group.broadcast(tensors, src)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """As the group below."""
        return self._group.all_gather(tensors)
