"""What ZeRO gives this rank of a model: pieces of the float32 parameters, and of their gradients.

DeepSpeed has no public way to them for all stages, so this is the one file that knows its insides
(0.19): stages 1 and 2 keep one flat tensor for each parameter group, stage 3 for each sub-group.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FlatPartition", "ParameterPartition", "Partition", "gathered", "partition_of"]


class _Place(NamedTuple):
    """Where a parameter's part is in the flat tensors of this rank."""

    name: str
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
    """

    def __init__(self, optimizer: Any, names: dict[nn.Parameter, str]) -> None:
        self._zero = optimizer
        places = list(self._places(names))
        parts = [self.flats[p.flat].detach().narrow(0, p.start, p.numel) for p in places]
        self._all_places = places
        self.named_parameters = [
            (place.name, nn.Parameter(part)) for place, part in zip(places, parts, strict=True)
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
        parts = [part for _, part in self.named_parameters]
        if scale == 1.0:
            return parts, [g.to(p.dtype) for g, p in zip(self._own, parts, strict=True)]
        return parts, [g.to(p.dtype) / scale for g, p in zip(self._own, parts, strict=True)]

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
        self._own = []
        return True

    def _zeros(self) -> list[Tensor]:
        """In place of what no backward pass has left."""
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
                    yield _Place(names[parameter], flat, at.start, at.numel)

    @property
    def _is_offloaded(self) -> bool:
        return bool(self._zero.cpu_offload)

    def _forget(self) -> None:
        self._zero.micro_step_id = -1  # as after an update; it counts where gradients are offloaded

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
                numel = parameter.ds_tensor.ds_numel
                yield _Place(names[parameter], flat, start, numel)
                start += numel

    @property
    def _is_offloaded(self) -> bool:
        return bool(self._zero.offload_optimizer)

    def _forget(self) -> None:
        self._zero.zero_grad()

    def _spread(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()  # those that are whole now would stay as they are
        for flat in range(len(self.flats)):
            zero._reassign_or_swap_out_partitioned_parameters(flat)
        if zero.persistent_parameters:  # those that are small stay whole on every rank
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def gathered(model: nn.Module, writer: int | None = None) -> AbstractContextManager[Any]:
    """Inside, the model's parameters are whole on all ranks, as they are anyway below stage 3.

    Args:
        model: that an engine has.
        writer: which of the ranks writes into them; None: nobody.
    """
    divided = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not divided:
        return nullcontext()
    zero = importlib.import_module("deepspeed").zero
    found: AbstractContextManager[Any] = zero.GatheredParameters(divided, writer)
    return found


def partition_of(engine: Any, names: dict[nn.Parameter, str]) -> Partition:
    """The parts that an engine has on this rank."""
    kind = ParameterPartition if engine.zero_optimization_stage() == 3 else FlatPartition
    return kind(engine.optimizer, names)
