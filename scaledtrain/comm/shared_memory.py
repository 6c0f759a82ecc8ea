"""Memory, with semaphores in it, that the processes of one Linux host share; it has no name.

The memory comes from ``memfd_create``: it exists only as long as a process maps it, so nothing is
left behind whatever kills a job, and the size of /dev/shm does not matter. The other processes open
it through /proc/<pid>/fd of its creator.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import secrets
import stat
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.flat import aligned
from scaledtrain.comm.process import Process
from scaledtrain.comm.semaphore import Semaphore, available
from scaledtrain.errors import ConfigError, PeerLostError, RendezvousError, WaitTimeoutError

__all__ = ["SharedSegment"]

_logger = logging.getLogger(__name__)

_LINE = 64  # bytes: a cache line; one semaphore each, so that two never share one
_PAGE = 4096
_TOKEN_BYTES = 32
_SPIN_SECONDS = 60e-6  # about twice what waking a sleeper costs: spinning longer cannot win
_ASK_SECONDS = 0.002  # between two looks into the store
_SLICE_SECONDS = 0.1  # so long at most until a death is noticed, or Ctrl-C heard
_OPEN, _CLOSED, _FAILED = 0, 1, 2  # what each rank says of itself in the segment


class SharedSegment:
    """One piece of memory mapped by every rank of a group on one host, with semaphores in it.

    Made by `connect`. The memory is given back when every process has closed its segment and let
    go of the tensors and semaphores it took from it, or has ended, however it ended. Nothing in it
    outlives the processes.

    Attributes:
        rank: this process's place.
        size: how many processes share the segment.
        processes: the processes, by rank; this one included.
        memory: the bytes that the caller asked for (rounded up to pages), uint8, page-aligned and
            zero at first.
    """

    def __init__(
        self,
        mapping: mmap.mmap,
        rank: int,
        size: int,
        n_semaphores: int,
        processes: Sequence[Process],
        cpus: int,
        ranks: Sequence[int],
    ) -> None:
        with torch.inference_mode(False):  # else no tensor in it could be written outside of it
            whole = torch.frombuffer(mapping, dtype=torch.uint8)
        layout = _Layout(size, n_semaphores, 0)
        self.rank = rank
        self.size = size
        self.processes = list(processes)
        self._called = list(ranks)
        self.memory = whole[layout.data :]
        self._whole = whole
        self._states = whole[layout.states : layout.states + size].numpy()
        address = whole.data_ptr() + layout.semaphores
        self._semaphores = [Semaphore(whole, address + _LINE * i) for i in range(n_semaphores)]
        # With fewer cores than ranks, spinning keeps the awaited one from running.
        self._spin = size <= cpus

    @classmethod
    def connect(
        cls,
        store: dist.Store,
        name: str,
        rank: int,
        size: int,
        *,
        n_bytes: int,
        n_semaphores: int = 0,
        ranks: Sequence[int] | None = None,
        timeout_seconds: float,
    ) -> SharedSegment | None:
        """Map the same new memory in every rank; every rank gets the same verdict. Collective.

        Args:
            store: where the ranks meet.
            name: of this segment; the same name may be connected again, by all ranks.
            rank: this process's place, from 0.
            size: how many processes take part.
            n_bytes: size of the memory; pages that nobody touches cost nothing.
            n_semaphores: how many semaphores lie beside it, each of value 0.
            ranks: what they are called in messages, if that is not 0, 1, ... (of the job, where
                only some of its ranks share the segment).
            timeout_seconds: the longest to wait for the other ranks.

        Returns:
            The segment, or None on every rank if any of them cannot map it: another host, container
            or user, or no Linux. The log (level INFO) says why.

        Raises:
            RendezvousError: a rank did not come in time.
        """
        called = list(range(size)) if ranks is None else list(ranks)
        meeting = _Meeting(store, name, rank, called, timeout_seconds)
        layout = _Layout(size, n_semaphores, n_bytes)
        mapping: mmap.mmap | None = None
        fd, reason = -1, ""
        try:
            if rank == 0:
                try:
                    fd, mapping, offer = _create(layout, n_semaphores)
                except OSError as error:
                    offer = {"reason": f"rank {called[rank]} could not make shared memory: {error}"}
                meeting.put("offer", offer)
                reason = offer.get("reason", "")
            else:
                try:
                    mapping = _open(meeting.get("offer", 0), layout)
                except OSError as error:
                    reason = f"rank {called[rank]}: {error}"
            meeting.put(f"verdict/{rank}", _introduction(reason))
            verdicts = [meeting.get(f"verdict/{r}", r) for r in range(size)]
        finally:
            if fd >= 0:
                os.close(fd)  # whoever could open it has it mapped by now
        reasons = [v["reason"] for v in verdicts if v["reason"]]
        if not reasons and len({v["pids"] for v in verdicts}) > 1:
            reasons = ["the ranks number processes differently (other pid namespaces)"]
        if reasons:
            _logger.info("ranks do not share memory for %s: %s", name, "; ".join(reasons))
            return None
        assert mapping is not None
        cpus: set[int] = set().union(*(v["cpus"] for v in verdicts))
        processes = [Process(v["pid"]) for v in verdicts]
        return cls(mapping, rank, size, n_semaphores, processes, len(cpus), called)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A view of the shared bytes.

        Args:
            offset: its first byte in `memory`, a multiple of 64 for the fastest loads.
            shape: of the view.
            dtype: of the view; the offset must be a multiple of its size.

        Raises:
            ConfigError: it would reach beyond the memory, or lies across its elements.
        """
        n_bytes = dtype.itemsize
        for length in shape:
            n_bytes *= length
        if offset < 0 or offset % dtype.itemsize or offset + n_bytes > self.memory.numel():
            raise ConfigError(
                f"a {dtype} tensor of shape {tuple(shape)} at byte {offset} does not fit into a "
                f"shared segment of {self.memory.numel()} bytes; ask for a larger one, and for "
                f"offsets that are multiples of {dtype.itemsize}"
            )
        return self.memory[offset : offset + n_bytes].view(dtype).view(tuple(shape))

    def semaphore(self, index: int) -> Semaphore:
        """One of the semaphores, from 0."""
        return self._semaphores[index]

    def wait(
        self,
        semaphore: Semaphore,
        on: int,
        doing: str,
        timeout_seconds: float,
        spin: bool = True,
    ) -> None:
        """Take one from a semaphore that rank ``on`` posts.

        Spins briefly, then sleeps, looking ten times a second whether the other is still there. Any
        thread may wait; in the main thread Ctrl-C interrupts it.

        Args:
            semaphore: what to wait for.
            on: the rank that is to post it.
            doing: what this rank is in, for the messages.
            timeout_seconds: the longest to wait.
            spin: False where the wait is expected to be long, and other threads have work.

        Raises:
            PeerLostError: that rank died, closed the segment or gave up, and had not posted before.
            WaitTimeoutError: it is there, but did not post in time.
        """
        if semaphore.try_wait():
            return
        start = time.perf_counter()
        if spin and self._spin:
            while time.perf_counter() - start < _SPIN_SECONDS:
                if semaphore.try_wait():
                    return
        elif spin:
            os.sched_yield()  # often the awaited rank is only waiting for this core
            if semaphore.try_wait():
                return
        left = timeout_seconds
        while not semaphore.wait(min(_SLICE_SECONDS, left)):
            waited = time.perf_counter() - start
            left = max(timeout_seconds - waited, 0.0)
            lost = self._lost(on)
            if lost is None and left > 0.0:
                continue
            if semaphore.try_wait():  # posted after the slice, perhaps as the last thing it did
                return
            mine, other = self._called[self.rank], self._called[on]
            who = f"rank {mine} waited in {doing} for rank {other} (pid {self.processes[on].pid})"
            if lost is not None:
                raise PeerLostError(f"{who}, which {lost}")
            raise WaitTimeoutError(
                f"{who} for {waited:.1f} s; that process is alive, but did not come. It is stuck, "
                "too slow, or makes other calls than this one: look where it is (py-spy dump --pid "
                f"{self.processes[on].pid}), or raise timeout_seconds (now {timeout_seconds:g})"
            )

    def close(self, failed: bool = False) -> None:
        """Tell the other ranks that this one has left, and let go of the memory.

        Args:
            failed: it left because of an error; the others then say so.
        """
        self.leave(failed)
        for process in self.processes:
            process.close()
        self._semaphores = []
        self.memory = self._whole = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._states = self.memory.numpy()

    def leave(self, failed: bool = False) -> None:
        """Let the other ranks know that this one will post nothing more; it may still be read."""
        if self._states.size and self._states[self.rank] == _OPEN:
            self._states[self.rank] = _FAILED if failed else _CLOSED

    def _lost(self, rank: int) -> str | None:
        """Why nothing will come from a rank any more; None if it may."""
        states = self._states
        if not states.size:
            return "is no longer heard: a thread of this rank closed the segment meanwhile"
        if states[rank] == _CLOSED:
            return "has left: it closed its side earlier. Every rank must make the same calls"
        dead = [r for r, process in enumerate(self.processes) if not process.alive()]
        called = [self._called[r] for r in dead]
        if states[rank] == _FAILED:
            also = f" (ranks that have died: {', '.join(map(str, called))})" if dead else ""
            return f"gave up after an error of its own; its message says why{also}"
        if rank in dead:
            return (
                "has died; its own message says why, or the system's log if it was killed (out of "
                "memory?)"
            )
        return None


