"""A wire through shared memory: a gradient or a set of parameters is one copy away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer, flat_bytes
from scaledtrain.comm.remote_store import HEADER_NUMBERS, Request
from scaledtrain.comm.shared_memory import Semaphore, SharedSegment, aligned

__all__ = ["SharedServerWire", "SharedWorkerWire", "connect_mailboxes"]

# At most a push and one other request are on their way, so a ring of two headers never overflows.
_RING = 2
_HEADER_BYTES = 64
_SEMAPHORES = 3  # per worker: a request is there, an answer is there, the gradient's place is free


class _Mailbox:
    """One worker's part of the segment: headers, answer, gradient, parameters."""

    def __init__(self, segment: SharedSegment, worker: int, like: Sequence[Tensor]) -> None:
        n_bytes = flat_bytes(like)
        start = worker * _mailbox_bytes(like)
        shape = [HEADER_NUMBERS]
        self.requests = [
            segment.tensor(start + i * _HEADER_BYTES, shape, torch.float64) for i in range(_RING)
        ]
        start += _RING * _HEADER_BYTES
        self.answer = segment.tensor(start, shape, torch.float64)
        start += _HEADER_BYTES
        self.gradient = FlatBuffer(like, segment.tensor(start, [n_bytes], torch.uint8))
        start += n_bytes
        self.parameters = FlatBuffer(like, segment.tensor(start, [n_bytes], torch.uint8))
        first = worker * _SEMAPHORES
        self.requested: Semaphore = segment.semaphore(first)
        self.answered: Semaphore = segment.semaphore(first + 1)
        self.free: Semaphore = segment.semaphore(first + 2)


def _mailbox_bytes(like: Sequence[Tensor]) -> int:
    return aligned((_RING + 1) * _HEADER_BYTES + 2 * flat_bytes(like), 4096)


def connect_mailboxes(
    store: dist.Store,
    rank: int,
    size: int,
    like: Sequence[Tensor],
    server_rank: int,
    timeout_seconds: float,
) -> SharedSegment | None:
    """Make the memory for all workers of one server; None on every rank if it cannot be shared."""
    return SharedSegment.connect(
        store,
        "server",
        rank,
        size,
        n_bytes=size * _mailbox_bytes(like),
        n_semaphores=size * _SEMAPHORES,
        creator=server_rank,
        timeout_seconds=timeout_seconds,
    )


class SharedWorkerWire:
    """The worker's end.

    Args:
        segment: from `connect_mailboxes`.
        like: the parameters (their shapes and dtypes).
        server_rank: where the server is.
        timeout_seconds: the longest wait for an answer.
    """

    def __init__(
        self,
        segment: SharedSegment,
        like: Sequence[Tensor],
        server_rank: int,
        timeout_seconds: float,
    ) -> None:
        self._segment = segment
        self._mailbox = _Mailbox(segment, segment.rank, like)
        self.parameters = self._mailbox.parameters
        self._server_rank = server_rank
        self._timeout_seconds = timeout_seconds
        self._sent = 0
        self._pushed = False

    def push(self, gradient: Sequence[Tensor], version: int) -> None:
        """Copy the gradient into the mailbox, once the one before has been used."""
        if self._pushed:
            self._wait(self._mailbox.free, Request.PUSH, self._timeout_seconds)
        self._pushed = True
        self._mailbox.gradient.write(gradient)
        self._send(Request.PUSH, version)

    def ask(self, kind: Request, number: float) -> Sequence[float]:
        """Post a request and wait for the answer."""
        self._send(kind, number)
        # How long a worker may wait is the server's to judge; here only its death counts.
        self._wait(self._mailbox.answered, kind, math.inf)
        numbers: list[float] = self._mailbox.answer.tolist()
        return numbers

    def take_parameters(self) -> None:
        """Nothing to do: they lie in the mailbox."""

    def close(self) -> None:
        """Say so."""
        self._send(Request.CLOSE, 0.0)

    def _send(self, kind: Request, number: float) -> None:
        header = self._mailbox.requests[self._sent % _RING]
        header[0], header[1] = float(kind), number
        self._sent += 1
        self._mailbox.requested.post()

    def _wait(self, semaphore: Semaphore, kind: Request, seconds: float) -> None:
        doing = f"{kind.name.lower()} (the server is on rank {self._server_rank})"
        self._segment.wait(semaphore, self._server_rank, doing, seconds)


class SharedServerWire:
    """The server's end of one worker's mailbox.

    Args:
        segment: from `connect_mailboxes`.
        worker: the rank at the other end.
        like: the parameters.
    """

    def __init__(self, segment: SharedSegment, worker: int, like: Sequence[Tensor]) -> None:
        self._segment = segment
        self._worker = worker
        self._mailbox = _Mailbox(segment, worker, like)
        self.gradient = self._mailbox.gradient
        self.parameters = self._mailbox.parameters
        self._received = 0

    def next_request(self) -> tuple[Request, float]:
        """Sleep until the worker asks for something."""
        segment, worker = self._segment, self._worker
        segment.wait(self._mailbox.requested, worker, "serving", math.inf, spin=False)
        kind, number = self._mailbox.requests[self._received % _RING].tolist()[:2]
        self._received += 1
        return Request(int(kind)), number

    def handled_push(self) -> None:
        """Let the worker write the next gradient."""
        self._mailbox.free.post()

    def answer(self, header: Sequence[float], with_parameters: bool) -> None:
        """Write the header; the parameters are already there."""
        self._mailbox.answer.copy_(torch.tensor(header, dtype=torch.float64))
        self._mailbox.answered.post()
