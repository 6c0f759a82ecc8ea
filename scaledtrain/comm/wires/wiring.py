"""How two ranks get a wire between them, of the best kind that there is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.wires.shared_wire import SharedWire
from scaledtrain.comm.wires.torch_wire import TorchWire
from scaledtrain.comm.wires.wire import Wire
from scaledtrain.errors import RendezvousError

__all__ = ["Job", "open_wire"]

_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Job:
    """What wires need to know of this rank and its job.

    Args:
        store: where ranks meet, of one server alone; None for a job of one process.
        rank: this one.
        size: of the job.
        share_memory: try to, before torch.distributed is used.
        device: where this rank computes.
        timeout_seconds: the longest wait of one rank for another.
        attempt: how often this rank has come back to its job.
        names: of the job's ranks, for messages, if they are a part of a larger one; None: 0, 1...
    """

    store: dist.Store | None
    rank: int
    size: int
    share_memory: bool
    device: torch.device
    timeout_seconds: float
    attempt: int = 0
    names: Sequence[int] | None = None

    def name(self, rank: int) -> int:
        """What messages call this rank."""
        return rank if self.names is None else self.names[rank]


def open_wire(
    job: Job,
    name: str,
    end: int,
    like: tuple[Sequence[Tensor], Sequence[Tensor]],
    slots: tuple[int, int],
    ranks: tuple[int, int],
    reads_ahead: bool = False,
    gives_receipts: bool = False,
    wants_receipts: bool = False,
    accept_seconds: float | None = None,
) -> Wire:
    """Connect two ranks; both call this. Through shared memory if they can, else torch.distributed.

    Args:
        job: what this rank is.
        name: of the wire, the same at both ends and nowhere else.
        end: of this rank, 0 or 1.
        like: templates of the tensors that end 0 and end 1 receive.
        slots: how many messages with tensors end 0 and end 1 may hold unreleased.
        ranks: at end 0 and end 1.
        reads_ahead: see `TorchWire`, like the next two.
        gives_receipts: and
        wants_receipts: through shared memory what is sent is there anyway.
        accept_seconds: the longest that the other end may take to accept a message; default: the
            job's timeout.

    Raises:
        ClusterError: the other end did not come.
    """
    assert job.store is not None
    ranks = job.name(ranks[0]), job.name(ranks[1])
    if job.share_memory:
        meeting = dist.PrefixStore(name, job.store)
        wire = SharedWire.connect(meeting, "memory", end, like, slots, ranks, job.timeout_seconds)
        if wire is not None:
            return wire
    # Threads do this at once, and waiting in one client of the store keeps out others of it. Not
    # for shared memory, which never waits in it: each client asks DNS, which may take seconds.
    client: dist.Store = job.store.clone()  # type: ignore[attr-defined]
    store = dist.PrefixStore(name, client)
    return TorchWire(
        store,
        end,
        like,
        slots,
        ranks,
        accept_seconds or job.timeout_seconds,
        _device(store, end, ranks, job),
        reads_ahead,
        gives_receipts,
        wants_receipts,
    )


def _device(store: dist.Store, end: int, ranks: tuple[int, int], job: Job) -> torch.device:
    """Where the tensors of a wire lie: on the GPUs at both ends if they are two."""
    mine = "cpu"
    if job.device.type == "cuda":
        mine = str(torch.cuda.get_device_properties(job.device).uuid)
    store.set(f"device/{end}", mine)
    other = f"device/{1 - end}"
    deadline = time.monotonic() + job.timeout_seconds
    while not store.check([other]):
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"rank {ranks[end]} waited {job.timeout_seconds:g} s to be connected with rank "
                f"{ranks[1 - end]}, which did not come; look at its output, or raise "
                "timeout_seconds"
            )
        time.sleep(_POLL_SECONDS)
    theirs = store.get(other).decode()
    two_gpus = "cpu" not in (mine, theirs) and mine != theirs
    return job.device if two_gpus else torch.device("cpu")
