"""What messages and collectives cost: queues in front of links, and the alpha-beta model.

A message goes through queues, which it shares with all other messages: a host's network card is
one for each direction, and that is why a server of many workers is slow, and shards help. A
collective costs what a formula says.

Left out: lost packets and their repetition, TCP's slow start and its fairness between connections
(a queue serves whole messages in the order of their arrival), headers, the CPU time of sending and
receiving (put it into a link's latency), switches that are too slow for their ports, and
the way from a device to its host's network card. Collectives and messages do not slow each other
down, nor do two collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scaledtrain.sim.topology import Nic, Topology, Wire

__all__ = ["Network", "Queue", "bottleneck", "seconds_alone"]


class Queue:
    """One direction of a link: it sends whole messages, one after another, as they come.

    Args:
        wire: its bandwidth and latency.
    """

    __slots__ = ("bytes_per_second", "free_at", "latency_seconds")

    def __init__(self, wire: Wire) -> None:
        self.bytes_per_second = wire.bandwidth
        self.latency_seconds = wire.latency_seconds
        self.free_at = 0.0
        """When it has sent all that has entered so far."""

    def enter(self, now: float, n_bytes: float) -> tuple[float, float]:
        """A message comes to its end; call this in the order of time.

        ::

            start = max(now, free)     free = start + n_bytes / bandwidth
            head = start + latency     tail = free + latency

        Args:
            now: seconds, on any clock.
            n_bytes: of the message.

        Returns:
            When its first byte comes out at the other side, where the next queue may begin to take
            it (cut-through: it does not wait for the rest), and when its last byte does.
        """
        start = now if now > self.free_at else self.free_at  # noqa: FURB136 - max is slower
        self.free_at = start + n_bytes / self.bytes_per_second
        return start + self.latency_seconds, self.free_at + self.latency_seconds


def bottleneck(path: Sequence[Queue]) -> Queue:
    """The queue of a path that a message spends most time in; the first, if several do.

    Args:
        path: the queues that a message goes through; not empty.
    """
    return min(path, key=lambda queue: queue.bytes_per_second)


def seconds_alone(path: Sequence[Queue], n_bytes: float) -> float:
    """What a message takes on a path where nothing else is under way.

    Sum of the latencies + n_bytes / the least bandwidth; 0 on the empty path.

    Args:
        path: the queues that a message goes through.
        n_bytes: of the message.
    """
    if not path:
        return 0.0
    latency = sum(queue.latency_seconds for queue in path)
    return latency + n_bytes / bottleneck(path).bytes_per_second


@dataclass(frozen=True)
class _Neighbours:
    """What ranks that send to their neighbours see of the network."""

    bandwidth: float  # bytes per second, of the slowest link between two of them
    latency: float  # seconds, of the longest way between two of them


class Network:
    r"""The queues of a topology's links, and the cost of its collectives, for a number of ranks.

    A message from one rank to another enters the queues of `path` one after another: the first
    when it is sent, each other one when its head comes out of the one before. It has arrived when
    its tail has come out of the last queue, and not before each earlier queue's tail plus the
    latencies after it. Queues are made when they are first needed: hosts that do not send cost
    nothing.

    A collective of n ranks, in the order of their numbers (so that a ring enters and leaves each
    host and site once), takes as long as its slowest link, of bandwidth w, and its longest way, of
    latency a, let it. With B the bytes of one rank's tensors and d = ceil(log2 n)::

        all-reduce   ring   2 (n-1)/n B / w + 2 (n-1) a
                     tree   2 B / w         + 2 d a      two binary trees, each for half the bytes
        all-gather   ring   (n-1) B / w     + (n-1) a
                     tree   (n-1) B / w     + d a        recursive doubling
        broadcast    ring   B / w           + (n-1) a    a chain, in small pieces
                     tree   B / w           + d a        two binary trees, in small pieces

    One rank costs 0. Left out: the time in which the pieces fill a chain or a tree; algorithms that
    first reduce inside each host, or site, and so take fewer long ways.

    Args:
        topology: hosts, sites, and their links.
        n_ranks: that are to be placed.

    Raises:
        ConfigError: the topology has no room for so many.

    References:
        Thakur et al. 2005, Optimization of Collective Communication Operations in MPICH;
        Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce Algorithms for Clusters of
        Workstations; Sanders et al. 2009, Two-Tree Algorithms for Full Bandwidth Broadcast,
        Reduction and Scan.

    Example:
        Two messages of 125 MB from two hosts into a third, over 1 Gb/s and 1 ms: the second waits
        for the first in front of the third host's card.

        >>> from scaledtrain.sim.topology import Nic, Wire
        >>> card = Nic(Wire(latency_seconds=0.001, gigabits_per_second=1.0))
        >>> network = Network(Topology(nic=card), n_ranks=3)
        >>> for source in (0, 1):
        ...     egress, ingress = network.path(source, 2)
        ...     head, _ = egress.enter(0.0, 125e6)
        ...     print(ingress.enter(head, 125e6)[1])
        1.001
        2.001
        >>> round(network.all_reduce_seconds(125e6, range(3)), 4)  # 2 * 2/3 * 1 s + 4 * 1 ms
        1.3373
    """

    def __init__(self, topology: Topology, n_ranks: int) -> None:
        self.topology = topology
        self._placement = topology.placement(n_ranks)
        self._queues: dict[tuple[str, int], Queue] = {}
        self._neighbours: dict[tuple[int, ...], _Neighbours] = {}

    def path(self, src_rank: int, dst_rank: int) -> list[Queue]:
        """The queues between two ranks, the first first.

        None within a rank; on one host the sender's port and the receiver's; between hosts the
        network cards of both, and between sites the uplinks of both in the middle.
        """
        queues = self._queues
        path = []
        for name, index, wire in self._way(src_rank, dst_rank):
            queue = queues.get((name, index))
            if queue is None:
                queue = queues[name, index] = Queue(wire)
            path.append(queue)
        return path

    def _way(self, src: int, dst: int) -> list[tuple[str, int, Wire]]:
        """Each link between two ranks: its name, whose it is, and what it can do."""
        if src == dst:
            return []
        topology = self.topology
        (host, site), (to_host, to_site) = self._placement.of(src), self._placement.of(dst)
        if host == to_host:
            port = topology.port
            assert port is not None
            return [("port out", src, port), ("port in", dst, port.without_latency)]
        egress = ("egress", host, self._nic(host).egress)
        ingress = ("ingress", to_host, self._nic(to_host).into)
        if site == to_site:
            return [egress, ingress]
        uplink = topology.uplink
        assert uplink is not None
        up, down = ("up", site, uplink), ("down", to_site, uplink.without_latency)
        return [egress, up, down, ingress]

    def _nic(self, host: int) -> Nic:
        nic = self.topology.nics.get(host, self.topology.nic)
        assert nic is not None
        return nic

    def all_reduce_seconds(self, n_bytes: float, ranks: Sequence[int]) -> float:
        """What an all-reduce of so many bytes takes, from the arrival of the last rank."""
        n, links = len(ranks), self._between(ranks)
        ring = _Cost(2 * (n - 1) / n * n_bytes, 2 * (n - 1))
        return self._cheaper(links, ring, _Cost(2 * n_bytes, 2 * _depth(n)))

    def all_gather_seconds(self, n_bytes: float, ranks: Sequence[int]) -> float:
        """What it takes to give every rank everybody's tensors, of so many bytes on each."""
        n, links = len(ranks), self._between(ranks)
        everything = (n - 1) * n_bytes
        return self._cheaper(links, _Cost(everything, n - 1), _Cost(everything, _depth(n)))

    def broadcast_seconds(self, n_bytes: float, ranks: Sequence[int]) -> float:
        """What it takes to give every rank the tensors of one, of so many bytes in all."""
        n, links = len(ranks), self._between(ranks)
        return self._cheaper(links, _Cost(n_bytes, n - 1), _Cost(n_bytes, _depth(n)))

    def _cheaper(self, links: _Neighbours | None, ring: _Cost, tree: _Cost) -> float:
        if links is None:
            return 0.0
        costs = {"ring": [ring], "tree": [tree], "auto": [ring, tree]}[self.topology.algorithm]
        return min(c.n_bytes / links.bandwidth + c.n_messages * links.latency for c in costs)

    def _between(self, ranks: Sequence[int]) -> _Neighbours | None:
        """None for a rank alone, which has no neighbours."""
        if len(ranks) == 1:
            return None
        group = tuple(ranks)
        if group not in self._neighbours:
            ring = sorted(group)
            ways = [self._way(a, b) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
            self._neighbours[group] = _Neighbours(
                min(wire.bandwidth for way in ways for _, _, wire in way),
                max(sum(wire.latency_seconds for _, _, wire in way) for way in ways),
            )
        return self._neighbours[group]


class _Cost(NamedTuple):
    n_bytes: float  # that go through the slowest link
    n_messages: int  # one after another, each with the latency of the longest way


def _depth(n: int) -> int:
    """Of a binary tree: ceil(log2 n), exactly."""
    return (n - 1).bit_length()
