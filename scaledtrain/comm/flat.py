"""Many tensors laid out one behind the other in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FlatBuffer", "aligned", "bytes_of", "flat_bytes"]

_PIECE_ELEMENTS = 128 * 1024
_ALIGNMENT = 64  # bytes: a cache line, and enough for every vector load


def aligned(n_bytes: int, to: int = _ALIGNMENT) -> int:
    """The next multiple of ``to`` bytes, a cache line if not given."""
    return -(-n_bytes // to) * to


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' values, without what lies between them.

    Args:
        tensors: of any shapes and dtypes.

    Example:
        >>> bytes_of([torch.zeros(3), torch.zeros(2, dtype=torch.int8)])  # 3 x 4 + 2 x 1
        14
    """
    return sum(t.numel() * t.element_size() for t in tensors)


def flat_bytes(like: Sequence[Tensor]) -> int:
    """Bytes that a ``FlatBuffer`` for tensors like these needs."""
    return sum(aligned(t.numel() * t.element_size()) for t in like)


class FlatBuffer:
    """Room for tensors like the given ones, as one block that is sent or shared in one piece.

    Args:
        like: tensors whose shapes and dtypes are taken, in order.
        memory: uint8 tensor of at least ``flat_bytes(like)`` bytes to lie in; made if not given.
        device: where to make it.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        memory: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        needed = flat_bytes(like)
        if memory is None:
            memory = torch.empty(needed, dtype=torch.uint8, device=device)
        self.bytes = memory[:needed]
        self.views: list[Tensor] = []
        offset = 0
        for t in like:
            nbytes = t.numel() * t.element_size()
            piece = self.bytes[offset : offset + nbytes]
            self.views.append(piece.view(t.dtype).view(t.shape))
            offset += aligned(nbytes)

    @torch.no_grad()
    def write(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors in."""
        torch._foreach_copy_(self.views, list(tensors))

    @torch.no_grad()
    def write_and_sum(self, tensors: Sequence[Tensor]) -> float:
        """Copy tensors in; returns the sum of all values, not finite if one of them is not.

        Large ones are taken in pieces, each added up while it is still in the processor's cache:
        the sum then costs little more than the copy.
        """
        total = 0.0
        for view, tensor in zip(self.views, tensors, strict=True):
            if tensor.numel() <= _PIECE_ELEMENTS or not tensor.is_contiguous():
                view.copy_(tensor)
                total += view.sum().item()
                continue
            pieces = zip(
                torch.split(view.view(-1), _PIECE_ELEMENTS),
                torch.split(tensor.detach().view(-1), _PIECE_ELEMENTS),
                strict=True,
            )
            for to, piece in pieces:
                to.copy_(piece)
                total += piece.sum().item()
        return total

    @torch.no_grad()
    def read(self, into: Sequence[Tensor]) -> None:
        """Copy tensors out."""
        torch._foreach_copy_(list(into), self.views)
