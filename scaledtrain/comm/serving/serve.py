"""Puts a server together: its shards on their ranks, and wires between them and the workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group, MakeServer, ServeOptions, Store
from scaledtrain.comm.serving.answering import Decode, serve_worker
from scaledtrain.comm.serving.encoding import Encoder
from scaledtrain.comm.serving.event_log import EventLog
from scaledtrain.comm.serving.host import SIGNS_OF_LIFE, ServerHost
from scaledtrain.comm.serving.partition import Partition
from scaledtrain.comm.serving.piece_store import Pieces, PieceStore
from scaledtrain.comm.serving.requests import Request
from scaledtrain.comm.serving.server_store import DirectStore, Local, WireStore
from scaledtrain.comm.serving.shard import ServerShard
from scaledtrain.comm.wires.wire import LocalWire, Wire, empty_like
from scaledtrain.comm.wires.wiring import Job, open_wire
from scaledtrain.errors import ClusterError, ConfigError
from scaledtrain.server import Server
from scaledtrain.timeline import Timeline

__all__ = ["Serving", "serve"]

_LISTEN_SECONDS = 0.2  # between two looks for workers that come back


@dataclass
class Serving:
    """What `serve` has started on this rank, to be ended again."""

    store: Store | None = None
    host: ServerHost | None = None
    threads: list[threading.Thread] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    shards: list[Wire] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def end(self, deadline: float, abandoned: bool) -> None:
        """Wait for the threads, which end when their workers have left, then close everything.

        Args:
            deadline: for all of it, on the monotonic clock.
            abandoned: workers hear at once that there is no server any more.
        """
        self.over.set()
        if not abandoned:
            first = [t for t in self.threads if t.name.startswith("server")]
            self._join(first, deadline)
        if self.host is not None:
            self.host.close()
        for wire in self.shards:
            with suppress(ClusterError):
                wire.send([Request.CLOSE])
        self._join(self.threads, deadline)
        wires = [*self.wires, *self.shards]
        for wire in wires:
            wire.close()
        for wire in wires:
            wire.join(max(deadline - time.monotonic(), 0.0))

    @staticmethod
    def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))


def serve(
    job: Job,
    like: Sequence[Tensor],
    make_server: MakeServer,
    options: ServeOptions,
    timeline: Timeline,
    event_log: Path | None,
    pieces: Pieces | None = None,
) -> Serving:
    """Start this rank's part of a server, and its worker's access to it. Collective.

    Where a worker is several ranks, all of them call this, each with those that have the same piece
    of other replicas: the server has a shard for each piece, on the ranks of replica 0.

    Args:
        job: the workers; of each the rank that has the same piece as this one.
        like: the parameters; this piece of them.
        make_server: makes a shard.
        options: where it lives, and how it is reached.
        timeline: of this rank.
        event_log: where the first shard writes.
        pieces: the ranks of this rank's worker; None: it is this rank alone.

    Raises:
        ConfigError: more shards than ranks, or an option that pieces cannot have.
        ClusterError: a rank did not come.
    """
    if pieces is not None:
        pieces.check(options)
    if not 1 <= options.shards <= job.size:
        raise ConfigError(
            f"shards is {options.shards}; a server's shards live on ranks of the job, so it is 1 "
            f"to {job.size} here"
        )
    return _Builder(job, like, options, pieces).build(make_server, timeline, event_log)


class _Builder:
    """Makes the parts of one server that this rank has."""

    def __init__(
        self, job: Job, like: Sequence[Tensor], options: ServeOptions, pieces: Pieces | None
    ) -> None:
        self._job = job
        self._options = options
        self._pieces = pieces
        # Of each replica one rank asks the server; the others hear what it hears.
        self._listens = pieces is not None and pieces.job.rank > 0
        self._group: Group = LocalGroup() if pieces is None else pieces.group
        self._like = list(like)
        self._partition = Partition(like, options.shards, options.cut)
        self._parts = [
            empty_like(self._partition.part(like, shard)) for shard in range(options.shards)
        ]
        codec = options.compression
        self._sent = [part if codec is None else codec.room(part) for part in self._parts]
        self._homes = [shard * job.size // options.shards for shard in range(options.shards)]
        self._mine = self._homes.index(job.rank) if job.rank in self._homes else None

    def build(self, make_server: MakeServer, timeline: Timeline, event_log: Path | None) -> Serving:
        job, options = self._job, self._options
        if job.attempt > 0:
            self._announce_return()
        server = None if self._mine is None else make_server(self._partition.pieces[self._mine])
        host: ServerHost | None = None
        if self._mine == 0 and server is not None and not self._listens:
            log = None if event_log is None else EventLog(event_log)
            host = ServerHost(server, job.timeout_seconds, log)
            if (options.shards, options.overlap, options.compression) == (1, False, None):
                store = DirectStore(host, job.rank, self._like, timeline, self._group)
                serving = Serving(store, host)
                self._serve_others(serving, host, {})
                return serving
        serving = Serving(host=host)
        ours: dict[int, Wire] = {}
        local: dict[int, Wire] = {}
        if self._mine is not None:  # the worker of this rank reaches it inside the process
            local[job.rank], ours[self._mine] = LocalWire.pair(
                (self._sent[self._mine], self._parts[self._mine]),
                (1, self._slots),
                (f"rank {job.name(job.rank)}'s server", f"rank {job.name(job.rank)}'s worker"),
                job.timeout_seconds,
            )
        here: Local | None = None
        if host is not None:
            here = host
            self._serve_others(serving, host, local)
        elif server is not None:
            here = self._start_shard(serving, server, local)
        for shard, home in enumerate(self._homes):
            if shard not in ours:
                ours[shard] = self._wire_to(shard, home, job.rank, job.attempt, at_shard=False)
        wires = [ours[shard] for shard in range(options.shards)]
        serving.wires.extend(wires)
        if self._pieces is not None and self._listens:
            serving.store = PieceStore(wires[0], self._like, job, self._pieces, here, timeline)
            return serving
        serving.store = WireStore(
            wires,
            self._partition,
            self._like,
            job.rank,
            self._encoder(),
            options.overlap,
            here,
            timeline,
            job.timeout_seconds,
            self._group,
        )
        return serving

    def _announce_return(self) -> None:
        job = self._job
        if self._mine is not None:
            raise ClusterError(
                f"rank {job.rank} came back, but it held a shard of the server, whose parameters "
                "died with it; restart the whole job, from its last checkpoint if it keeps any"
            )
        assert job.store is not None
        number = job.store.add("returns", 1)
        job.store.set(f"return/{number}", f"{job.rank} {job.attempt}")

    @property
    def _slots(self) -> int:
        """Sets of parameters that a worker holds at once."""
        return 2 if self._options.overlap else 1

    @property
    def _reads_ahead(self) -> bool:
        """Whether a worker's end of a wire does; see `_wire_to`."""
        return self._options.overlap or len(self._parts) > 1 or self._listens

    def _encoder(self) -> Encoder | None:
        codec, shards = self._options.compression, self._options.shards
        return None if codec is None else Encoder(codec, self._partition, self._like, shards)

    def _decoder(self, shard: int) -> Decode:
        codec, part = self._options.compression, self._parts[shard]
        return (lambda sent: sent) if codec is None else (lambda sent: codec.decode(sent, part))

    def _serve_others(self, serving: Serving, host: ServerHost, local: dict[int, Wire]) -> None:
        """Start the threads of the first shard: one for each worker, one for who comes back."""
        job = self._job
        for shard in range(1, max(len(self._homes), self._group.size)):
            wire = self._wire_between_shards(shard, 0)
            host.add_shard(wire, relays=self._pieces is not None)
            serving.shards.append(wire)
        for worker in range(job.size):
            if worker in local or worker != job.rank:
                self._serve_in_thread(serving, host, worker, 0, local.get(worker))
        if job.store is not None and self._pieces is None:
            self._start(serving, "listener", self._listen, serving, host)

    def _serve_in_thread(
        self, serving: Serving, host: ServerHost, worker: int, attempt: int, wire: Wire | None
    ) -> None:
        def run() -> None:
            try:
                end = wire or self._wire_to(0, self._job.rank, worker, attempt, at_shard=True)
            except ClusterError as error:
                with suppress(ClusterError):  # the server failed: the rank that holds it says why
                    host.lose(worker, str(error), attempt)
                return
            serving.wires.append(end)
            serve_worker(host, worker, attempt, end, self._decoder(0))

        self._start(serving, f"server-for-worker-{worker}", run)

    def _listen(self, serving: Serving, host: ServerHost) -> None:
        """Let workers take part again that come back as new processes."""
        store, number = self._job.store, 1
        assert store is not None
        while not serving.over.wait(_LISTEN_SECONDS):
            if not store.check([f"return/{number}"]):
                continue
            worker, attempt = map(int, store.get(f"return/{number}").split())
            number += 1
            with suppress(ClusterError):  # the server failed, as the worker will hear
                host.replace(worker, attempt)
            self._serve_in_thread(serving, host, worker, attempt, None)

    def _start_shard(self, serving: Serving, server: Server, local: dict[int, Wire]) -> ServerShard:
        job, shard = self._job, self._mine
        assert shard is not None

        def connect(worker: int, attempt: int) -> Wire:
            wire = self._wire_to(shard, job.rank, worker, attempt, at_shard=True)
            serving.wires.append(wire)
            return wire

        part = ServerShard(server, connect, self._decoder(shard), job.timeout_seconds)

        def run() -> None:
            number = shard if self._pieces is None else self._group.rank
            first = self._wire_between_shards(number, 1)
            serving.wires.append(first)
            workers = range(job.size)
            part.run(first, {w: local.get(w) or connect(w, 0) for w in workers})

        self._start(serving, "shard", part.guarded, run)
        return part

    def _start(
        self, serving: Serving, name: str, what: Callable[..., None], *arguments: object
    ) -> None:
        thread = threading.Thread(target=what, args=arguments, name=name, daemon=True)
        serving.threads.append(thread)
        thread.start()

    def _wire_between_shards(self, shard: int, end: int) -> Wire:
        """The wire between the first shard (end 0) and another one."""
        if self._pieces is None:
            job, ranks = self._job, (self._homes[0], self._homes[shard])
        else:
            job, ranks = self._pieces.job, (0, shard)
        return open_wire(job, f"shard/{shard}", end, ([], []), (1, 1), ranks)

    def _wire_to(self, shard: int, home: int, worker: int, attempt: int, at_shard: bool) -> Wire:
        """The wire between a shard and a worker, as one of them sees it."""
        likes = self._sent[shard], self._parts[shard]
        name = f"worker/{worker}/{attempt}/{shard}"
        slots = (1, self._slots)
        # Only the first shard judges a push, so the others have to have their parts before.
        receipts = shard > 0 or self._listens
        job, accept_seconds = self._job, self._job.timeout_seconds
        if receipts and at_shard:
            # It serves one after another: a worker that is stuck must not keep it for as long as
            # the others would wait.
            accept_seconds /= SIGNS_OF_LIFE
            if attempt > 0:
                job = replace(job, timeout_seconds=accept_seconds)
        return open_wire(
            job,
            name,
            0 if at_shard else 1,
            likes,
            slots,
            (home, worker),
            # A shard must not wait until a worker comes to it, with others in the queue.
            reads_ahead=receipts if at_shard else self._reads_ahead,
            gives_receipts=receipts and at_shard,
            wants_receipts=receipts and not at_shard,
            accept_seconds=accept_seconds,
        )
