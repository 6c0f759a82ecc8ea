"""What ZeRO gives this rank of a model: pieces of the float32 parameters, and of their gradients.

DeepSpeed has no public way to them for all stages, so this is the one file that knows its insides
(0.19): stages 1 and 2 keep one flat tensor for each parameter group, stage 3 for each sub-group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "FlatPartition",
    "ParameterPartition",
    "Partition",
    "SwappedPartition",
    "free_buffers",
    "partition_of",
]


class _Place(NamedTuple):
    """Where a parameter's part is in the flat tensors of this rank."""

    name: str
    key: int
    """By which ZeRO knows the parameter."""
    flat: int
    start: int
    numel: int


class Partition(ABC):
    """This rank's part of every parameter, as plain tensors that share memory with ZeRO's own.

    Args:
        optimizer: DeepSpeed's, which wraps the one that makes the updates.
        names: of the trainable parameters.

    Attributes:
        named_parameters: (name, part), flat, in float32, in an order that is the same on all ranks
            with the same part of other replicas. A parameter that is elsewhere has none.
        in_memory: whether they have their values between steps, and what is written into them
            counts.
    """

    in_memory = True

    def __init__(self, optimizer: Any, names: dict[nn.Parameter, str]) -> None:
        self._zero = optimizer
        own = dist.get_world_size(optimizer.dp_process_group)
        self._has_others = dist.get_world_size() > own  # replicas
        self._all_places = list(self._places(names))
        self.named_parameters = [
            (place.name, nn.Parameter(self._between_steps(place))) for place in self._all_places
        ]
        self._own: list[Tensor] = []
        self.remember()

    @property
    @abstractmethod
    def flats(self) -> Sequence[Tensor]:
        """The float32 parameters of this rank, that the optimizer works on."""

    @abstractmethod
    def _places(self, names: dict[nn.Parameter, str]) -> Iterator[_Place]: ...

    @property
    def flat_sizes(self) -> list[int]:
        """How many elements the flat tensors have, wherever they are."""
        return [flat.numel() for flat in self.flats]

    def _part(self, place: _Place) -> Tensor:
        return self.flats[place.flat].detach().narrow(0, place.start, place.numel)

    def _between_steps(self, place: _Place) -> Tensor:
        return self._part(place)

    @contextmanager
    def present(self, flat: int, *, written: bool = False) -> Iterator[list[Tensor]]:
        """Inside, a flat tensor and the optimizer's state of it are in memory.

        Args:
            flat: its index; one at a time.
            written: both are given other values there.

        Yields:
            The parts that are in it.
        """
        yield [self._part(place) for place in self._all_places if place.flat == flat]

    @property
    @abstractmethod
    def _is_offloaded(self) -> bool:
        """Whether gradients wait in the host's memory, in a flat tensor each."""

    @abstractmethod
    def _spread(self) -> None:
        """Let the model have the values of the float32 parameters. Collective."""

    def take_gradients(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The parts and their gradients, after a step's last backward pass.

        In units of the loss, in float32; without a loss scale they are ZeRO's own memory.
        """
        scale = self._zero.loss_scale
        self._own = self._found()
        if self._is_offloaded:  # where the last microbatch has left none an older one may be
            norms = self._zero.norm_for_param_grads
            pieces = zip(self._all_places, self._own, strict=True)
            if missing := [(place, own) for place, own in pieces if place.key not in norms]:
                self._fill(missing)
        parts = [part for _, part in self.named_parameters]
        if scale == 1.0:
            return parts, [g.to(p.dtype) for g, p in zip(self._own, parts, strict=True)]
        return parts, [g.to(p.dtype) / scale for g, p in zip(self._own, parts, strict=True)]

    @abstractmethod
    def _fill(self, missing: Sequence[tuple[_Place, Tensor]]) -> None:
        """Put the sum of earlier microbatches, or 0, where the last one has left no gradient."""

    def _found(self) -> list[Tensor]:
        found = [self._gradients(flat) for flat in range(len(self.flats))]
        return [found[place.flat](place) for place in self._all_places]

    def _gradients(self, flat: int) -> Callable[[_Place], Tensor]:
        if self._is_offloaded:
            whole = self.flats[flat].grad
            assert whole is not None
            return lambda place: whole.narrow(0, place.start, place.numel)
        pieces: list[Tensor] = self._zero.averaged_gradients[flat]
        starts = accumulate((piece.numel() for piece in pieces), initial=0)
        by_start = {s: p for s, p in zip(starts, pieces, strict=False) if p.numel()}
        return lambda place: by_start[place.start].detach().reshape(-1)

    def begin(self) -> None:
        """A step begins, whose gradients take the place of those that made no update."""
        self._forget()
        if self._is_offloaded:
            self._zero.reset_cpu_buffers()
        self._own = []

    @abstractmethod
    def _forget(self) -> None:
        """After backward passes without an update, whose gradients the next ones would add to."""

    def give_gradients(self) -> bool:
        """Let ZeRO have what has become of the gradients since; False: there are none."""
        if all(part.grad is None for _, part in self.named_parameters):
            return False
        if not self._own:  # only other replicas had samples
            self._own = self._zeros()
        scale = self._zero.loss_scale
        for own, (_, part) in zip(self._own, self.named_parameters, strict=True):
            if part.grad is not None and part.grad is not own:
                own.copy_(part.grad if scale == 1.0 else part.grad * scale)
        if self._is_offloaded and self._has_others:
            self._tell_norms()
        self._own = []
        return True

    def _tell_norms(self) -> None:
        """Of what the gradients are now: ZeRO knows those that backward passes have left.

        It makes no update if one of them is not finite, and all replicas have to make the same.
        """
        self._zero.reset_cpu_buffers()
        for place, own in zip(self._all_places, self._own, strict=True):
            self._zero.norm_for_param_grads[place.key] = own.norm()

    def _zeros(self) -> list[Tensor]:
        """In place of what no backward pass has left."""
        if self._is_offloaded:
            found = self._found()
            torch._foreach_zero_(found)
            return found
        for index, flat in enumerate(self.flats):
            sizes = [place.numel for place in self._all_places if place.flat == index]
            sizes.append(flat.numel() - sum(sizes))
            self._zero.averaged_gradients[index] = list(torch.split(torch.zeros_like(flat), sizes))
        return self._found()

    def remember(self) -> None:
        """The model has the values that the parts have now."""
        self._versions = self._now()

    def refresh(self) -> None:
        """If others than ZeRO wrote into the parts, let the model have it.

        Collective, among the ranks of a replica, in whose parts the same has been written.
        """
        if self._now() != self._versions:
            with torch.no_grad():
                self._spread()
            self.remember()

    def _now(self) -> list[int]:
        return [flat._version for flat in self.flats]


class FlatPartition(Partition):
    """Of stages 1 and 2: all parameters of a group in a row, cut into as many parts as ranks."""

    @property
    def flats(self) -> Sequence[Tensor]:
        """Those of this rank, that the optimizer works on."""
        flats: list[Tensor] = self._zero.single_partition_of_fp32_groups
        return flats

    def _places(self, names: dict[nn.Parameter, str]) -> Iterator[_Place]:
        for flat, group in enumerate(self._zero.bit16_groups):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    at = mapping.hp_fragment_address
                    key = self._zero.get_param_id(parameter)
                    yield _Place(names[parameter], key, flat, at.start, at.numel)

    @property
    def _is_offloaded(self) -> bool:
        return bool(self._zero.cpu_offload)

    def _fill(self, missing: Sequence[tuple[_Place, Tensor]]) -> None:
        norms = self._zero.norm_for_param_grads
        self._zero._offload_accumulated_param_ids.difference_update(norms)
        self._zero.finalize_gradient_accumulation_boundary()
        self._zero._wait_for_offload_copies()
        for place, own in missing:
            if place.key not in norms:
                own.zero_()

    def _found(self) -> list[Tensor]:
        if self._is_offloaded:  # the device may still be copying them to the host
            self._zero._wait_for_offload_copies()
        return super()._found()

    def _forget(self) -> None:
        self._zero.micro_step_id = -1  # as after an update; it counts where gradients are offloaded
        if self._is_offloaded:  # a parameter that the first microbatch does not use would add to it
            for added_up in self._zero.accumulated_grads_in_cpu.values():
                added_up.zero_()
            self._zero._offload_accumulated_param_ids.clear()

    def _spread(self) -> None:
        self._zero.update_lp_params()


class ParameterPartition(Partition):
    """Of stage 3: each parameter is cut by itself."""

    @property
    def flats(self) -> Sequence[Tensor]:
        """Those of this rank, that the optimizer works on."""
        flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return flats

    def _places(self, names: dict[nn.Parameter, str]) -> Iterator[_Place]:
        for flat, group in enumerate(self._zero.fp16_groups):
            start = 0
            for parameter in group:
                key, numel = self._zero.get_param_id(parameter), parameter.ds_tensor.ds_numel
                yield _Place(names[parameter], key, flat, start, numel)
                start += numel

    @property
    def _is_offloaded(self) -> bool:
        return bool(self._zero.offload_optimizer)

    def _forget(self) -> None:
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()  # else of parameters that are not used now

    def _fill(self, missing: Sequence[tuple[_Place, Tensor]]) -> None:
        sums = self._zero.grad_partitions_flat_buffer
        starts = list(accumulate(self.flat_sizes, initial=0))
        for place, own in missing:
            own.copy_(sums.narrow(0, starts[place.flat] + place.start, place.numel))
            self._zero.norm_for_param_grads[place.key] = own.norm()

    def _tell_norms(self) -> None:
        super()._tell_norms()
        self._forget_raw()

    def _zeros(self) -> list[Tensor]:
        self._forget_raw()
        return super()._zeros()

    def _forget_raw(self) -> None:
        """What backward passes have left, in which float16 looks for an overflow once more."""
        if self._zero.dtype == torch.float16:
            self._zero.grad_partitions_flat_buffer.zero_()

    def _spread(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()  # those that are whole now would stay as they are
        for flat in range(len(self.flats)):
            with self.present(flat):
                zero._reassign_or_swap_out_partitioned_parameters(flat)
        if zero.persistent_parameters:  # those that are small stay whole on every rank
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


class SwappedPartition(ParameterPartition):
    """Of stage 3 with the optimizer's state and float32 parameters in files between steps.

    A sub-group that is large enough for that is read for its update alone, and its flat tensor is
    empty otherwise. Gradients are in memory, too: all of them in the order of the flat tensors.
    """

    in_memory = False

    def __init__(self, optimizer: Any, names: dict[nn.Parameter, str]) -> None:
        self._gradients_of: dict[int, Tensor] = {}
        super().__init__(optimizer, names)
        # It would write gradients to files, too, which nobody reads: they come from memory.
        optimizer._swap_out_offload_fp32_gradients = lambda *_: None

    @property
    def flat_sizes(self) -> list[int]:
        """How many elements the flat tensors have in memory, where they are for their update."""
        sizes: list[int] = self._zero.fp16_partitioned_groups_flat_numel
        return sizes

    def _is_swapped(self, flat: int) -> bool:
        return bool(self._zero._swappable_optimizer_subgroup(flat))

    def _between_steps(self, place: _Place) -> Tensor:
        if not self._is_swapped(place.flat):
            return self._part(place)
        # It has a shape and gets a gradient; who reads it sees that it has no value.
        return torch.tensor(float("nan")).expand(place.numel)

    @contextmanager
    def present(self, flat: int, *, written: bool = False) -> Iterator[list[Tensor]]:
        """As everywhere; if they are to be written, there is no state yet."""
        if not self._is_swapped(flat):
            with super().present(flat) as parts:
                yield parts
            return
        if written:
            info = self._info(flat)
            del info.tensors[1:]  # those of the state
            info.has_state_tensors = False
            self._zero.optimizer.state[self.flats[flat]].clear()
        self._zero._optimizer_states_and_gradient_swap_in(flat)
        with super().present(flat) as parts:
            yield parts
        if written:
            self._zero._optimizer_states_and_gradient_swap_out(flat)
        else:
            self._zero._release_swap_buffers(flat)

    def _info(self, flat: int) -> Any:
        """What is in which files."""
        tensor: Any = self.flats[flat]
        return self._zero.optimizer_swapper.swap_params_info[tensor.ds_id]

    def _gradients(self, flat: int) -> Callable[[_Place], Tensor]:
        if not self._is_swapped(flat):
            return super()._gradients(flat)
        sizes = self.flat_sizes
        kept = self._zero.grad_partitions_flat_buffer.narrow(0, sum(sizes[:flat]), sizes[flat])
        whole = self._gradients_of[flat] = kept.float()
        return lambda place: whole.narrow(0, place.start, place.numel)

    def give_gradients(self) -> bool:
        """As everywhere; they are in memory, from which DeepSpeed takes them for each update."""
        if not super().give_gradients():
            return False
        for flat, whole in self._gradients_of.items():
            self._info(flat).unswapped_gradients = {0: whole}
        self._gradients_of = {}
        return True


def free_buffers(model: nn.Module) -> None:
    """Let go of the page-locked memory through which parameters in files went."""
    divided: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    for swapper in {p.nvme_swapper for p in divided} - {None}:
        swapper.aio_read_handle.free_cpu_locked_tensor(swapper.buffers)
        if swapper.partitioned_swap_buffer is not None:
            swapper.aio_write_handle.free_cpu_locked_tensor(swapper.partitioned_swap_buffer)


def partition_of(engine: Any, names: dict[nn.Parameter, str]) -> Partition:
    """The parts that an engine has on this rank."""
    if engine.zero_optimization_stage() < 3:
        return FlatPartition(engine.optimizer, names)
    kind = SwappedPartition if engine.optimizer.swap_optimizer else ParameterPartition
    return kind(engine.optimizer, names)
