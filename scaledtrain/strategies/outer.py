"""The outer step of DiLoCo, for one fragment of the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scaledtrain.comm.local import Done
from scaledtrain.comm.protocols import Group, Handle
from scaledtrain.errors import ConfigError
from scaledtrain.replica import MakeOptimizer, Updater
from scaledtrain.strategies.periodic import Fragment

__all__ = ["OuterUpdate", "split_by_bytes"]

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


class OuterUpdate:
    """An optimizer over a fragment's anchor; its gradient is how far the replicas came from there.

    The reduction of that gradient is begun in one call and used in another, so that the replica can
    train meanwhile.

    Args:
        fragment: with an anchor: that holds the outer parameters.
        names: of its parameters.
        make_optimizer: a factory, as the replica's.

    Raises:
        ConfigError: the factory makes no optimizer.
    """

    def __init__(
        self, fragment: Fragment, names: Sequence[str], make_optimizer: MakeOptimizer
    ) -> None:
        self._fragment = fragment
        self._outer = [nn.Parameter(a) for a in fragment.anchor]  # the same memory
        self._updater = Updater(list(zip(names, self._outer, strict=True)), make_optimizer)
        self._handle: Handle | None = None
        self._deltas: list[Tensor] = []

    @torch.no_grad()
    def begin(self, group: Group) -> None:
        """Begin to take the mean of anchor - parameters over the replicas."""
        fragment = self._fragment
        self._deltas = list(torch._foreach_sub(fragment.anchor, fragment.parameters))
        self._handle = fragment.reduce(group, self._deltas)
        fragment.restart()

    @torch.no_grad()
    def finish(self, mixing: float) -> None:
        """Wait for it, and move anchor and parameters; nothing, if no reduction is under way.

        Args:
            mixing: the share of the parameters that stays this replica's own; 0: none.
        """
        if self._handle is None:
            return
        self._handle.wait()
        for outer, delta in zip(self._outer, self._deltas, strict=True):
            outer.grad = delta
        self._updater.step()
        for outer in self._outer:
            outer.grad = None
        anchor, parameters = self._fragment.anchor, self._fragment.parameters
        if mixing == 0.0:
            torch._foreach_copy_(parameters, anchor)
            self._fragment.apart = False
        else:
            torch._foreach_lerp_(parameters, anchor, 1.0 - mixing)
        self._handle, self._deltas = None, []

    def drop(self) -> None:
        """Wait for a reduction under way, and forget its result."""
        if self._handle is not None:
            self._handle.wait()
        self._handle, self._deltas = None, []

    def state_dict(self) -> dict[str, Any]:
        """A copy of the optimizer's state, and the result of a reduction under way: it waits."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = Done()
        deltas = [delta.clone() for delta in self._deltas]
        return {"updater": self._updater.state_dict(), "deltas": deltas}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._updater.load_state_dict(state["updater"])
        pairs = zip(state["deltas"], self._outer, strict=bool(state["deltas"]))
        self._deltas = [delta.to(outer, copy=True) for delta, outer in pairs]
        self._handle = Done() if self._deltas else None


def split_by_bytes(tensors: Sequence[AnyTensor], n: int) -> list[list[AnyTensor]]:
    """Cut a list of tensors into ``n`` parts, none of them empty, of about the same bytes.

    Each cut is where the bytes before it are closest to their share, as far as every part gets a
    tensor.

    Raises:
        ConfigError: there are fewer tensors than parts.

    Example:
        >>> tensors = [torch.zeros(size) for size in (5, 1, 1, 1, 4)]  # 12 elements: cut after 6
        >>> [[len(t) for t in part] for part in split_by_bytes(tensors, 2)]
        [[5, 1], [1, 1, 4]]
    """
    if n > len(tensors):
        raise ConfigError(
            f"fragments is {n}, but the model has only {len(tensors)} trainable tensors, and a "
            f"fragment holds whole ones; take at most {len(tensors)}"
        )
    before = [0, *accumulate(t.numel() * t.element_size() for t in tensors)]
    cuts = [0]
    for part in range(1, n):
        possible = range(cuts[-1] + 1, len(tensors) - (n - part) + 1)
        wanted = before[-1] * part / n
        cuts.append(min(possible, key=lambda cut: abs(before[cut] - wanted)))
    cuts.append(len(tensors))
    return [list(tensors[a:b]) for a, b in pairwise(cuts)]
