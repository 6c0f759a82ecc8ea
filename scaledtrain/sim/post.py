"""Messages between two ranks in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scaledtrain.sim.network import Network, Queue
from scaledtrain.sim.world import World

__all__ = ["Post"]


class Post:
    """Carries messages through the queues of a network.

    Args:
        world: whose time passes meanwhile.
        network: has the queues.
    """

    def __init__(self, world: World, network: Network) -> None:
        self._world = world
        self._network = network

    def send(self, src: int, dst: int, n_bytes: float, arrived: Callable[[], object]) -> None:
        """Send a message; nobody waits for it.

        Args:
            src: the rank that sends.
            dst: the rank that it is for.
            n_bytes: of it.
            arrived: done when it has come whole; at once, if it stays within a rank.
        """
        path = self._network.path(src, dst)
        if path:
            self._hop(path, n_bytes, 0.0, dst, arrived)
        else:
            arrived()

    def _hop(
        self,
        path: Sequence[Queue],
        n_bytes: float,
        latest: float,
        rank: int,
        arrived: Callable[[], object],
    ) -> None:
        """Its head is in front of the first queue."""
        world = self._world
        head, tail = path[0].enter(world.now, n_bytes)
        rest = path[1:]
        latest = max(latest, tail + sum(queue.latency_seconds for queue in rest))
        if rest:
            world.at(head, rank, lambda: self._hop(rest, n_bytes, latest, rank, arrived))
        else:
            world.at(latest, rank, arrived)
