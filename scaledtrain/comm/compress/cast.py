"""Reductions in a number format of fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scaledtrain.comm.compress.group import CompressedGroup, Later
from scaledtrain.comm.protocols import Group, Handle, ReduceOp

if TYPE_CHECKING:
    from scaledtrain.comm.compress.codec import Codec

__all__ = ["CastGroup"]


class CastGroup(CompressedGroup):
    """Reduces in the format of the encoded tensors, with the group's own all-reduce.

    Every byte count is halved that an all-reduce of float32 has; gathering all ranks' tensors and
    adding them in float32 would send n / 2 times as much from n ranks. The price is in the sums:
    shared memory adds in float32 and rounds once, torch.distributed rounds each partial sum to 16
    bits (n - 1 times, as with PyTorch's own fp16 and bf16 hooks), and one beyond float16's range
    becomes infinite.
    """

    def __init__(self, group: Group, codec: Codec, like: Sequence[Tensor]) -> None:
        super().__init__(group, like)
        self._codec = codec

    @property
    def overlaps(self) -> bool:
        """As the group below."""
        return self._group.overlaps

    def _reduce(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> Handle:
        encoded = self._codec.encode(tensors)
        handle = self._group.all_reduce(encoded, op, weight)

        def finish() -> None:
            handle.wait()
            torch._foreach_copy_(tensors, encoded)

        return Later(finish)
