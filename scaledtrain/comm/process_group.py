"""A `Group` over torch.distributed: gloo between CPUs, NCCL between GPUs, any number of hosts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer, bytes_of, flat_bytes
from scaledtrain.comm.protocols import Handle, ReduceOp
from scaledtrain.errors import (
    ClusterError,
    ConfigError,
    PeerLostError,
    RendezvousError,
    WaitTimeoutError,
)
from scaledtrain.timeline import Timeline

__all__ = ["TorchGroup", "backend_of", "device_of_messages", "meet_in_pairs"]

_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_GRACE_SECONDS = 4.0  # for other ranks to say that they wait, too


def backend_of(
    device: torch.device, store: dist.Store, rank: int, size: int, timeout_seconds: float
) -> str:
    """What `torch.distributed.init_process_group` is to use; all ranks call this together.

    NCCL between GPUs, gloo for what is on the CPU. NCCL refuses two ranks on one GPU: if there are
    such, gloo moves also what is on GPUs, by way of the CPU.

    Raises:
        RendezvousError: a rank did not come in time.
        PeerLostError: rank 0 died.
    """
    if device.type != "cuda":
        return "gloo"
    if store.add(f"gpu/{torch.cuda.get_device_properties(device).uuid}", 1) > 1:
        store.set("gpu/shared", "1")
    store.set(f"gpu/of/{rank}", "1")
    if store.add("gpu/chosen", 1) == size:
        store.set("gpu/all", "1")
    try:
        store.wait(["gpu/all"], timedelta(seconds=timeout_seconds))
        return "cpu:gloo,cuda:gloo" if store.check(["gpu/shared"]) else "cpu:gloo,cuda:nccl"
    except dist.DistStoreError as error:
        missing = [other for other in range(size) if not store.check([f"gpu/of/{other}"])]
        raise RendezvousError(
            f"rank {rank} waited {timeout_seconds:g} s for ranks {', '.join(map(str, missing))} to "
            "choose a GPU; all ranks of a job compute on GPUs, or none does: look at their output, "
            "and at device"
        ) from error
    except dist.DistError as error:
        raise PeerLostError(
            f"rank 0, which has the job's store, ended while rank {rank} waited for all ranks to "
            "choose a GPU; its own message says why"
        ) from error


def device_of_messages(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where tensors have to lie that one rank of a group sends to another: gloo takes the CPU's.

    Args:
        group: of torch.distributed.
        device: where the rank computes.
    """
    return device if "nccl" in dist.get_backend_config(group) else torch.device("cpu")


def meet_in_pairs(up: dist.ProcessGroup, down: dist.ProcessGroup, device: torch.device) -> None:
    """Have every two ranks connected, each pair after the last; all ranks call this together.

    NCCL connects two ranks with their first message, for which each waits until the other comes to
    it. Ranks that come to several first messages in different orders would wait in a ring.

    Args:
        up: for messages to higher ranks.
        down: the same ranks, for messages to lower ones.
        device: where messages lie.
    """
    rank, token = dist.get_rank(up), torch.zeros(1, device=device)
    for low, high in combinations(range(dist.get_world_size(up)), 2):
        for group, source, target in ((up, low, high), (down, high, low)):
            if rank == source:
                dist.send(token, group=group, group_dst=target)
            elif rank == target:
                dist.recv(token, group=group, group_src=source)
    token.item()  # the device has done it


