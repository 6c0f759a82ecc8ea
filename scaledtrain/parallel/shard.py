"""Replicas whose every parameter is divided among ranks: torch's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as _fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.stand_in import StandIn
from scaledtrain.parallel.whole_tensors import for_shards
from scaledtrain.recompute.blocks import find_blocks

if TYPE_CHECKING:
    from scaledtrain.data.replica_loader import StepBatch
    from scaledtrain.loss_scale import LossScaler
    from scaledtrain.parallel.engine import Recipe
    from scaledtrain.precision import Precision
    from scaledtrain.replica import MakeOptimizer

__all__ = ["FullyShard", "Shards"]


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
    norms in their own, and gradients reduced in float32. The optimizer updates number by number
    (SGD, Adam), or is LARS or LAMB, which add the shards' norms up in one all-reduce of all
    tensors; others that look at rows or norms of whole tensors (Muon) would see a shard's.

    Args:
        reshard_after_forward: give up the parameters of a block after its forward pass; they are
            gathered once more for the backward pass. False: less is sent, more is kept.
        offload: keep the shards in the host's memory and step the optimizer there; for GPUs.
        blocks: names of classes whose modules are gathered one by one
            (``["GPT2Block"]``). None: the modules of the model's longest chain, as
            `scaledtrain.recompute.blocks.find_blocks` has it. What is in no block is one more.

    References:
        Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054; Zhao et al. 2023, PyTorch FSDP, arXiv
        2304.11277.
    """

    reshard_after_forward: bool = True
    offload: bool = False
    blocks: Sequence[str] | None = None

    takes_stages: ClassVar[bool] = True

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
        policy = MixedPrecisionPolicy(
            param_dtype=gathered,
            reduce_dtype=None if gathered is None else torch.float32,
            cast_forward_inputs=False,  # autocast does
        )
        stand_in = StandIn(roots[0], gathered) if recipe.recomputed else None
        mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("shard",))
        for module in (m for root in roots for m in (*self.blocks_of(root), root)):
            _fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=self.reshard_after_forward,
                mp_policy=policy,
                offload_policy=CPUOffloadPolicy() if self.offload else OffloadPolicy(),
            )
        return Shards(roots, device, stand_in)

    def gathered_dtype(self, model: nn.Module, precision: Precision) -> torch.dtype | None:
        """The format in which parameters are gathered; None: their own."""
        if any(isinstance(m, _BatchNorm) and m.affine for m in model.modules()):
            return None  # its kernels want 32-bit weights
        return precision.autocast_dtype

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
        if self.blocks is None:
            try:
                return find_blocks(model)
            except ConfigError:  # it has no chain: it is gathered as a whole
                return []
        kinds = {type(module).__name__ for module in model.modules()}
        for name in self.blocks:
            if name not in kinds:
                raise ConfigError(
                    f"engine.blocks has {name!r}, but {type(model).__name__} has no module of that "
                    f"class; it has {', '.join(sorted(kinds))}"
                )
        return [m for m in model.modules() if m is not model and type(m).__name__ in self.blocks]


class Shards:
    """This rank's shard of every parameter, as plain tensors that the model's own refer to.

    Args:
        roots: sharded.
        device: on which it computes.
        stand_in: for the first root, the whole model; None: nobody will ask for it.

    Attributes:
        named_parameters: (name, shard), in the model's order; some may have no element. They share
            the model's memory, as long as nobody gives them other memory.
    """

    needs_lockstep = False
    one_by_one = True

    def __init__(
        self, roots: Sequence[nn.Module], device: torch.device, stand_in: StandIn | None = None
    ) -> None:
        self.called: Callable[..., Any] = roots[0]
        self._model = roots[0]
        self._roots = roots
        self._device = device
        self._stand_in = stand_in
        modules = [module for root in roots for module in root.modules()]
        self._modules = [m for m in modules if isinstance(m, FSDPModule)]
        self._sharded: list[nn.Parameter] = []
        self.named_parameters: list[tuple[str, nn.Parameter]] = []
        self._by_name: dict[str, DTensor] = {}
        for name, parameter in (named for root in roots for named in root.named_parameters()):
            shard = nn.Parameter(_local(parameter.detach()), parameter.requires_grad)
            assert isinstance(parameter, DTensor)
            self._by_name[name] = parameter
            self._sharded.append(parameter)
            self.named_parameters.append((name, shard))

    def full_state_dict(self, keep: bool) -> dict[str, Any]:
        """The whole model's state dict, in the host's memory; tied tensors are one there, too.

        Args:
            keep: whether to have it; all ranks take part in any case.
        """
        whole: dict[int, Any] = {}
        found = {}
        named = (item for r in self._roots for item in r.state_dict(keep_vars=True).items())
        for name, value in named:
            if id(value) not in whole:
                full = value
                if isinstance(value, DTensor):  # a shard in the host's memory is not gathered there
                    on_device = value.detach().to(self._device)
                    assert isinstance(on_device, DTensor)
                    full = on_device.full_tensor()
                if isinstance(full, Tensor):
                    full = full.detach().to("cpu", copy=full is value) if keep else None
                whole[id(value)] = full
            found[name] = whole[id(value)]
        return found if keep else {}

    def stand_in(self, blocks: Sequence[str] | None) -> nn.Module:
        """A whole model that computes as this one, without its values; see `StandIn.make`."""
        assert self._stand_in is not None
        return self._stand_in.make(self._model, self._device, blocks)

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """The whole of a tensor that is divided as that parameter is, of which this is the shard.

        One of another shape than the parameter's shard is returned as it is.
        """
        if name not in self._by_name:
            return shard
        parameter = self._by_name[name]
        if not shard.dim() or shard.shape != _local(parameter).shape:
            return shard
        return DTensor.from_local(
            shard,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def optimizer(self, usual: MakeOptimizer) -> MakeOptimizer:
        """The usual one; LARS and LAMB have norms of whole tensors, others that want them fail."""
        return for_shards(usual, self._sum, [shard for _, shard in self.named_parameters])

    def _sum(self, squares: Tensor) -> None:
        """Over the ranks that have the other shards."""
        mesh = next(iter(self._by_name.values())).device_mesh
        on_device = squares.to(self._device)
        dist.all_reduce(on_device, group=mesh.get_group())
        squares.copy_(on_device)

    def scaler(self, usual: Callable[[], LossScaler]) -> LossScaler:
        """As for any model."""
        return usual()

    def begin(self, batch: StepBatch) -> None:
        """Each backward pass is like the others."""

    def close(self) -> None:
        """The model stays as it is."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the model compute with the shards' values, which may be in other memory now."""
        for parameter, (_, shard) in zip(self._sharded, self.named_parameters, strict=True):
            own = _local(parameter.detach())
            if own.data_ptr() != shard.data_ptr():
                own.copy_(shard)
        for module in self._modules:  # a forward pass alone may have left them gathered
            module.reshard()

    def take_gradients(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Shards that have got a gradient since the last time, and it; the model forgets it."""
        shards, gradients = [], []
        for parameter, (_, shard) in zip(self._sharded, self.named_parameters, strict=True):
            if parameter.grad is not None:
                shards.append(shard)
                gradients.append(_local(parameter.grad))
                parameter.grad = None
        return shards, gradients


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local
