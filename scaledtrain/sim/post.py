"""Messages between two ranks in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from scaledtrain.sim.network import Network, Queue
from scaledtrain.sim.world import World

__all__ = ["Post", "Route"]

Route = Sequence[tuple[Queue, float]]
"""The queues between two ranks, each with the latencies after it."""


class Post:
    """Carries messages through the queues of a network.

    Args:
        world: whose time passes meanwhile.
        network: has the queues.
    """

    def __init__(self, world: World, network: Network) -> None:
        self._world = world
        self._network = network

    def route(self, src: int, dst: int) -> Route:
        """The way between two ranks; empty within one."""
        path = self._network.path(src, dst)
        latencies = [queue.latency_seconds for queue in reversed(path)]
        after = list(accumulate(latencies, initial=0.0))[:-1]
        return list(zip(path, reversed(after), strict=True))

    def send(
        self,
        route: Route,
        n_bytes: float,
        order: int,
        arrived: Callable[[], object],
        last_is_own: bool = False,
    ) -> None:
        """Send a message; nobody waits for it.

        Args:
            route: its way.
            n_bytes: of it.
            order: of what happens at the same moment, the lower is first: a rank.
            arrived: done when it has come whole; at once, if it stays within a rank.
            last_is_own: nobody else sends into the last queue, so that its place there is known
                beforehand, which saves an event.
        """
        if route:
            self._hop(route, 0, n_bytes, 0.0, order, arrived, len(route) - last_is_own)
        else:
            arrived()

    def _hop(
        self,
        route: Route,
        index: int,
        n_bytes: float,
        latest: float,
        order: int,
        arrived: Callable[[], object],
        shared: int,
    ) -> None:
        """Its head is in front of a queue."""
        world = self._world
        head = world.now
        while True:
            queue, after = route[index]
            head, tail = queue.enter(head, n_bytes)
            if tail + after > latest:
                latest = tail + after
            index += 1
            if index == len(route):
                world.at(latest, order, arrived)
                return
            if index < shared and head > world.now:
                break
        world.at(
            head,
            order,
            lambda: self._hop(route, index, n_bytes, latest, order, arrived, shared),
        )