class TorchGroup:
    """Collectives of torch.distributed, all of a call's tensors in one message per dtype.

    The time of a collective is recorded as communication: from outside, waiting for a late rank
    cannot be told from moving bytes.

    Args:
        process_group: all ranks of it call everything in the same order.
        store: where ranks find out who is missing when a collective fails.
        timeline: where time is recorded.
        timeout_seconds: only for messages; the process group has its own, equal one.
        ranks: what they are called in messages, if that is not 0, 1, ... (of the job, where only
            some of its ranks are in the group).
    """

    overlaps = True

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        store: dist.Store,
        timeline: Timeline,
        timeout_seconds: float,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._open: dist.ProcessGroup | None = process_group
        self._store = store
        self._timeline = timeline
        self._timeout_seconds = timeout_seconds
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self._ranks = list(range(self.size)) if ranks is None else list(ranks)
        self.bytes_sent = 0
        # Tensors that nobody else holds would be freed by a thread of the backend when it is done
        # with them; if Python is ending just then, that aborts the process.
        self._under_way: set[_Pending] = set()

    @property
    def _process_group(self) -> dist.ProcessGroup:
        if self._open is None:
            raise ClusterError(f"rank {self.rank} has closed its connection; make a new one")
        return self._open

    def close(self) -> None:
        """Let go of the process group, so that its threads end before Python does.

        One of them that frees the tensors of a collective while Python ends would abort the
        process, and whoever keeps this group would keep them.
        """
        self._under_way.clear()
        self._open = None

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        """Begin to reduce; the sums' order is the backend's, so results may differ by rounding."""
        start = self._timeline.now()
        self.bytes_sent += bytes_of(tensors)
        with self.clear_errors("all_reduce"):
            pending = _Pending(self, tensors, op, weight)
        self._under_way.add(pending)
        self._timeline.add("communication", start)
        return pending

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Copy rank ``src``'s values to all."""
        start = self._timeline.now()
        if src == self.rank:
            self.bytes_sent += bytes_of(tensors)
        with self.clear_errors("broadcast"):
            for tensor in tensors:
                value = tensor.detach().contiguous()
                dist.broadcast(value, group=self._process_group, group_src=src)
                if value.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(value)
        self._timeline.add("communication", start)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every rank's tensors, by rank, in one message from each."""
        start = self._timeline.now()
        self.bytes_sent += bytes_of(tensors)
        device = tensors[0].device if tensors else None
        rows = torch.empty(self.size, flat_bytes(tensors), dtype=torch.uint8, device=device)
        views = [FlatBuffer(tensors, row).views for row in rows]
        torch._foreach_copy_(views[self.rank], [t.detach() for t in tensors])
        with self.clear_errors("all_gather"):
            dist.all_gather(list(rows), rows[self.rank].clone(), group=self._process_group)
        views[self.rank] = list(tensors)
        self._timeline.add("communication", start)
        return views

    @contextmanager
    def clear_errors(self, what: str) -> Iterator[None]:
        """Say who is missing when torch.distributed only says that a connection broke.

        Every rank that fails leaves a note in the store; those that left none are where the trouble
        is.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ClusterError):
                raise
            text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            me, absent = self._ranks[self.rank], self._absent()
            names = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
            if _is_late(text):
                who = f"{names}, which did not come" if absent else "another rank"
                raise WaitTimeoutError(
                    f"rank {me} waited {self._timeout_seconds:g} s in {what} for {who}; it is "
                    "stuck or too slow, or runs another number of steps: look at it, or raise "
                    f"timeout_seconds ({text})"
                ) from error
            who = f"{names} died" if absent else "a rank died"
            raise PeerLostError(
                f"{who} while rank {me} was in {what}; all ranks end. Its own message says why, or "
                f"the system's log if it was killed (out of memory?) ({text})"
            ) from error

    def _absent(self) -> list[int]:
        try:
            self._store.set(f"failed/{self.rank}", "1")
            time.sleep(_GRACE_SECONDS)
            return [
                called
                for rank, called in enumerate(self._ranks)
                if not self._store.check([f"failed/{rank}"])
            ]
        except (RuntimeError, dist.DistError):  # the store was on the rank that died
            return [0] if self._ranks[self.rank] != 0 else []


class _Pending:
    """An all-reduce under way: one flat buffer per dtype."""

    def __init__(
        self, group: TorchGroup, tensors: Sequence[Tensor], op: ReduceOp, weight: float
    ) -> None:
        self._group = group
        self._by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            self._by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
        self._is_mean = op == "mean"
        flats = {dtype: [t.reshape(-1) for t in same] for dtype, same in self._by_dtype.items()}
        if self._is_mean:  # a one, which becomes the sum of the weights, travels with the values
            one = torch.ones(1, device=tensors[0].device)
            flats.setdefault(torch.float32, []).append(one)
            self._by_dtype.setdefault(torch.float32, [])
        self._flats = {dtype: torch.cat(same) for dtype, same in flats.items()}
        if self._is_mean and weight != 1.0:
            for flat in self._flats.values():
                if weight == 0.0:
                    flat.zero_()  # not a product: whatever a rank without samples holds is ignored
                else:
                    flat.mul_(weight)
        process_group = group._process_group
        self._works = [
            dist.all_reduce(flat, _OPS[op], group=process_group, async_op=True)
            for flat in self._flats.values()
        ]

    def wait(self) -> None:
        """Wait, and put the result into the tensors, once."""
        group, timeline = self._group, self._group._timeline
        if self not in group._under_way:
            return
        start = timeline.now()
        with group.clear_errors("all_reduce"):
            for work in self._works:
                work.wait()
        total = self._flats[torch.float32][-1].clone() if self._is_mean else None
        if total is not None and not total.is_cuda and not total.item() > 0.0:
            group._under_way.discard(self)
            raise ConfigError(
                f"the weights that the {group.size} ranks gave to a mean add up to {total.item():g}"
                ", so that it has no value; at least one rank must have a sample"
            )
        for dtype, tensors in self._by_dtype.items():
            flat = self._flats[dtype]
            offset = 0
            if total is not None:
                flat.div_(total.to(dtype) if flat.is_cuda else total.item())
            for tensor in tensors:
                tensor.copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
                offset += tensor.numel()
        group._under_way.discard(self)
        timeline.add("communication", start)


def _is_late(text: str) -> bool:
    return "imed out" in text or "timeout" in text.lower()
