"""Messages between any two ranks, taken in by a thread while the rank itself computes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from enum import IntEnum

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Handle, Peer
from scaledtrain.comm.wires.wire import Wire, empty_like
from scaledtrain.comm.wires.wiring import Job, open_wire
from scaledtrain.errors import ClusterError, PeerLostError, WaitTimeoutError

__all__ = ["WirePeers"]


_logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 3.0  # for the others to leave, too


class _Kind(IntEnum):
    CALL = 1
    ANSWER = 2


class WirePeers:
    """One rank's way to the peers of all others: a wire to each, and a thread that listens to it.

    Memory: for every other rank twice the size of a message, where messages between the two have
    been sent.

    Args:
        job: what this rank is. Every rank makes its own, at the same time.
        like: templates of the tensors of every message.
        peer: takes in what comes.
        answers: whether messages are answered with tensors, too.

    Raises:
        ClusterError: a rank did not come.
    """

    def __init__(self, job: Job, like: Sequence[Tensor], peer: Peer, answers: bool) -> None:
        self._peer = peer
        self._answers = answers
        self._timeout_seconds = job.timeout_seconds
        self._lock = threading.Lock()
        self._ends: dict[int, _End] = {}
        like = empty_like(like)
        # Two threads send at once, which one group of NCCL does not bear.
        job = replace(job, device=torch.device("cpu"))
        others = [rank for rank in range(job.size) if rank != job.rank]
        for other in others:  # every rank takes the others in the same order, so none blocks
            low, high = sorted((job.rank, other))
            # On their way may be a call and an answer each way.
            wire = open_wire(
                job,
                f"peers/{low}/{high}",
                0 if job.rank == low else 1,
                (like, like),
                (2, 2),
                (low, high),
                reads_ahead=True,
            )
            self._ends[other] = _End(other, wire)
        self.threads = [
            threading.Thread(
                target=self._listen, args=(end,), name=f"listens-to-rank-{rank}", daemon=True
            )
            for rank, end in self._ends.items()
        ]
        for thread in self.threads:
            thread.start()

    @property
    def wires(self) -> list[Wire]:
        """To all others."""
        return [end.wire for end in self._ends.values()]

    def lock(self) -> AbstractContextManager[bool]:
        """While it is held, no message reaches this rank's own peer."""
        return self._lock

    def call(self, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> Handle:
        """Begin to send a message; it is received when the handle's ``wait`` returns."""
        end = self._ends[rank]
        with end.sending:
            end.calls += 1
            call = _Call(rank, end.calls, into, self._timeout_seconds)
            end.call = call  # before the look, so that who is lost after it fails this call
            if end.lost is not None:
                raise PeerLostError(end.lost)
            end.wire.send([_Kind.CALL, end.calls], tensors)
        return call

    def close(self) -> None:
        """Leave: messages of others are no longer taken in."""
        for wire in self.wires:
            wire.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for wire in self.wires:
            wire.join(max(deadline - time.monotonic(), 0.0))
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _listen(self, end: _End) -> None:
        try:
            while True:
                kind, number, *_ = (message := end.wire.receive(None)).numbers
                if kind == _Kind.CALL:
                    assert message.tensors is not None
                    with self._lock:
                        answer = self._peer.receive(end.rank, message.tensors)
                        with end.sending:
                            written = end.wire.write(answer) if self._answers else None
                            end.wire.release()
                            end.wire.send([_Kind.ANSWER, number], written)
                else:
                    end.answered(number, message.tensors)
                    if message.tensors is not None:
                        end.wire.release()
        except ClusterError as error:
            end.lose(str(error))
        except Exception as error:  # of the peer itself
            _logger.exception("rank %d's message could not be taken in", end.rank)
            end.lose(f"rank {end.rank}'s message could not be taken in: {error!r}")
            end.wire.close()  # it must not wait for an answer


class _End:
    """What this rank knows of one other."""

    def __init__(self, rank: int, wire: Wire) -> None:
        self.rank = rank
        self.wire = wire
        self.sending = threading.Lock()  # this rank's calls, and its thread's answers
        self.calls = 0
        self.call: _Call | None = None
        self.lost: str | None = None

    def answered(self, number: float, tensors: Sequence[Tensor] | None) -> None:
        call = self.call
        if call is not None and call.number == number:  # not one that was given up before
            call.end(tensors)

    def lose(self, why: str) -> None:
        self.lost = why
        if self.call is not None:
            self.call.fail(why)


class _Call:
    """A message under way."""

    def __init__(
        self, rank: int, number: int, into: Sequence[Tensor], timeout_seconds: float
    ) -> None:
        self.number = number
        self._rank = rank
        self._into = list(into)
        self._timeout_seconds = timeout_seconds
        self._over = threading.Event()
        self._why: str | None = None

    @torch.no_grad()
    def end(self, tensors: Sequence[Tensor] | None) -> None:
        if self._into and tensors is not None:
            torch._foreach_copy_(self._into, list(tensors))
        self._over.set()

    def fail(self, why: str) -> None:
        if not self._over.is_set():
            self._why = why
            self._over.set()

    def wait(self) -> None:
        """Return when the message has been received, and the answer is there."""
        if not self._over.wait(self._timeout_seconds):
            raise WaitTimeoutError(
                f"rank {self._rank} did not take a message within {self._timeout_seconds:g} s; it "
                "is stuck, or too slow: look at it, or raise timeout_seconds"
            )
        if self._why is not None:
            raise PeerLostError(self._why)
