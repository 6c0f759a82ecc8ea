"""A model that stands in for a sharded one, to see on one rank alone what a step needs."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.blocks import find_blocks, has_hooks, named_blocks

__all__ = ["StandIn"]

_VALUE = 0.01  # of all parameters, on average


class StandIn:
    """Makes a model of whole parameters that computes as a sharded one does, and as long.

    It has the sizes and formats of the gathered parameters, but not their values, on which neither
    bytes nor time depend. Blocks that are alike share the memory of their parameters, so that it
    takes about as much memory as what is gathered at a time does.

    Args:
        model: before it is sharded.
        gathered: the format in which its parameters are gathered; None: their own.
    """

    def __init__(self, model: nn.Module, gathered: torch.dtype | None) -> None:
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            dtype = gathered if parameter.is_floating_point() else None
            shape = torch.empty_like(parameter, dtype=dtype, device="meta")
            memo[id(parameter)] = nn.Parameter(shape, parameter.requires_grad)
        others = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
        memo.update({id(tensor): tensor for tensor in (*model.buffers(), *others)})
        self._shapes = copy.deepcopy(model, memo)

    def make(
        self, sharded: nn.Module, device: torch.device, blocks: Sequence[str] | None = None
    ) -> nn.Module:
        """The model, in the modes that the sharded one is in now.

        Args:
            sharded: the model that was given, as it has become.
            device: on which it computes.
            blocks: names of the blocks that may be computed again; None: those of the chain.

        Raises:
            ConfigError: modules inside of blocks are gathered by themselves.
        """
        model = copy.deepcopy(self._shapes, {id(b): b for b in self._shapes.buffers()})
        generator = torch.Generator(device).manual_seed(0)
        memory: dict[Hashable, Tensor] = {}
        found: dict[nn.Parameter, nn.Parameter] = {}
        chain = _chain(model, blocks)
        for module in (*chain, model):
            for name, parameter in module.named_parameters():
                if parameter in found:
                    continue
                # Of their own, but for those of blocks that are alike.
                key = name, module is model, parameter.shape, parameter.dtype
                if key not in memory:
                    memory[key] = torch.zeros_like(parameter, device=device)
                    if parameter.is_floating_point():  # not all alike, or norms flatten all
                        memory[key].uniform_(0.0, 2 * _VALUE, generator=generator)
                found[parameter] = nn.Parameter(memory[key].detach(), parameter.requires_grad)
        for one, other in zip(model.modules(), sharded.modules(), strict=True):
            one.training = other.training
            for name, own in one._parameters.items():
                one._parameters[name] = None if own is None else found[own]
        for block, other in zip(chain, _chain(sharded, blocks), strict=True):
            _check_inside(other)
            if has_hooks(other):  # so that it is not computed together with others
                block.register_forward_pre_hook(_nothing)
        return model


def _chain(model: nn.Module, names: Sequence[str] | None) -> list[nn.Module]:
    return find_blocks(model) if names is None else named_blocks(model, names)


def _check_inside(block: nn.Module) -> None:
    for module in block.modules():
        if module is not block and isinstance(module, FSDPModule):
            raise ConfigError(
                f"engine.block_classes has {_class(module)}, modules inside of the blocks "
                f"({_class(block)}) whose activations are to be computed again; they would be "
                "gathered in the middle of that: let engine.block_classes name blocks of the "
                "chain, or leave it out"
            )


def _class(module: nn.Module) -> str:
    """The user's, not the one that fully_shard has made of it."""
    kind = type(module)
    return (kind.__mro__[2] if isinstance(module, FSDPModule) else kind).__name__


def _nothing(module: nn.Module, args: Any) -> None:
    pass
