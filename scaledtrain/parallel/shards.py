"""What `FullyShard` makes: a model divided by ``fully_shard``, and a rank's shards of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as _fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor

from scaledtrain.comm.process_group import device_of_messages
from scaledtrain.errors import ConfigError
from scaledtrain.parallel.stand_in import StandIn
from scaledtrain.parallel.whole_tensors import for_shards

if TYPE_CHECKING:
    from scaledtrain.data.steps import StepBatch
    from scaledtrain.loss_scale import LossScaler
    from scaledtrain.parallel.shard import FullyShard
    from scaledtrain.replica import MakeOptimizer

__all__ = ["Shards", "divide"]


def divide(
    engine: FullyShard,
    roots: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    formats: tuple[torch.dtype | None, torch.dtype | None],
    group: ProcessGroup,
    recomputed: bool,
) -> Shards:
    """Shard a model, or stages of one, in place. Collective.

    Args:
        engine: how.
        roots: the model, or the stages, on the device on which they compute.
        modules: whose parameters are gathered together, inner ones first, roots included.
        formats: in which parameters are gathered and gradients reduced; None: their own.
        group: the ranks.
        recomputed: a model that stands in for it will be asked for.

    Raises:
        ConfigError: it is on a GPU, but the ranks do not meet over NCCL.
    """
    device = next(roots[0].parameters()).device
    if device_of_messages(group, device) != device:
        raise ConfigError(
            "the ranks meet over gloo, which cannot gather what is sharded on GPUs: some ranks "
            "share a GPU, or the process group was made so; start as many ranks as there are GPUs, "
            "make the group with NCCL, or train on CPUs (device=cpu)"
        )
    gathered, reduced = formats
    policy = MixedPrecisionPolicy(
        param_dtype=gathered,
        reduce_dtype=reduced,
        cast_forward_inputs=False,  # autocast does
    )
    stand_in = StandIn(roots[0], gathered) if recomputed else None
    offload: OffloadPolicy = OffloadPolicy()
    if engine.offload:
        added_up = any(p.dtype != reduced for root in roots for p in root.parameters())
        # `Shards` adds them up in a hook, for which torch before 2.13 does not wait for copies into
        # page-locked memory.
        offload = CPUOffloadPolicy(pin_memory=reduced is None or not added_up)
    mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("shard",))
    for module in modules:
        _fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=engine.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    return Shards(roots, device, stand_in, reduced)


class Shards:
    """This rank's shard of every parameter, as plain tensors that the model's own refer to.

    Args:
        roots: sharded.
        device: on which it computes.
        stand_in: for the first root, the whole model; None: nobody will ask for it.
        added_up: the format in which gradients are added up; None: the parameters' own.

    Attributes:
        named_parameters: (name, shard), in the model's order; some may have no element. They share
            the model's memory, as long as nobody gives them other memory.
    """

    needs_lockstep = False
    in_memory = True
    one_by_one = True
    saved_elsewhere: Collection[str] = ()

    def __init__(
        self,
        roots: Sequence[nn.Module],
        device: torch.device,
        stand_in: StandIn | None = None,
        added_up: torch.dtype | None = None,
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
        self._added_up = added_up
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in self._sharded:
            if added_up is not None and parameter.dtype != added_up and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add_up)  # type: ignore[no-untyped-call]

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

    def state_dict(self, model: nn.Module) -> Mapping[str, Any]:
        """With DTensors, of which each rank has a chunk."""
        return model.state_dict()

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        model.load_state_dict(state)

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
            if parameter in self._sums:
                shards.append(shard)
                gradients.append(self._sums.pop(parameter))
            elif parameter.grad is not None:
                shards.append(shard)
                gradients.append(_local(parameter.grad))
                parameter.grad = None
        return shards, gradients

    def _add_up(self, parameter: nn.Parameter) -> None:
        """What one backward pass has left, which torch would add up in the parameter's format."""
        assert parameter.grad is not None
        gradient = _local(parameter.grad).to(self._added_up)
        if parameter in self._sums:
            self._sums[parameter] += gradient
        else:
            self._sums[parameter] = gradient
        parameter.grad = None


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local
