"""Optimizers that look at whole tensors, where ranks have parts of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from scaledtrain.errors import ConfigError
from scaledtrain.optim.lamb import LAMB
from scaledtrain.optim.layerwise import LayerwiseOptimizer, SumSquares, needs_whole_tensors

if TYPE_CHECKING:
    from scaledtrain.replica import MakeOptimizer

__all__ = ["check_elementwise", "for_shards", "for_stages"]


def check_elementwise(optimizer: Optimizer) -> None:
    """See that an optimizer can update a part of a tensor without the rest.

    Raises:
        ConfigError: it cannot.
    """
    if needs_whole_tensors(optimizer):
        raise ConfigError(
            f"optimizer is {type(optimizer).__name__}, which looks at rows, columns or norms of "
            "whole matrices, but with mesh.shard each rank has a part of each; take one that "
            "updates number by number (SGD, AdamW), or LARS or LAMB with engine=fully_shard, or "
            "leave mesh.shard out"
        )


def for_shards(
    make: MakeOptimizer, sum_squares: SumSquares, shards: Collection[nn.Parameter]
) -> MakeOptimizer:
    """A factory of optimizers of shards, that tells LARS and LAMB how norms are added up.

    Args:
        make: the factory.
        sum_squares: see `LayerwiseOptimizer.sum_shards`.
        shards: this rank's. For other parameters, a server's copies, which ranks do not update
            together, such optimizers are refused, and any others that look at whole tensors always.
    """
    if isinstance(make, Optimizer):  # whoever gets it says what is wrong with that
        return make
    own = set(map(id, shards))

    def made(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        optimizer = make(named_parameters)
        if not isinstance(optimizer, LayerwiseOptimizer):
            check_elementwise(optimizer)
            return optimizer
        if not all(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError(
                f"{type(optimizer).__name__} needs norms of whole tensors, but with mesh.shard "
                "each rank serves shards that it updates by itself; take an optimizer that updates "
                "number by number (SGD, AdamW), a strategy without a server, or leave mesh.shard "
                "out"
            )
        optimizer.sum_shards(sum_squares)
        return optimizer

    return made


def for_stages(make: MakeOptimizer) -> MakeOptimizer:
    """A factory of optimizers of a pipeline's stages: none may look at the whole model.

    Args:
        make: the factory.
    """
    if isinstance(make, Optimizer):
        return make

    def made(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        optimizer = make(named_parameters)
        if isinstance(optimizer, LAMB) and optimizer.clips:
            raise ConfigError(
                "LAMB's max_grad_norm clips the norm of all gradients, but with mesh.pipe each "
                "rank has those of its stages; set the training's max_grad_norm instead "
                "(Trainer(max_grad_norm=...)), which is over all ranks"
            )
        return optimizer

    return made
