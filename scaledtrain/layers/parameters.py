"""Norms of a replica's tensors, of their gradients, and of how a step changes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scaledtrain.layers.sampled import sampled

if TYPE_CHECKING:
    from scaledtrain.layers.rows import Sums
    from scaledtrain.trainer import Trainer

__all__ = ["Tensors"]


class Tensors:
    """The trainable tensors of this rank's piece of a replica, measured one by one.

    The update is what a step has really made of a tensor: w after it less w before it, with all
    that optimizer, schedule, clipping, rounding and strategy do. That takes a copy of w, of as
    many tensors as fit into ``copy_bytes``; those of a larger model take turns. Of shards norms are
    those of whole tensors: the ranks that have them call everything here together.

    Args:
        trainer: with all its parts.
        copy_bytes: of copies at a time; at least one tensor is copied.

    Attributes:
        names: of the whole tensors, in the model's order.
        sizes: how many numbers each has.
        is_matrix: whether each has two dims or more, where it is not a part.
    """

    def __init__(self, trainer: Trainer, copy_bytes: int) -> None:
        replica = trainer.replica
        self._parameters = replica.parameters
        self._shards = trainer.layout.shards
        self._device = trainer.link.device
        own = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
        dims = {name: p.dim() for name, p in own}
        # An engine may give a rank no part at all of some.
        self.names = list(dict.fromkeys([*dims, *replica.names]))
        places = {name: place for place, name in enumerate(self.names)}
        self._places = [places[name] for name in replica.names]
        self.is_matrix = [dims.get(name, 1) > 1 for name in self.names]
        sizes = self._summed([float(p.numel()) for p in self._parameters], self._places)
        self.sizes = [int(size) for size in sizes.tolist()]
        width = max(p.element_size() for p in self._parameters)
        self._turns = _turns([s * width // self._shards.size for s in self.sizes], copy_bytes)
        self._next = 0
        self._copies: dict[int, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def _summed(self, values: Sequence[float | Tensor], places: Sequence[int]) -> Tensor:
        """At their places among all tensors, over all ranks that have parts."""
        whole = torch.zeros(len(self.names), dtype=torch.float64, device=self._device)
        if values:
            own = [torch.as_tensor(v, dtype=torch.float64, device=self._device) for v in values]
            whole[torch.tensor(list(places), device=self._device)] = torch.stack(own)
        if self._shards.size > 1:
            self._shards.all_reduce([whole], "sum").wait()
        return whole

    def _squares(self, tensors: dict[int, Tensor]) -> Tensor:
        there = {place: t for place, t in tensors.items() if t.numel()}
        if not there:
            return self._summed([], [])
        narrow = any(t.dtype.itemsize < 4 for t in there.values())
        dtype = torch.float32 if narrow else None
        norms = torch._foreach_norm(list(there.values()), 2.0, dtype)
        return self._summed([norm.double().square() for norm in norms], list(there))

    @torch.no_grad()
    def before(self) -> None:
        """Copy those whose turn it is: what follows changes them."""
        own = {place: p.detach() for place, p in zip(self._places, self._parameters, strict=True)}
        self._found["weight"] = self._squares(own)
        chosen = self._turns[self._next % len(self._turns)]
        self._copies = {place: own[place].clone() for place in chosen if place in own}

    @torch.no_grad()
    def gradients(self) -> None:
        """See those that the update is about to be made from."""
        pairs = list(zip(self._places, self._parameters, strict=True))
        found = {place: p.grad for place, p in pairs if p.grad is not None}
        self._found["gradient"] = self._squares(found)

    @torch.no_grad()
    def after(self) -> list[Sums]:
        """What was found of each tensor, as `row_of` has it; the step is over."""
        chosen = self._turns[self._next % len(self._turns)]
        if "weight" in self._found:
            self._next += 1
            now = dict(zip(self._places, self._parameters, strict=True))
            places = list(self._copies)
            if places:
                copies = list(self._copies.values())
                torch._foreach_sub_(copies, [now[place].detach() for place in places])
            self._found["update"] = self._squares(self._copies)
        names = list(self._found)
        rows = torch.stack([*self._found.values()]).t().tolist() if names else []
        found: list[Sums] = [dict(zip(names, row, strict=True)) for row in rows]
        for place, sums in enumerate(found):
            if place in chosen and "update" in sums:
                sums["updated"] = sums["weight"]
            else:
                sums.pop("update", None)
        self.forget()
        return found

    def forget(self) -> None:
        """Of the step under way."""
        self._copies, self._found = {}, {}

    def sampled(self, most: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Some values of each tensor here, at most so many, and of their gradients, by name."""
        weights: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for place, p in zip(self._places, self._parameters, strict=True):
            for to, tensor in ((weights, p), (gradients, p.grad)):
                if tensor is not None and tensor.numel():
                    to[self.names[place]] = sampled(tensor, most).float()
        return weights, gradients


def _turns(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive places whose sizes make at most so much, but at least one each."""
    turns: list[list[int]] = []
    sums = list(accumulate(sizes))
    begin = 0
    for place, end in enumerate(sums):
        if not turns or end - begin > most:
            turns.append([])
            begin = end - sizes[place]
        turns[-1].append(place)
    return turns
