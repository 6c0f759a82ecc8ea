"""What LARS and LAMB have in common: updates that depend on norms of whole tensors."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["Adapt", "LayerwiseOptimizer", "Piece", "SumSquares", "needs_whole_tensors"]

Adapt = Literal["matrices", "decayed", "all"]
SumSquares = Callable[[Tensor], None]

_OF_WHOLE_TENSORS = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon)
_CACHED = 2**18  # numbers of a tensor that a core's caches hold with its gradient and state


class Piece(NamedTuple):
    """Tensors of one parameter group, or stretches of them, that are updated by the same calls."""

    group: dict[str, Any]
    step: int
    """Of these tensors, this one included."""
    owners: list[int]
    """For each tensor, which parameter of the optimizer it belongs to."""
    adapted: bool
    """Whether norms scale their updates."""
    parameters: list[Tensor]
    gradients: list[Tensor]
    state: list[list[Tensor]]
    """For each name of the state, a list as long as the parameters'."""
    is_stretch: bool = False
    """Whether there is one tensor, which may be a part of one; else foreach takes them."""


class LayerwiseOptimizer(Optimizer):
    """Scales the update of each tensor by norms of that tensor as a whole.

    Norms are taken in float32 at least. Of a parameter that `fully_shard` has divided (a `DTensor`)
    the squares of the shards' norms are added up over the ranks, of all tensors in one all-reduce.
    ``sum_shards`` does the same for plain tensors that are shards.

    On a CPU tensors are taken through all operations some 100,000 numbers at a time, which stay
    in a core's cache meanwhile; on other devices all tensors together, by torch's foreach kernels,
    with one synchronisation in a step for each parameter group.

    Args:
        params: parameters, or (name, parameter) pairs, or groups.
        defaults: of groups; ``"adapt"`` and ``"weight_decay"`` are among them.
        foreach: True: all tensors together, on any device; False: one stretch after another.
    """

    state_names: tuple[str, ...] = ()

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], foreach: bool | None
    ) -> None:
        if defaults["adapt"] not in ("matrices", "decayed", "all"):
            raise ConfigError(
                f"adapt is {defaults['adapt']!r}; it is 'matrices' (tensors of two dims or more), "
                "'decayed' (those with weight decay) or 'all'"
            )
        self._foreach = foreach
        self._sum_shards: SumSquares | None = None
        self._sums = False  # in this step
        super().__init__(params, defaults)

    def sum_shards(self, sum_squares: SumSquares) -> None:
        """The parameters are shards of tensors.

        Args:
            sum_squares: adds a tensor up, in place, over the ranks that have the others; every
                step calls it once on each of them.
        """
        self._sum_shards = sum_squares

    @property
    def is_sharded(self) -> bool:
        """Whether norms are added up over ranks."""
        return self._sum_shards is not None or any(map(_is_divided, self._all()))

    @property
    def couples_tensors(self) -> bool:
        """Whether a step has to be made of all gradients at once."""
        return self.is_sharded

    def _all(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Use the gradients in ``.grad``; a parameter without one is left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sums = self.is_sharded
        everything = self._begin()
        self._before(everything)
        batches = [cut for piece in everything for cut in self._cut(piece)]
        if self._sums:  # all norms come in one all-reduce
            batches = [[piece for batch in batches for piece in batch]]
        for batch in batches:
            self._update(batch)
        return loss

    def _before(self, pieces: Sequence[Piece]) -> None:
        """A step begins."""

    @abstractmethod
    def _update(self, pieces: Sequence[Piece]) -> None:
        """Update some tensors, each of which is in these pieces as a whole."""

    def _begin(self) -> list[Piece]:
        """Count the step, and put tensors together that have the same settings."""
        together: dict[tuple[Any, ...], Piece] = {}
        index = -1
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                index += 1
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ConfigError(
                        f"{type(self).__name__} takes no sparse gradients; make the embedding with "
                        "sparse=False"
                    )
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    for name in self.state_names:
                        state[name] = torch.zeros_like(
                            parameter, memory_format=torch.preserve_format
                        )
                state["step"] += 1
                tensors = [parameter, parameter.grad, *(state[name] for name in self.state_names)]
                p, g, *rest = map(_local, tensors)
                adapted = _is_adapted(p, group)
                same = (number, state["step"], adapted, p.device, p.dtype)
                if same not in together:
                    empty: list[list[Tensor]] = [[] for _ in rest]
                    together[same] = Piece(group, state["step"], [], adapted, [], [], empty)
                piece = together[same]
                piece.owners.append(index)
                piece.parameters.append(p)
                piece.gradients.append(g)
                for values, value in zip(piece.state, rest, strict=True):
                    values.append(value)
        return list(together.values())

    def _cut(self, piece: Piece) -> list[list[Piece]]:
        """Pieces that are updated before the next are begun: tensors are still in a cache then."""
        foreach = self._foreach
        if foreach or (foreach is None and piece.parameters[0].device.type != "cpu"):
            return [[piece]]
        batches: list[list[Piece]] = []
        few: list[int] = []
        numbers = 0
        for i, parameter in enumerate(piece.parameters):
            n = parameter.numel()
            if n > _CACHED or foreach is not None:
                batches.append(_stretches(piece, i))
                continue
            if few and numbers + n > _CACHED:
                batches.append([_some(piece, few)])
                few, numbers = [], 0
            few.append(i)
            numbers += n
        return [*batches, [_some(piece, few)]] if few else batches

    def _norms(
        self, pieces: Sequence[Piece], tensors_of: Callable[[int], Sequence[Sequence[Tensor]]]
    ) -> list[dict[int, float]]:
        """2-norms of whole tensors, by parameter, of each list that ``tensors_of`` gives.

        Args:
            pieces: that have the tensors.
            tensors_of: of the piece with that number, at most two lists as long as its own.
        """
        places: list[tuple[int, int]] = []
        found: list[Tensor] = []
        for i, piece in enumerate(pieces):
            for which, tensors in enumerate(tensors_of(i)):
                places += [(which, owner) for owner in piece.owners]
                found += _norms_of(tensors)
        squares: list[dict[int, float]] = [defaultdict(float), defaultdict(float)]
        values = torch.stack(found).tolist() if found else []
        for (which, owner), value in zip(places, values, strict=True):
            squares[which][owner] += value * value
        if self._sums:
            squares = self._summed(squares)
        return [{owner: math.sqrt(value) for owner, value in some.items()} for some in squares]

    def _summed(self, squares: list[dict[int, float]]) -> list[dict[int, float]]:
        """Over all ranks, in one all-reduce of as many numbers on each, whatever it has found."""
        everything = list(self._all())
        rows = [[some.get(i, 0.0) for i in range(len(everything))] for some in squares]
        sums = torch.tensor(rows, dtype=torch.float64)
        if self._sum_shards is not None:
            self._sum_shards(sums)
        else:
            _sum_dtensors(sums, everything)
        return [dict(enumerate(row)) for row in sums.tolist()]


def needs_whole_tensors(optimizer: Optimizer) -> bool:
    """Whether its update of a number depends on others of the same tensor."""
    return isinstance(optimizer, (*_OF_WHOLE_TENSORS, LayerwiseOptimizer))


def _is_adapted(parameter: Tensor, group: dict[str, Any]) -> bool:
    if group["adapt"] == "matrices":
        return parameter.dim() > 1
    return bool(group["adapt"] == "all" or group["weight_decay"])


def _is_divided(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether it is a DTensor; who has one has imported them, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _local(tensor: Tensor) -> Tensor:
    if not _is_divided(tensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


def _sum_dtensors(squares: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Those that are divided alike together; usually all of them are.

    Args:
        squares: a column for each parameter; changed.
        parameters: of which some are DTensors.
    """
    divided: dict[Any, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        if _is_divided(parameter):
            for dim, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    divided[parameter.device_mesh.get_group(dim)].append(index)
    for group, indices in divided.items():
        part = squares[:, indices].to(_local(parameters[indices[0]]).device)
        dist.all_reduce(part, group=group)
        squares[:, indices] = part.cpu()


def _norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    if all(_has_fast_dot(tensor) for tensor in tensors):
        return [torch.dot(flat, flat).sqrt() for flat in (t.view(-1) for t in tensors)]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return list(torch._foreach_norm(list(tensors), 2.0, dtype))


def _has_fast_dot(tensor: Tensor) -> bool:
    """Where the matrix library multiplies in 0.6 of the time that torch's norm takes."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _stretches(piece: Piece, index: int) -> list[Piece]:
    """One tensor of a piece, in parts that fit into a cache with all that they need."""
    owner, parameter = piece.owners[index], piece.parameters[index]
    tensors = [parameter, piece.gradients[index], *(values[index] for values in piece.state)]
    cut = [[tensor] for tensor in tensors]
    if parameter.numel() > _CACHED and all(tensor.is_contiguous() for tensor in tensors):
        n = math.ceil(parameter.numel() / _CACHED)
        cut = [list(tensor.view(-1).tensor_split(n)) for tensor in tensors]
    return [
        Piece(piece.group, piece.step, [owner], piece.adapted, [p], [g], [[s] for s in state], True)
        for p, g, *state in zip(*cut, strict=True)
    ]


def _some(piece: Piece, indices: Sequence[int]) -> Piece:
    return piece._replace(
        owners=[piece.owners[i] for i in indices],
        parameters=[piece.parameters[i] for i in indices],
        gradients=[piece.gradients[i] for i in indices],
        state=[[values[i] for i in indices] for values in piece.state],
    )
