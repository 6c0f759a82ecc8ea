"""The link among the ranks of a job: plain python, torchrun or Slurm, CPU or GPU.

    link = connect()        # a Link: the group of all replicas, and a place for servers
    ...
    link.close()

Works the same for one process as for many. Nothing here waits longer than its timeout, and a wait
that fails names the ranks that are missing.
"""

from __future__ import annotations

import atexit
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.clock import HostClock
from scaledtrain.comm.ambient import ambient_link
from scaledtrain.comm.boards import SharedBoard, StoreBoard
from scaledtrain.comm.flat import FlatBuffer, flat_bytes
from scaledtrain.comm.local import AbsentGroup, LocalBoard, LocalGroup, LocalPeers
from scaledtrain.comm.notes import Notes
from scaledtrain.comm.ordered_group import OrderedGroup
from scaledtrain.comm.process_group import TorchGroup, backend_of
from scaledtrain.comm.protocols import (
    Board,
    Group,
    MakeServer,
    Peer,
    Peers,
    ServeOptions,
    Store,
)
from scaledtrain.comm.serving.piece_store import Pieces
from scaledtrain.comm.serving.serve import Serving, serve
from scaledtrain.comm.shared_group import SharedMemoryGroup
from scaledtrain.comm.shared_memory import SharedSegment
from scaledtrain.comm.wire_peers import WirePeers
from scaledtrain.comm.wires.wire import Wire
from scaledtrain.comm.wires.wiring import Job
from scaledtrain.errors import ConfigError
from scaledtrain.ranks import RankInfo
from scaledtrain.rendezvous import meet
from scaledtrain.timeline import Timeline

__all__ = ["Connection", "Transport", "connect"]

_ABANDON_SECONDS = 6.0  # for workers to hear from the server; longer than they compare notes

_alone: set[Connection] = set()
"""Jobs of this process alone that have needed a process group, which they share."""

Transport = Literal["auto", "shared_memory", "torch", "torch_ordered"]
_OVER_TORCH = ("torch", "torch_ordered")


def _choose_device(info: RankInfo, device: str | torch.device | None) -> torch.device:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", info.local_rank % torch.cuda.device_count())
    return chosen


