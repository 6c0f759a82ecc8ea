"""Conditions on which simulated ranks wait: what ``threading.Condition`` is to threads."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from scaledtrain.sim.world import Rank, World

__all__ = ["VirtualCondition"]


class VirtualCondition:
    """Where ranks wait until something is true; there is no lock, since one runs at a time.

    Args:
        world: whose ranks wait.
        what: that they wait for, for messages.
    """

    def __init__(self, world: World, what: str) -> None:
        self._world = world
        self._what = what
        self._waiting: list[tuple[Rank, Callable[[], bool]]] = []

    def __enter__(self) -> bool:
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        pass

    def acquire(self) -> bool:
        """Nobody has to be kept out."""
        return True

    def release(self) -> None:
        """Nobody was kept out."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Return when it is true; a cluster whose ranks all wait is found by the world."""
        while not predicate():
            me = self._world.running
            self._waiting.append((me, predicate))
            me.wait(self._what)
        return True

    def notify_all(self) -> None:
        """Those for whom it is true now go on."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for rank, predicate in waiting:
            if predicate():
                rank.wake()
            else:
                self._waiting.append((rank, predicate))
