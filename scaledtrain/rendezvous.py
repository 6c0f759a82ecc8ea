"""How the ranks of a job find each other: plain python, torchrun or Slurm, CPU or GPU.

    link = connect()        # a Link: the group of all replicas, and a place for servers
    ...
    link.close()

Works the same for one process as for many. Nothing here waits longer than its timeout, and a wait
that fails names the ranks that are missing.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer, flat_bytes
from scaledtrain.comm.host import DirectStore, ServerHost
from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.point_to_point import TorchServerWire, TorchWorkerWire
from scaledtrain.comm.process_group import TorchGroup
from scaledtrain.comm.protocols import Group, Store
from scaledtrain.comm.remote_store import RemoteStore, ServerWire, WorkerWire, serve_in_thread
from scaledtrain.comm.shared_group import SharedMemoryGroup
from scaledtrain.comm.shared_memory import SharedSegment
from scaledtrain.comm.shared_wire import (
    SharedServerWire,
    SharedWorkerWire,
    connect_mailboxes,
)
from scaledtrain.errors import ConfigError, PeerLostError, RendezvousError
from scaledtrain.timeline import Timeline

if TYPE_CHECKING:
    from scaledtrain.server import Server

__all__ = ["Connection", "RankInfo", "Transport", "connect"]

_POLL_SECONDS = 0.02
_ABANDON_SECONDS = 3.0  # for workers to hear from the server; longer than they compare notes

Transport = Literal["auto", "shared_memory", "torch"]


@dataclass(frozen=True)
class RankInfo:
    """Which process of the job this one is, and where all meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    master_address: str = "127.0.0.1"
    master_port: int = 29500

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> RankInfo:
        """Read torchrun's variables, else those of a Slurm step (srun), else: one process.

        Raises:
            ConfigError: the variables contradict each other.
        """
        try:
            info = cls._read(env)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"the environment of this rank is incomplete or wrong ({error!r}); torchrun sets "
                "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, srun sets SLURM_*: "
                "start the job with one of them, or set all by hand"
            ) from error
        if not 0 <= info.rank < info.size:
            raise ConfigError(
                f"rank {info.rank} of {info.size} cannot be: ranks go from 0 to {info.size - 1}; "
                "check RANK and WORLD_SIZE"
            )
        return info

    @classmethod
    def _read(cls, env: Mapping[str, str]) -> RankInfo:
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(
                int(env["RANK"]),
                int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", "0")),
                env.get("MASTER_ADDR", "127.0.0.1"),
                int(env.get("MASTER_PORT", "29500")),
            )
        if "SLURM_STEP_NUM_TASKS" in env:
            return cls(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env["SLURM_LOCALID"]),
                env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
                # Jobs that share a node differ in their id, so they get different ports.
                int(env.get("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 10000))),
            )
        return cls()


def _first_host(nodes: str) -> str:
    """First name of a Slurm node list: ``gpu[03-07,12],login1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"cannot read the Slurm node list {nodes!r}; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _choose_device(info: RankInfo, device: str | torch.device | None) -> torch.device:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", info.local_rank % torch.cuda.device_count())
    return chosen


def _meet(info: RankInfo, timeout_seconds: float) -> dist.Store:
    """The key-value store of the job, once every rank has come to it."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    where = f"{info.master_address}:{info.master_port}"
    deadline = time.monotonic() + timeout_seconds
    is_master = info.rank == 0 and not agent
    if is_master:
        _check_port(info)
    else:
        _wait_for_port(info, deadline, timeout_seconds)
    try:
        store: dist.Store = dist.TCPStore(
            info.master_address,
            info.master_port,
            info.size,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"scaledtrain/{attempt}", store)
        store.set(f"here/{info.rank}", "1")
        missing = list(range(info.size))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            time.sleep(_POLL_SECONDS if missing else 0.0)
    except (RuntimeError, dist.DistError) as error:
        raise PeerLostError(
            f"rank 0 at {where} left while rank {info.rank} met the others; its own message says "
            f"why ({str(error).splitlines()[0]})"
        ) from error
    if missing:
        raise RendezvousError(
            f"rank {info.rank} waited {timeout_seconds:g} s at {where} for rank"
            f"{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {info.size}, "
            "which did not come; see whether it started (its own output, or the scheduler's), that "
            "WORLD_SIZE is the number of processes, and that no firewall is between"
        )
    return store


def _wait_for_port(info: RankInfo, deadline: float, timeout_seconds: float) -> None:
    """Return when rank 0 listens; torch's own waiting would write warnings meanwhile."""
    address = (info.master_address, info.master_port)
    while True:
        try:
            socket.create_connection(address, timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {info.rank} of {info.size} found no rank 0 at {address[0]}:{address[1]} "
                    f"within {timeout_seconds:g} s; start it, or check MASTER_ADDR, MASTER_PORT "
                    f"and firewalls ({error})"
                ) from error
        time.sleep(_POLL_SECONDS)


def _check_port(info: RankInfo) -> None:
    """Find out whether rank 0 can listen, since the store's own error does not say what to do."""
    family = socket.AF_INET6 if ":" in info.master_address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", info.master_port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return
            raise RendezvousError(
                f"port {info.master_port} on {info.master_address} is in use by another program, "
                "so rank 0 cannot be met there; set MASTER_PORT (torchrun: --master-port) to a "
                "free port, or use torchrun --standalone, which finds one"
            ) from error


class Connection:
    """The real world as a strategy meets it; see `connect`.

    Attributes:
        info: this rank's place in the job.
        device: where this rank computes.
        group: all replicas.
        timeline: what this rank spent its time on.
        store: the job's key-value store; None for a job of one process.
        transport: ``"local"``, ``"shared_memory"`` or ``"torch"``: how ``group`` moves its bytes.
    """

    def __init__(
        self, info: RankInfo, device: torch.device, timeout_seconds: float, transport: Transport
    ) -> None:
        self.info = info
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.timeline = Timeline(device)
        self.timeout_seconds = timeout_seconds
        self.store: dist.Store | None = None
        self.transport = "local"
        self.group: Group = LocalGroup()
        self._owns_process_group = False
        self._shared: SharedMemoryGroup | None = None
        self._stores: list[Store] = []
        self._segments: list[SharedSegment] = []
        self._threads: list[threading.Thread] = []
        if info.size > 1 or dist.is_initialized():
            self._connect(transport)

    def _connect(self, transport: Transport) -> None:
        info, timeout = self.info, timedelta(seconds=self.timeout_seconds)
        atexit.register(self.abandon)
        if dist.is_initialized():
            self.store = dist.PrefixStore("scaledtrain", dist.distributed_c10d._get_default_store())
        else:
            self.store = _meet(info, self.timeout_seconds)
            cuda = self.device.type == "cuda"
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=dist.PrefixStore("process_group", self.store),
                rank=info.rank,
                world_size=info.size,
                timeout=timeout,
                device_id=self.device if cuda else None,
            )
            self._owns_process_group = True
        world = dist.group.WORLD
        assert world is not None
        if transport != "torch" and self.device.type == "cpu":
            self._shared = SharedMemoryGroup.connect(
                info.rank,
                info.size,
                dist.PrefixStore("shared_memory", self.store),
                self.timeout_seconds,
            )
        if self._shared is not None:
            self._shared.observe = self.timeline.add
            self.group, self.transport = self._shared, "shared_memory"
        elif transport == "shared_memory":
            raise ConfigError(
                "transport is 'shared_memory', but the ranks are not all on one Linux host (or in "
                "one container) with CPU tensors; use 'auto' or 'torch'"
            )
        else:
            self.group = TorchGroup(world, self.store, self.timeline, self.timeout_seconds)
            self.transport = "torch"

    def serve(self, like: Sequence[Tensor], make_server: Callable[[], Server]) -> Store:
        """Start a server on rank 0 and connect every rank to it; all ranks call this together."""
        host = ServerHost(make_server(), self.timeout_seconds) if self.info.rank == 0 else None
        if self.store is None:
            assert host is not None
            return self._keep(DirectStore(host, 0, self.timeline))
        others = range(1, self.info.size)
        like = [torch.empty_like(t, device="cpu") for t in like]
        segment: SharedSegment | None = None
        if self._shared is not None:
            segment = connect_mailboxes(
                self.store, self.info.rank, self.info.size, like, 0, self.timeout_seconds
            )
        wires: list[ServerWire]
        if segment is not None:
            self._segments.append(segment)
            if host is None:
                wire: WorkerWire = SharedWorkerWire(segment, like, 0, self.timeout_seconds)
                return self._keep(RemoteStore(wire, self.timeline))
            wires = [SharedServerWire(segment, worker, like) for worker in others]
        else:
            # The server's threads wait for requests however long a worker computes; a dead one is
            # noticed by its broken connection, not by time.
            group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            assert group is not None
            if host is None:
                wire = TorchWorkerWire(like, 0, group, self.store, self.timeout_seconds)
                return self._keep(RemoteStore(wire, self.timeline))
            wires = [TorchServerWire(like, worker, group) for worker in others]
        for worker, server_wire in zip(others, wires, strict=True):
            self._threads.append(serve_in_thread(host, worker, server_wire))
        return self._keep(DirectStore(host, 0, self.timeline))

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
        if self.store is None:
            return [torch.zeros_like(t, requires_grad=False) for t in like]
        segment = SharedSegment.connect(
            self.store,
            "shared_tensors",
            self.info.rank,
            self.info.size,
            n_bytes=flat_bytes(like),
            timeout_seconds=self.timeout_seconds,
        )
        if segment is None:
            raise ConfigError(
                "the ranks cannot share memory: they are not all on one Linux host (or in one "
                "container); start them all on one, or use a strategy whose ranks send messages"
            )
        self._segments.append(segment)
        return FlatBuffer(like, segment.memory).views

    def _keep(self, store: Store) -> Store:
        self._stores.append(store)
        return store

    def abandon(self) -> None:
        """Leave without waiting for anybody: after an error, or at the end of the process."""
        self._leave(_ABANDON_SECONDS)

    def close(self) -> None:
        """Leave the job: end servers, give back memory and connections. All ranks call it."""
        for store in self._stores:
            store.close()
        self._leave(self.timeout_seconds)

    def _leave(self, seconds: float) -> None:
        atexit.unregister(self.abandon)
        deadline = time.monotonic() + seconds
        for thread in self._threads:  # a server's threads end when their workers have heard of it
            thread.join(max(deadline - time.monotonic(), 0.0))
        for segment in self._segments:
            segment.close()
        self._stores, self._segments, self._threads = [], [], []
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()
        self.group, self.store = LocalGroup(), None

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

    Args:
        device: where this rank computes; default: its own GPU if there is one, else the CPU.
        transport: ``"shared_memory"``: through memory that ranks on one Linux host share (CPU
            tensors), ``"torch"``: torch.distributed (gloo, NCCL); ``"auto"``: the first if
            possible.
        timeout_seconds: the longest that any rank waits for another, now and later.

    Raises:
        RendezvousError: ranks are missing, or the port is in use.
        ConfigError: the environment's variables contradict each other, or the transport is
            impossible here.

    Example:
        >>> with connect() as link:
        ...     link.group.size
        1
    """
    if transport not in ("auto", "shared_memory", "torch"):
        raise ConfigError(
            f"transport is {transport!r}; it can be: 'auto', 'shared_memory', 'torch'"
        )
    info = RankInfo.from_environment()
    if dist.is_initialized():
        info = replace(info, rank=dist.get_rank(), size=dist.get_world_size())
    return Connection(info, _choose_device(info, device), timeout_seconds, transport)
