"""Replicas whose every parameter is divided among ranks: torch's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.blocks import find_blocks

if TYPE_CHECKING:
    from scaledtrain.parallel.engine import Recipe
    from scaledtrain.parallel.shards import Shards
    from scaledtrain.precision import Precision

__all__ = ["FullyShard"]


@dataclass(frozen=True)
class FullyShard:
    """Each rank keeps 1/n of every parameter, gradient and optimizer state: ZeRO-3, FSDP.

    A block's parameters are gathered before it runs, and given up after it (and again around its
    backward pass); its gradients are averaged over the ranks, each of which gets its shard of them.
    Each tensor is cut along its first dim, into pieces as equal as they can be.

    Sent, by each rank of n, for P bytes of parameters: about (n - 1) / n P three times in a step
    (gathered forward and backward, reduced); two times without ``reshard_after_forward``. Waits:
    for all ranks of its replica at each block. A crash of one of them ends the run for all.

    With mixed precision parameters are gathered in the 16-bit format, those of a model with batch
    norms in their own, and gradients reduced in float32, as those of 16-bit parameters whose loss
    is scaled, which are also added up so; others in the parameters' format. The optimizer updates
    number by number (SGD, Adam), or is LARS or LAMB, which add the shards' norms up in one
    all-reduce of all tensors; others that look at rows or norms of whole tensors (Muon) would see a
    shard's.

    Args:
        reshard_after_forward: give up the parameters of a block after its forward pass; they are
            gathered once more for the backward pass. False: less is sent, more is kept.
        offload: keep the shards in the host's memory and step the optimizer there; for GPUs, also
            for one alone (``mesh.shard=1``), whose only shard is the whole.
        block_classes: names of classes whose modules are gathered one by one
            (``["GPT2Block"]``). None: the modules of the model's longest chain, as
            `scaledtrain.recompute.blocks.find_blocks` has it. What is in no block is one more.

    References:
        Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054; Zhao et al. 2023, PyTorch FSDP, arXiv
        2304.11277.
    """

    reshard_after_forward: bool = True
    offload: bool = False
    block_classes: Sequence[str] | None = None

    takes_stages: ClassVar[bool] = True
    makes_own_groups: ClassVar[bool] = False

    @property
    def offloads(self) -> bool:
        """Whether shards are in the host's memory."""
        return self.offload

    def apply(self, roots: Sequence[nn.Module], group: ProcessGroup, recipe: Recipe) -> Shards:
        """Shard a model, or stages of one, in place, over the ranks of a group. Collective.

        Args:
            roots: on the device on which they compute, the same on every rank.
            group: the ranks.
            recipe: its precision says in which format the model computes.

        Raises:
            ConfigError: no such blocks, or offloading from a CPU.
        """
        device = next(roots[0].parameters()).device
        if self.offload and device.type == "cpu":
            raise ConfigError(
                "engine.offload is true, but the model is in the host's memory already; leave it "
                "out, or train on GPUs"
            )
        gathered = self.gathered_dtype(nn.ModuleList(roots), recipe.precision)
        reduced = self.reduced_dtype(nn.ModuleList(roots), recipe.precision)
        # Here, since torch takes half a second to import it, which a run without shards need not.
        from scaledtrain.parallel.shards import divide

        blocks = [module for root in roots for module in (*self.blocks_of(root), root)]
        return divide(self, roots, blocks, (gathered, reduced), group, recipe.recomputed)

    def gathered_dtype(self, model: nn.Module, precision: Precision) -> torch.dtype | None:
        """The format in which parameters are gathered; None: their own."""
        if any(isinstance(m, _BatchNorm) and m.affine for m in model.modules()):
            return None  # its kernels want 32-bit weights
        return precision.autocast_dtype

    def reduced_dtype(self, model: nn.Module, precision: Precision) -> torch.dtype | None:
        """The format in which gradients are reduced; None: the parameters' own."""
        if self.gathered_dtype(model, precision) is not None or precision.scales_loss:
            return torch.float32
        return None

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """Modules that are gathered one by one; one that shares a parameter comes with the rest."""
        places: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            places.setdefault(parameter, []).append(name)
        names = {module: f"{name}." for name, module in model.named_modules()}
        found = []
        for block in dict.fromkeys(self._candidates(model)):
            inside = names[block]
            own = [places[parameter] for parameter in block.parameters()]
            if own and all(name.startswith(inside) for here in own for name in here):
                found.append(block)
        return found

    def _candidates(self, model: nn.Module) -> list[nn.Module]:
        if self.block_classes is None:
            try:
                return find_blocks(model)
            except ConfigError:  # it has no chain: it is gathered as a whole
                return []
        kinds = {type(module).__name__ for module in model.modules()}
        for name in self.block_classes:
            if name not in kinds:
                raise ConfigError(
                    f"engine.block_classes has {name!r}, but {type(model).__name__} has no module "
                    f"of that class; it has {', '.join(sorted(kinds))}"
                )
        return [
            m for m in model.modules() if m is not model and type(m).__name__ in self.block_classes
        ]
