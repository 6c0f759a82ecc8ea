"""One rank's world in a virtual cluster: what `scaledtrain.connect` gives a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.local import AbsentGroup, Undivided
from scaledtrain.comm.protocols import Group, MakeServer, Peer, ServeOptions
from scaledtrain.comm.serving.event_log import EventLog
from scaledtrain.comm.serving.host import ServerHost
from scaledtrain.comm.serving.partition import Partition, Piece
from scaledtrain.errors import ClusterError, ConfigError, PeerLostError
from scaledtrain.schedule import Pace
from scaledtrain.sim.board import VirtualBoard, Words
from scaledtrain.sim.cluster import Cluster
from scaledtrain.sim.group import Collectives, VirtualGroup
from scaledtrain.sim.peers import Door, VirtualPeers
from scaledtrain.sim.post import Post
from scaledtrain.sim.store import VirtualServer, VirtualStore
from scaledtrain.sim.waiting import VirtualCondition
from scaledtrain.sim.world import Rank, World
from scaledtrain.timeline import Timeline

__all__ = ["Machines", "VirtualClock", "VirtualLink"]


class Machines:
    """What the links of all ranks have in common.

    Args:
        cluster: what everything costs.
        workers: ranks.
        seed: of the times that are drawn.
        own_generators: as `World` has it.
    """

    def __init__(self, cluster: Cluster, workers: int, seed: int, own_generators: bool) -> None:
        self.cluster = cluster
        self.seed = seed
        self.world = World(workers, own_generators)
        network = cluster.network(workers)
        self._placement = cluster.topology.placement(workers)
        self.alone_on_hosts = cluster.topology.ranks_per_host == 1
        self.post = Post(self.world, network)
        self.collectives = Collectives(self.world, network)
        self.attempts = [0] * workers
        self._made: dict[tuple[str, int], Any] = {}
        self._waiting: dict[tuple[str, int], list[Rank]] = {}
        self._servers: list[VirtualServer] = []
        self._boards: list[Words] = []
        self._doors: list[dict[int, Door]] = []

    def host_of(self, rank: int) -> int:
        """The host on which a rank is."""
        return self._placement.of(rank)[0]

    def once(self, what: str, number: int, make: Callable[[], Any]) -> Any:
        """What all ranks make together, for the n-th time: the first that comes makes it."""
        key = (what, number)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def give(self, what: str, number: int, made: Any) -> None:
        """One rank has made something for all."""
        self._made[what, number] = made
        for rank in self._waiting.pop((what, number), []):
            rank.wake()

    def take(self, what: str, number: int) -> Any:
        """Wait until rank 0 has called `give`."""
        while (what, number) not in self._made:
            if not self.world.ranks[0].alive:
                raise PeerLostError(f"rank 0 died before it had made a {what}")
            me = self.world.running
            self._waiting.setdefault((what, number), []).append(me)
            me.wait(f"for rank 0 to make a {what}")
        return self._made[what, number]

    def serve(
        self,
        like: Sequence[Tensor],
        make_server: MakeServer,
        options: ServeOptions,
        log: Path | None,
    ) -> VirtualServer:
        """Make a server, on rank 0."""
        size = len(self.world.ranks)
        if not 1 <= options.shards <= size:
            raise ConfigError(
                f"shards is {options.shards}; a server's shards live on ranks of the job, so it is "
                f"1 to {size} here"
            )
        world = self.world
        server = make_server([Piece(index) for index in range(len(like))])
        events = None if log is None else EventLog(log, lambda: world.now)
        what = "for the admission policy to let it go on, or for all to begin or end"
        host = ServerHost(
            server,
            float("inf"),
            events,
            condition=lambda: VirtualCondition(world, what),
            now=lambda: world.now,
        )
        homes = [shard * size // options.shards for shard in range(options.shards)]
        partition = Partition(like, options.shards, options.cut)
        made = VirtualServer(host, homes, partition, options)
        for dead in self._dead():
            _lose_worker(made, dead, 0, "before there was a server")
        self._servers.append(made)
        return made

    def words(self) -> Words:
        """Make a board."""
        board = Words(self.world)
        for dead in self._dead():
            board.lose(dead)
        self._boards.append(board)
        return board

    def _dead(self) -> list[int]:
        return [rank.number for rank in self.world.ranks if not rank.alive]

    def doors(self) -> dict[int, Door]:
        """Where all peers will be."""
        self._doors.append({})
        return self._doors[-1]

    def lose(self, rank: int) -> None:
        """A rank has died: all that would wait for it hear of it."""
        for server in self._servers:
            when = f"at {self.world.now:g} virtual seconds"
            _lose_worker(server, rank, self.attempts[rank], when)
        for waiting in self._waiting.values():
            while waiting:
                waiting.pop().wake()
        self.collectives.lose(rank)
        for board in self._boards:
            board.lose(rank)
        for doors in self._doors:
            doors.pop(rank, None)

    def close(self) -> None:
        """End what the links have made."""
        for server in self._servers:
            server.host.close()


def _lose_worker(server: VirtualServer, rank: int, attempt: int, when: str) -> None:
    if rank in server.homes:
        why = f"rank {rank} died {when}, and a shard of the server with it"
        server.host.fail(ClusterError(why))
    else:
        server.host.lose(rank, f"rank {rank} died {when}", attempt)


class VirtualClock:
    """The clock of one rank; it moves where the rank sleeps or waits.

    Args:
        world: keeps the time.
        me: the rank.
    """

    def __init__(self, world: World, me: Rank) -> None:
        self._world = world
        self._me = me
        self.group: VirtualGroup | None = None

    def now(self) -> float:
        """Virtual seconds since the simulation began."""
        return self._world.now

    def sleep_until(self, moment: float, abandon: Callable[[], bool] | None = None) -> bool:
        """Let virtual time pass."""
        if self.group is not None:
            self.group.begin_held_within(self._world.now, moment)
        while abandon is not None and self._world.now < moment:
            if abandon():
                return False
            self._me.sleep_until(min(moment, self._world.now + _NAP_SECONDS))
        self._me.sleep_until(moment)
        return True


_NAP_SECONDS = 0.005  # as a real one


class VirtualLink(Undivided):
    """A `Link` of a virtual cluster; `simulate` makes one for each rank.

    Attributes:
        group: all ranks.
        clock: the virtual one.
        timeline: what this rank spent its virtual time on.
        event_log: where the next server writes its events; None: nowhere.
    """

    transport = "virtual network"
    device = torch.device("cpu")

    def __init__(self, machines: Machines, me: Rank) -> None:
        self._machines = machines
        self._me = me
        self._attempt = machines.attempts[me.number]
        self.clock = VirtualClock(machines.world, me)
        self.timeline = Timeline(clock=self.clock)
        self.event_log: Path | None = None
        self._stores: list[VirtualStore] = []
        self._peers: list[VirtualPeers] = []
        self._counts: dict[str, int] = {}
        self.group: Group
        if self.returned:
            self.group = AbsentGroup(me.number, len(machines.world.ranks))
        else:
            self.clock.group = VirtualGroup(machines.collectives, me, self.timeline)
            self.group = self.clock.group

    @property
    def returned(self) -> bool:
        """This rank died, and came back."""
        return self._attempt > 0

    @property
    def bytes_sent(self) -> int:
        """Of the tensors that this rank has sent so far."""
        of_stores = sum(store.bytes_sent for store in self._stores)
        return self.group.bytes_sent + of_stores + sum(peers.bytes_sent for peers in self._peers)

    def pace(self, seed: int) -> Pace:
        """How long computing takes on this rank, as the cluster has it.

        Args:
            seed: not used: the simulation has its own, so that all runs on it see the same times.
        """
        return _Held(self._machines.cluster.pace(self._me.number, self._machines.seed), self.clock)

    def serve(
        self, like: Sequence[Tensor], make_server: MakeServer, options: ServeOptions
    ) -> VirtualStore:
        """Start a server on rank 0, and connect every rank to it."""
        machines, number = self._machines, self._next("server")
        if self._me.number == 0:
            made = machines.serve(like, make_server, options, self.event_log)
            machines.give("server", number, made)
        server: VirtualServer = machines.take("server", number)
        if self.returned:
            server.host.replace(self._me.number, self._attempt)
            server.host.join(self._me.number, self._attempt)
        store = VirtualStore(
            server,
            machines.world,
            machines.post,
            self._me,
            self._attempt,
            like,
            self.timeline,
            machines.alone_on_hosts and len(server.homes) == 1,
        )
        self._stores.append(store)
        return store

    def share(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that all ranks have in common."""
        hosts = {self._machines.host_of(rank) for rank in range(self.group.size)}
        if len(hosts) > 1:
            raise ConfigError(
                f"the ranks cannot share memory: the cluster spreads them over {len(hosts)} hosts; "
                "take a cluster of one host, or a strategy whose ranks send messages"
            )

        def make() -> list[Tensor]:
            return [torch.zeros_like(t, requires_grad=False) for t in like]

        shared: list[Tensor] = self._machines.once("share", self._next("share"), make)
        return list(shared)

    def board(self) -> VirtualBoard:
        """A board of its own for the caller."""
        words = self._machines.once("board", self._next("board"), self._machines.words)
        return VirtualBoard(words, self._me)

    def meet(self, like: Sequence[Tensor], peer: Peer, answers: bool) -> VirtualPeers:
        """Let all ranks send messages to each other's peers."""
        doors = self._machines.once("peers", self._next("peers"), self._machines.doors)
        doors[self._me.number] = Door(peer)
        self.group.all_reduce([torch.zeros(1)]).wait()  # nobody calls before all are there
        peers = VirtualPeers(doors, self._me, self._machines.post, answers)
        self._peers.append(peers)
        return peers

    def close(self) -> None:
        """This rank has ended."""
        for store in self._stores:
            store.close()

    def _next(self, what: str) -> int:
        number = self._counts[what] = self._counts.get(what, 0) + 1
        return number


class _Held:
    """A pace; when a step begins, what was handed to the group before it is under way."""

    def __init__(self, pace: Pace, clock: VirtualClock) -> None:
        self._pace = pace
        self._group = clock.group
        self.seconds = pace.seconds

    def begin_step(self) -> None:
        if self._group is not None:
            self._group.begin_held()
        self._pace.begin_step()
