"""What all compressing groups have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Group, Handle, ReduceOp
from scaledtrain.comm.reduction import total_weight
from scaledtrain.errors import ConfigError

__all__ = ["CompressedGroup", "Later", "PlainGroup"]


class Later:
    """A handle whose ``wait`` does what is left, once; an error stays."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Do it."""
        finish, self._finish = self._finish, None
        if finish is not None:
            try:
                finish()
            except BaseException as error:
                self._error = error
        if self._error is not None:
            raise self._error


class CompressedGroup(ABC):
    """A `Group` whose sums and means of one list of tensors are taken of fewer bytes.

    It belongs to one list of tensors (a bucket of gradients, a fragment of parameters), since what
    a compression remembers of the last call is about them: make one for each with `compressed`. All
    other calls (``"max"``, whole numbers, broadcasts) go to the group below as they are.

    Args:
        group: what moves the bytes.
        like: tensors like those that will be reduced.
    """

    def __init__(self, group: Group, like: Sequence[Tensor]) -> None:
        self._group = group
        self._shapes = [tuple(t.shape) for t in like]

    @property
    def rank(self) -> int:
        """Of the group below."""
        return self._group.rank

    @property
    def size(self) -> int:
        """Of the group below."""
        return self._group.size

    @property
    def overlaps(self) -> bool:
        """False where the exchange has more than one part: ``wait`` then does all of it."""
        return False

    @property
    def bytes_sent(self) -> int:
        """Of the group below, which counts what is sent instead of the tensors."""
        return self._group.bytes_sent

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        """Begin to replace every tensor by about its reduction, the same values on every rank.

        Handles must be waited for in the same order on every rank.

        Raises:
            ConfigError: floating tensors of other shapes than this group was made for.
        """
        if op == "max" or not all(t.is_floating_point() for t in tensors):
            return self._group.all_reduce(tensors, op, weight)
        shapes = [tuple(t.shape) for t in tensors]
        if shapes != self._shapes:
            raise ConfigError(
                f"this compressed group was made for tensors of shapes {self._shapes}, but got "
                f"{shapes}; what it remembers belongs to its tensors: make one for each list of "
                "tensors with compressed(group, compression, tensors)"
            )
        return self._reduce([t.detach() for t in tensors], op, weight)

    @abstractmethod
    def _reduce(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> Handle:
        """``all_reduce`` for ``"sum"`` and ``"mean"`` of the tensors this group is made for."""

    def _relative_weights(self, op: ReduceOp, weight: float, device: torch.device) -> list[float]:
        """By rank, so that their mean is 1: what a gradient counts in ``size`` times the mean.

        What is kept of a gradient is kept with that factor, so that it counts as much when it is
        sent, whatever the weights of that step are. A sum has no weights. Collective.
        """
        if op == "sum":
            return [1.0] * self.size
        own = torch.tensor([weight], dtype=torch.float64, device=device)
        weights = [float(theirs.item()) for (theirs,) in self._group.all_gather([own])]
        total = total_weight(weights)
        return [w * self.size / total for w in weights]

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Exactly, as the group below."""
        self._group.broadcast(tensors, src)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Exactly, as the group below."""
        return self._group.all_gather(tensors)

    def confirm(self) -> None:  # noqa: B027 - there may be nothing to remember
        """The last reduction is used: give up the memory that ``undo`` would need."""

    def undo(self) -> None:  # noqa: B027
        """The last reduction is used on no rank: remember what was remembered before it."""

    def state_dict(self) -> list[dict[str, Tensor]]:
        """A copy of what this rank remembers, a dictionary for each tensor."""
        return [{} for _ in self._shapes]

    def load_state_dict(  # noqa: B027 - there may be nothing to remember
        self, state: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Restore what ``state_dict`` returned; empty dictionaries: begin anew."""


class PlainGroup(CompressedGroup):
    """No compression."""

    @property
    def overlaps(self) -> bool:
        """As the group below."""
        return self._group.overlaps

    def _reduce(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> Handle:
        return self._group.all_reduce(tensors, op, weight)
