"""What a rank has of a model that is divided among several, and what it gathers meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scaledtrain.memory.fake import copied
from scaledtrain.parallel.shard import FullyShard
from scaledtrain.precision import Precision

__all__ = ["Gathering", "gathering_of", "shards_of"]


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
    block is gathered around all of them. In a backward pass the next
    block's parameters come while one computes, and what is reduced of the last one is still there.
    One rank alone copies one parameter after the other, none ahead, and a block's gradients twice.

    Args:
        model: whole, in the format in which it is gathered; inside of `Fakes`.
        blocks: that are gathered by themselves.
        n: ranks.
        reduced: the format in which gradients are reduced; None: their own.
        reshards: whether a block's parameters are given up after its forward pass.
        offloads: shards and their gradients are in another memory.
        stored: the format of the shards; None: that in which they are gathered.

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
        offloads: bool = False,
        stored: torch.dtype | None = None,
    ) -> None:
        self.on = False
        self._n = n
        self._reduced = reduced
        self._reshards = reshards
        self._offloads = offloads
        self._stored = stored
        self._held: dict[nn.Module, list[Tensor]] = {}
        self._ahead: dict[nn.Module, list[Tensor]] = {}
        self._reducing: list[Tensor] = []
        self._ran: list[nn.Module] = []
        self._own: dict[nn.Module, list[nn.Parameter]] = {}
        self._shards: dict[nn.Parameter, Tensor] = {}
        taken: set[nn.Parameter] = set()
        for module in (*blocks, model):
            own = [p for p in module.parameters() if p not in taken]
            taken |= set(own)
            if own:
                self._own[module] = own
                self._watch(module, own)

    def _watch(self, module: nn.Module, own: list[nn.Parameter]) -> None:
        waiting: list[nn.Parameter] = []
        trained = sum(p.requires_grad for p in own)

        def gather(*_: Any) -> None:
            if not self.on or module in self._held:
                return
            if self._n == 1:
                held = self._held[module] = []
                for p in own:
                    moved = torch.empty_like(p, dtype=self._stored or p.dtype)
                    narrowed = moved if moved.dtype == p.dtype else torch.empty_like(p)
                    del moved
                    held.append(torch.empty_like(p))
                    del narrowed
                return
            buffers = self._ahead.pop(module, None) or [torch.empty_like(p) for p in own]
            self._held[module] = [torch.empty_like(p) for p in own]
            del buffers  # but meanwhile they are there

        def gather_again(gradient: Tensor) -> None:
            gather()
            before = self._ran.index(module) - 1 if module in self._ran else -1
            if self._n > 1 and before >= 0 and self._ran[before] not in self._held:
                parameters = self._own[self._ran[before]]
                self._ahead[self._ran[before]] = [torch.empty_like(p) for p in parameters]

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if self._reshards:
                self._held.pop(module, None)
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if self.on and tensors and trained:
                self._ran.append(module)
                tensors[0].register_hook(gather_again)  # type: ignore[no-untyped-call]

        def accumulated(parameter: nn.Parameter) -> None:
            if not self.on:
                return
            waiting.append(parameter)
            if len(waiting) < trained:
                return
            self._held.pop(module, None)
            self._reducing = []
            self._reducing = [torch.empty_like(p, dtype=self._reduced or p.dtype) for p in waiting]
            for p in waiting:
                if p not in self._shards and not self._offloads:
                    self._shards[p] = _shard_of(p, self._n).to(self._reduced or p.dtype)
                p.grad = None
            if self._n == 1:
                copies = [torch.empty_like(r) for r in self._reducing]
                del copies
            waiting.clear()
            if not self._held:  # the backward pass is over
                self._ran.clear()
                self._reducing = []

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(after)
        for parameter in own:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]


def gathering_of(
    model: nn.Module, engine: FullyShard, n: int, precision: Precision
) -> Gathering | None:
    """Let a model be one that is gathered from shards; None: it is whole.

    Args:
        model: inside of `Fakes`; its parameters get the format in which they are gathered.
        engine: what divides it.
        n: ranks among which it is divided.
        precision: in which it computes.
    """
    if n == 1 and not engine.offload:
        return None
    blocks, gathered = engine.blocks_of(model), engine.gathered_dtype(model, precision)
    stored = None if gathered is None else torch.float32
    for parameter in model.parameters():
        if gathered is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(gathered)
    reduced = engine.reduced_dtype(model, precision)
    return Gathering(
        model, blocks, n, reduced, engine.reshard_after_forward, engine.offload, stored
    )