class _Layout:
    """Where things lie in a segment: the token, what each rank says of itself, semaphores, data."""

    def __init__(self, size: int, n_semaphores: int, n_bytes: int) -> None:
        self.states = aligned(_TOKEN_BYTES)
        self.semaphores = self.states + aligned(size)
        self.data = aligned(self.semaphores + n_semaphores * _LINE, _PAGE)
        self.total = aligned(self.data + max(n_bytes, 1), _PAGE)


class _Meeting:
    """What the ranks tell each other, once each, before they share memory."""

    def __init__(
        self, store: dist.Store, name: str, rank: int, called: list[int], timeout_seconds: float
    ) -> None:
        self._rank = called[rank]
        self._called = called
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        # All ranks connect the same names equally often, so all count to the same number.
        count = store.add(f"{name}/connected/{rank}", 1)
        self._store = dist.PrefixStore(f"{name}/{count}", store)

    def put(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(key, json.dumps(value))

    def get(self, key: str, from_rank: int) -> dict[str, Any]:
        # Asked again and again, since the store's own waiting would keep out other threads.
        why = ""
        try:
            while not self._store.check([key]):
                if time.monotonic() > self._deadline:
                    break
                time.sleep(_ASK_SECONDS)
            else:
                value: dict[str, Any] = json.loads(self._store.get(key))
                return value
        except (RuntimeError, dist.DistError) as error:
            why = f" ({str(error).splitlines()[0]})"
        raise RendezvousError(
            f"rank {self._rank} waited {self._timeout_seconds:g} s to share memory with rank "
            f"{self._called[from_rank]}, which did not come. It failed to start, or is slow to: "
            f"look at its output, or raise timeout_seconds{why}"
        )


def _introduction(reason: str) -> dict[str, Any]:
    """What a rank tells the others of itself; with an empty reason it can share."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    cpus = list(os.sched_getaffinity(0)) if available() else []
    return {"reason": reason, "pid": os.getpid(), "pids": pids, "cpus": cpus}


def _map(fd: int, n_bytes: int) -> mmap.mmap:
    # Before 3.13 Python keeps a copy of the descriptor for as long as the mapping is there.
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, n_bytes, trackfd=False)
    return mmap.mmap(fd, n_bytes)


def _create(layout: _Layout, n_semaphores: int) -> tuple[int, mmap.mmap, dict[str, Any]]:
    """New memory: its descriptor, its mapping and what the others must know to find it."""
    if not available():
        raise OSError("it needs Linux with memfd and POSIX semaphores")
    fd = os.memfd_create("scaledtrain", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, layout.total)
        mapping = _map(fd, layout.total)
        token = secrets.token_bytes(_TOKEN_BYTES)
        mapping[:_TOKEN_BYTES] = token
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        for i in range(n_semaphores):
            Semaphore(whole, whole.data_ptr() + layout.semaphores + _LINE * i).initialize()
    except BaseException:
        os.close(fd)
        raise
    return fd, mapping, {"pid": os.getpid(), "fd": fd, "token": token.hex()}


def _open(offer: dict[str, Any], layout: _Layout) -> mmap.mmap:
    """Map what another process offers, or say in an OSError why it cannot be."""
    if not available():
        raise OSError("it needs Linux with memfd and POSIX semaphores")
    if "reason" in offer:
        raise OSError("there is nothing to open")
    path = f"/proc/{offer['pid']}/fd/{offer['fd']}"
    # On another host the same path may lead to another process's file, pipe or terminal.
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size != layout.total:
        raise OSError(f"{path} is not the memory that was meant: another host or container")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapping = _map(fd, layout.total)
    finally:
        os.close(fd)
    if not secrets.compare_digest(mapping[:_TOKEN_BYTES], bytes.fromhex(offer["token"])):
        mapping.close()
        raise OSError(f"{path} holds another token: another host or container")
    return mapping
