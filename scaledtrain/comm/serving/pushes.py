"""How every store of a server's worker pushes: the gradient is judged first, then handed over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Group
from scaledtrain.timeline import Timeline

__all__ = ["Pushes"]


class Pushes(ABC):
    """What the stores have in common.

    Where several ranks have pieces of a worker's replica, each has a store for its piece, and they
    push together: all of them look at their own part, agree whether any of these is unusable, and
    if none is, all but the first rank send theirs before the first says that there is a push. So it
    is accepted or rejected whole.

    Args:
        timeline: where the time is recorded.
        pieces: the ranks that have pieces of this worker's replica.
    """

    def __init__(self, timeline: Timeline, pieces: Group) -> None:
        self._timeline = timeline
        self._pieces = pieces

    def push(self, update: Sequence[Tensor], version: int, speed: float = 0.0) -> None:
        """Hand over a gradient, or say why it is none; does not wait for the server to use it."""
        with self._communicating():
            fault = self._judge(update)
        fault = self._agree(fault)
        if fault is None:
            with self._communicating():
                self._stage()
            self._agree(None)  # all parts are there
        with self._communicating():
            if fault is None:
                self._hand_over(version, speed)
            else:
                self._reject(version, fault)

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        start = self._timeline.now()
        yield
        self._timeline.add("communication", start)

    def _agree(self, fault: int | None) -> int | None:
        """A fault that one of the pieces has."""
        if self._pieces.size == 1:
            return fault
        worst = torch.tensor([-1 if fault is None else fault])
        self._pieces.all_reduce([worst], "max").wait()
        return None if worst.item() < 0 else int(worst.item())

    @abstractmethod
    def _judge(self, update: Sequence[Tensor]) -> int | None:
        """Keep the update for what follows; returns which of `FAULTS` it has."""

    @abstractmethod
    def _stage(self) -> None:
        """Send what the other shards get, which keep it until the first has decided."""

    @abstractmethod
    def _hand_over(self, version: int, speed: float) -> None:
        """Send what the first shard gets, for it to decide."""

    @abstractmethod
    def _reject(self, version: int, fault: int) -> None:
        """Tell the first shard of an update that is of no use."""