class Connection:
    """The real world as a strategy meets it; see `connect`.

    Attributes:
        info: this rank's place in the job.
        device: where this rank computes.
        group: all replicas.
        clock: the host's.
        timeline: what this rank spent its time on.
        store: the job's key-value store; None for a job of one process.
        event_log: where the next server writes its events; None: nowhere.
        attempt: how often this rank has come back to its job.
        transport: how ``group`` moves its bytes: ``"local"`` alone, ``"server"`` where this rank
            came back to its job and can only talk to the server, or as `connect` has it.
    """

    def __init__(
        self,
        info: RankInfo,
        device: torch.device,
        timeout_seconds: float,
        transport: Transport,
        whole: tuple[Connection, Sequence[int]] | None = None,
    ) -> None:
        self.info = info
        self._whole = whole
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.clock = HostClock()
        self.timeline: Timeline = whole[0].timeline if whole else Timeline(device, clock=self.clock)
        self.timeout_seconds = timeout_seconds
        self.store: dist.Store | None = None
        # A second client, for threads that only look: one that waits in a client blocks it.
        self._store_of_threads: dist.Store | None = None
        self.transport = "local"
        self.group: Group = LocalGroup()
        self._wanted = transport
        self._process_group: dist.ProcessGroup | None = None
        self._owns_process_group = False
        self._shared: SharedMemoryGroup | None = None
        self._shares_memory = transport not in _OVER_TORCH and device.type == "cpu"
        self._serving: list[Serving] = []
        self._made: dict[str, int] = {}
        self._peers: list[WirePeers] = []
        self._parts: list[Connection] = []
        self._named: dict[str, Connection] = {}
        self._pieces: Connection | None = None
        self._closing: list[Callable[[], None]] = []
        self.event_log: Path | None = None
        self.attempt = 0

    def join(self) -> None:
        """Meet the other ranks of the job; once."""
        info = self.info
        if info.size == 1 and (_alone or not dist.is_initialized()):
            return
        atexit.register(self.abandon)
        if dist.is_initialized():
            self.store = dist.PrefixStore("scaledtrain", dist.distributed_c10d._get_default_store())
        else:
            self.store, self.attempt = meet(info, self.timeout_seconds)
            if self.attempt > 0:
                self.group, self.transport = AbsentGroup(info.rank, info.size), "server"
                return
            self._init_process_group(self.store)
            self._owns_process_group = True
        self._open_group()

    def part(self, name: str, ranks: Sequence[int], pieces: str | None = None) -> Connection:
        """The link among some of the ranks, who call this together; it ends with this one.

        Args:
            name: of the part, the same on its ranks, and no other part's; it may be made again.
            ranks: of this connection, in the order of their ranks in the part.
            pieces: the name of a part made before, of the ranks that have this rank's replica
                together; None: each rank of the new part has a whole one.
        """
        place = list(ranks).index(self.group.rank)
        info = replace(self.info, rank=place, size=len(ranks))
        part = Connection(
            info, self.device, self.timeout_seconds, self._wanted, (self, list(ranks))
        )
        self._parts.append(part)
        self._named[name] = part
        part._pieces = None if pieces is None else self._named[pieces]
        if self.store is not None and len(ranks) > 1:
            number = self._made[name] = self._made.get(name, 0) + 1
            part.store = dist.PrefixStore(f"part/{name}/{number}", self.store)
            part._open_group()
        return part

    @property
    def pieces(self) -> Group:
        """The ranks that have this rank's replica together."""
        return LocalGroup() if self._pieces is None else self._pieces.group

    def _init_process_group(self, store: dist.Store) -> None:
        # Importing this module stores the process group that is there then as a default argument,
        # which keeps it and its threads to the end; making an optimizer imports it.
        importlib.import_module("torch.distributed.nn.functional")
        rank, size = self.info.rank, self.info.size
        # Without device_id: a group bound to a device makes others by ncclCommSplit, which also
        # ranks that are in none would have to call.
        dist.init_process_group(
            backend_of(self.device, store, rank, size, self.timeout_seconds),
            store=dist.PrefixStore("process_group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=self.timeout_seconds),
        )

    def process_group(self) -> dist.ProcessGroup:
        """torch.distributed's own group of these ranks, who call this together the first time."""
        if self._process_group is None:
            job = self if self._whole is None else self._whole[0]
            if job.store is None and (_alone or not dist.is_initialized()):  # of one process
                if not _alone:
                    job._init_process_group(dist.HashStore())
                atexit.register(job.abandon)
                _alone.add(job)
            if self._whole is None:
                self._process_group = dist.group.WORLD
            else:
                group = self._process_group = dist.new_group(
                    self._whole[1],
                    timeout=timedelta(seconds=self.timeout_seconds),
                    use_local_synchronization=True,
                )
                self._closing.append(lambda: dist.destroy_process_group(group))
        assert self._process_group is not None
        return self._process_group

    def _open_group(self) -> None:
        """Memory that all ranks share, if that is wanted and possible, else torch.distributed."""
        assert self.store is not None
        if self._shares_memory:
            self._shared = SharedMemoryGroup.connect(
                self.info.rank,
                self.info.size,
                dist.PrefixStore("shared_memory", self.store),
                self.timeout_seconds,
                ranks=self._ranks,
            )
        if self._shared is not None:
            self._shared.observe = self.timeline.add
            self.group, self.transport = self._shared, "shared_memory"
        elif self._wanted == "shared_memory":
            raise ConfigError(
                "transport is 'shared_memory', but the ranks are not all on one Linux host (or in "
                "one container) with CPU tensors; use 'auto' or 'torch'"
            )
        else:
            group = TorchGroup(
                self.process_group(), self.store, self.timeline, self.timeout_seconds, self._ranks
            )
            self._closing.append(group.close)
            ordered = self._wanted == "torch_ordered"
            self.group = OrderedGroup(group) if ordered else group
            self.transport = self._wanted if ordered else "torch"

    @property
    def _ranks(self) -> Sequence[int] | None:
        """Of the job, in the order of their ranks here; None if they are the same."""
        return None if self._whole is None else self._whole[1]

    def pace(self, seed: int) -> None:
        """Computing takes as long as it takes."""

    @property
    def bytes_sent(self) -> int:
        """Of the tensors that this rank has handed to a transport so far."""
        groups = sum(connection.group.bytes_sent for connection in (self, *self._parts))
        return groups + sum(wire.bytes_sent for wire in self._wires())

    @property
    def bytes_received(self) -> int:
        """Of the tensors that this rank has taken from wires; a group's are not in it."""
        return sum(wire.bytes_received for wire in self._wires())

    def _wires(self) -> Iterator[Wire]:
        for part in self._parts:
            yield from part._wires()
        for serving in self._serving:
            yield from serving.wires
        for peers in self._peers:
            yield from peers.wires

    @property
    def returned(self) -> bool:
        """This rank came back to a job that had gone on without it."""
        return self.attempt > 0

    def serve(
        self, like: Sequence[Tensor], make_server: MakeServer, options: ServeOptions
    ) -> Store:
        """Start a server and connect every rank to it; all ranks call this together."""
        job, pieces = self._job(self._store_of_new("server")), None
        if (others := self._pieces) is not None:
            pieces = Pieces(others._job(others._store_of_new("server")), others.group)
        serving = serve(job, like, make_server, options, self.timeline, self.event_log, pieces)
        self._serving.append(serving)
        assert serving.store is not None
        return serving.store

    def share(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Make tensors in memory of which every rank sees the same; all ranks call this together.

        Raises:
            ConfigError: they are not on the CPU, or the ranks not on one host.
        """
        if any(t.device.type != "cpu" for t in like):
            raise ConfigError(
                "only the CPU's memory can be shared by ranks as if it were their own, but the "
                f"parameters are on {like[0].device}; use device=cpu, or a strategy whose ranks "
                "send each other messages"
            )
        store = self._store_of_new("shared_tensors")
        if store is None:
            return [torch.zeros_like(t, requires_grad=False) for t in like]
        segment = self._share(store, flat_bytes(like))
        if segment is None:
            raise ConfigError(
                "the ranks cannot share memory: they are not all on one Linux host (or in one "
                "container); start them all on one, or use a strategy whose ranks send messages"
            )
        self._closing.append(segment.close)
        return FlatBuffer(like, segment.memory).views

    def board(self) -> Board:
        """Make a board; all ranks call this together."""
        store = self._store_of_new("board")
        if store is None:
            return LocalBoard()
        board: SharedBoard | StoreBoard
        rank, size, seconds = self.info.rank, self.info.size, self.timeout_seconds
        segment = self._share(store, 8 * size) if self._shares_memory else None
        if segment is not None:
            board = SharedBoard(segment, seconds)
        else:
            board = StoreBoard(store, rank, size, seconds)
        self._closing.append(board.close)
        return board

    def notes(self) -> Notes:
        """Notes between the ranks; all of them call this equally often, and wait for nobody."""
        return Notes(self._store_of_new("notes"), self.info.rank, self.info.size)

    def meet(self, like: Sequence[Tensor], peer: Peer, answers: bool) -> Peers:
        """Let all ranks send messages to each other's peers; all ranks call this together."""
        store = self._store_of_new("peers")
        if store is None:
            return LocalPeers()
        peers = WirePeers(self._job(store), like, peer, answers)
        self._peers.append(peers)
        return peers

    def _share(self, store: dist.Store, n_bytes: int) -> SharedSegment | None:
        return SharedSegment.connect(
            store,
            "memory",
            self.info.rank,
            self.info.size,
            n_bytes=n_bytes,
            timeout_seconds=self.timeout_seconds,
        )

    def _store_of_new(self, what: str) -> dist.Store | None:
        """Where all ranks meet for something that they make together, for the n-th time."""
        number = self._made[what] = self._made.get(what, 0) + 1
        if self.store is None:
            return None
        if self._store_of_threads is None:
            self._store_of_threads = self.store.clone()  # type: ignore[attr-defined]
        return dist.PrefixStore(f"{what}/{number}", self._store_of_threads)

    def _job(self, store: dist.Store | None) -> Job:
        return Job(
            store,
            self.info.rank,
            self.info.size,
            self._shares_memory,
            self.device,
            self.timeout_seconds,
            self.attempt,
            self._ranks,
        )

    def abandon(self) -> None:
        """Leave without waiting for anybody: after an error, or at the end of the process."""
        self._leave(_ABANDON_SECONDS, abandoned=True)

    def close(self) -> None:
        """Leave the job: end servers, give back memory and connections. All ranks call it."""
        for connection in (*self._parts, self):
            for serving in connection._serving:
                assert serving.store is not None
                serving.store.close()
        self._leave(self.timeout_seconds, abandoned=False)

    def _leave(self, seconds: float, abandoned: bool) -> None:
        atexit.unregister(self.abandon)
        for part in self._parts:
            part._leave(seconds, abandoned)
        deadline = time.monotonic() + seconds
        for serving in self._serving:
            serving.end(deadline, abandoned)
        for peers in self._peers:
            peers.close()
        for close in reversed(self._closing):
            close()
        self._serving, self._peers, self._closing, self._parts = [], [], [], []
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        if self in _alone:
            _alone.remove(self)
            self._owns_process_group = not _alone
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()
        self._process_group, self._owns_process_group = None, False
        self.group, self.store, self._store_of_threads = LocalGroup(), None, None

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:  # the others may be anywhere: do not wait for them
            self.abandon()


def connect(
    *,
    device: str | torch.device | None = None,
    transport: Transport = "auto",
    timeout_seconds: float = 300.0,
) -> Connection:
    """Join this process to its job and return the link to the other ranks.

    Who takes part is read from the environment (torchrun's or Slurm's); without either the job is
    this process alone. An already initialised torch.distributed is used as it is.

    Ranks may also be launched one by one, each by a torchrun of its own, with SCALEDTRAIN_RANK,
    SCALEDTRAIN_WORLD_SIZE, SCALEDTRAIN_MASTER_ADDR and SCALEDTRAIN_MASTER_PORT (a free port of rank
    0's host) set for each. A rank other than 0 that died may then be launched again, and takes part
    from the current version on if the job's strategy has a server: `ParameterServer`.

    Args:
        device: where this rank computes; default: its own GPU if there is one, else the CPU.
        transport: ``"shared_memory"``: through memory that ranks on one Linux host share (CPU
            tensors), ``"torch"``: torch.distributed (gloo, NCCL); ``"auto"``: the first if
            possible. ``"torch_ordered"``: the second, slower: sums are taken in the order of ranks,
            as in shared memory, so that a run has the same bits wherever it is made.
        timeout_seconds: the longest that any rank waits for another, now and later.

    Returns:
        The link; close it at the end, or use it in a ``with`` statement.

    Raises:
        RendezvousError: ranks are missing, or the port is in use.
        ConfigError: the environment's variables contradict each other, or the transport is
            impossible here.

    Example:
        >>> with connect() as link:
        ...     link.group.size
        1
    """
    if transport not in get_args(Transport):
        raise ConfigError(
            f"transport is {transport!r}; it can be: {', '.join(map(repr, get_args(Transport)))}"
        )
    if ambient_link() is not None:
        raise ConfigError(
            "connect() joins this process to its job, but this is a rank of a simulated cluster, "
            "which has its link: use the one that the program is called with"
        )
    info = RankInfo.from_environment()
    if dist.is_initialized():
        info = replace(info, rank=dist.get_rank(), size=dist.get_world_size())
    connection = Connection(info, _choose_device(info, device), timeout_seconds, transport)
    connection.join()
    return connection
