"""What a rank has of a model that is divided among several, and what it gathers meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scaledtrain.memory.fake import copied

__all__ = ["Gathering", "shards_of"]


def shards_of(model: nn.Module, n: int, device: torch.device | str) -> nn.Module:
    """A model each of whose parameters is as large as the largest of ``n`` shards of it.

    Args:
        model: only sizes are looked at.
        n: ranks among which each parameter is cut along its first dim.
        device: as `copied` has it.
    """
    found = copied(model, device)
    new = {p: nn.Parameter(_shard_of(p, n), p.requires_grad) for p in found.parameters()}
    for module in found.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else new[parameter]
    return found


def _shard_of(tensor: Tensor, n: int) -> Tensor:
    rows = tensor.shape[:1] or (1,)
    return tensor.new_empty((-(-rows[0] // n), *tensor.shape[1:]))


class Gathering:
    """Lets a whole model take the memory, beside its parameters, that it takes when it is sharded.

    What `FullyShard` does, as far as it takes memory: a block's parameters are gathered, through a
    buffer, before its forward and its backward pass, and given up afterwards; its gradients wait
    for each other and are copied to where they are reduced, of which a shard is left. What is in no
    block is gathered around all of them. Not counted is that the next block's may come early.

    Args:
        model: whole, in the format in which it is gathered; inside of `Fakes`.
        blocks: that are gathered by themselves.
        n: ranks.
        reduced: the format in which gradients are reduced; None: their own.
        reshards: whether a block's parameters are given up after its forward pass.

    Attributes:
        on: whether anything is done.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        n: int,
        reduced: torch.dtype | None,
        reshards: bool,
    ) -> None:
        self.on = False
        self._n = n
        self._reduced = reduced
        self._reshards = reshards
        self._held: dict[nn.Module, list[Tensor]] = {}
        self._shards: dict[nn.Parameter, Tensor] = {}
        taken: set[nn.Parameter] = set()
        for module in (*blocks, model):
            own = [p for p in module.parameters() if p not in taken]
            taken |= set(own)
            if own:
                self._watch(module, own)

    def _watch(self, module: nn.Module, own: list[nn.Parameter]) -> None:
        waiting: list[nn.Parameter] = []
        trained = sum(p.requires_grad for p in own)

        def gather(*_: Any) -> None:
            if not self.on or module in self._held:
                return
            buffers = [torch.empty_like(p) for p in own]
            self._held[module] = [torch.empty_like(p) for p in own]
            del buffers  # but meanwhile they are there

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if self._reshards:
                self._held.pop(module, None)
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if self.on and tensors and trained:
                tensors[0].register_hook(gather)  # type: ignore[no-untyped-call]

        def accumulated(parameter: nn.Parameter) -> None:
            if not self.on:
                return
            waiting.append(parameter)
            if len(waiting) < trained:
                return
            self._held.pop(module, None)
            reduced = [torch.empty_like(p, dtype=self._reduced or p.dtype) for p in waiting]
            for p in waiting:
                if p not in self._shards:
                    self._shards[p] = _shard_of(p, self._n).to(self._reduced or p.dtype)
                p.grad = None
            del reduced
            waiting.clear()

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(after)
        for parameter in own:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
