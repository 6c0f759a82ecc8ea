"""Reductions of what a codec makes of each rank's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scaledtrain.comm.compress.feedback import Feedback
from scaledtrain.comm.compress.group import CompressedGroup, Later
from scaledtrain.comm.protocols import Group, Handle, ReduceOp

if TYPE_CHECKING:
    from scaledtrain.comm.compress.codec import Codec

__all__ = ["GatheredGroup"]


class GatheredGroup(CompressedGroup):
    r"""Every rank sends C(s g + e) to all, and each takes the mean of what it decodes.

        mean = sum_i C(s_i g_i + e_i) / n,   e_i <- s_i g_i + e_i - C(s_i g_i + e_i)

    in the order of ranks, so the result is the same on every rank, bit by bit. s_i = n w_i / sum w
    is a rank's weight relative to the mean one, 1 where all are equal, so that what is kept counts
    as much when it is sent as it would have in its own step. A rank of weight 0 keeps its e for the
    next time. n ranks receive n - 1 encoded gradients each, so that with more ranks than the codec
    saves bytes an all-reduce of the gradients themselves is cheaper; the weights go before, in 8
    bytes of each.
    """

    def __init__(self, group: Group, codec: Codec, like: Sequence[Tensor]) -> None:
        super().__init__(group, like)
        self._codec = codec
        self._feedback = Feedback(codec, like)

    def _reduce(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> Handle:
        return Later(lambda: self._exchange(tensors, op, weight))

    def _exchange(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> None:
        relative = self._relative_weights(op, weight, tensors[0].device)
        own = relative[self.rank]
        if own == 0.0:
            self._feedback.confirm()  # of the last time: nothing changes this time
            encoded = self._codec.encode([torch.zeros_like(t) for t in tensors])
        else:
            encoded = self._feedback.encode(tensors, own)
        gathered = self._group.all_gather(encoded)
        for t in tensors:
            t.zero_()
        for theirs, w in zip(gathered, relative, strict=True):
            if w != 0.0:
                torch._foreach_add_(tensors, self._codec.decode(theirs, tensors))
        if op == "mean":
            torch._foreach_div_(tensors, self.size)

    def confirm(self) -> None:
        """What was sent last is used."""
        self._feedback.confirm()

    def undo(self) -> None:
        """What was sent last is not used: e is what it was before."""
        self._feedback.undo()

    def state_dict(self) -> list[dict[str, Tensor]]:
        """A copy of e, a dictionary for each tensor."""
        return self._feedback.state_dict()

    def load_state_dict(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore what ``state_dict`` returned; empty dictionaries: e is zero."""
        self._feedback.load_state_dict(state)
