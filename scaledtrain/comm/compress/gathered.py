"""Reductions of what a codec makes of each rank's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scaledtrain.comm.compress.feedback import Feedback
from scaledtrain.comm.compress.group import CompressedGroup, Later
from scaledtrain.comm.protocols import Group, Handle, ReduceOp
from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from scaledtrain.comm.compress.codec import Codec

__all__ = ["GatheredGroup"]


class GatheredGroup(CompressedGroup):
    r"""Every rank sends C(w g + e) to all, and each takes the mean of what it decodes.

        mean = sum_i C(w_i g_i + e_i) / sum_i w_i,   e_i <- w_i g_i + e_i - C(w_i g_i + e_i)

    in the order of ranks, so the result is the same on every rank, bit by bit. What is kept has its
    weight in it, so that it counts as much when it is sent, whatever the weights are then. A rank
    of weight 0 keeps its e for the next time. n ranks receive n - 1 encoded gradients each, so that
    with more ranks than the codec saves bytes an all-reduce of the gradients themselves is cheaper.
    """

    def __init__(self, group: Group, codec: Codec, like: Sequence[Tensor]) -> None:
        super().__init__(group, like)
        self._codec = codec
        self._feedback = Feedback(codec, like)

    def _reduce(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> Handle:
        return Later(lambda: self._exchange(tensors, 1.0 if op == "sum" else weight, op == "mean"))

    def _exchange(self, tensors: list[Tensor], weight: float, mean: bool) -> None:
        if weight == 0.0:
            self._feedback.confirm()  # of the last time: nothing changes this time
            encoded = self._codec.encode([torch.zeros_like(t) for t in tensors])
        else:
            encoded = self._feedback.encode(tensors, weight)
        own = torch.tensor([weight], dtype=torch.float64, device=tensors[0].device)
        gathered = self._group.all_gather([own, *encoded])
        weights = [float(row[0]) for row in gathered]
        _check(weights)
        for t in tensors:
            t.zero_()
        for (_, *theirs), w in zip(gathered, weights, strict=True):
            if w != 0.0:
                torch._foreach_add_(tensors, self._codec.decode(theirs, tensors))
        if mean:
            torch._foreach_div_(tensors, sum(weights))

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


def _check(weights: list[float]) -> None:
    if not all(w >= 0.0 and math.isfinite(w) for w in weights) or sum(weights) == 0.0:
        raise ConfigError(
            f"the ranks gave a mean the weights {weights}; weights are finite numbers >= 0, and at "
            "least one is positive"
        )
