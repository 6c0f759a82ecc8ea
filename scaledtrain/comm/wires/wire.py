"""A connection between two ranks: messages of a few numbers, and tensors with those that carry any.

Everything that a parameter server and its workers tell each other goes over wires. What a message
means is written elsewhere; a wire only carries it: inside a process, through shared memory, or over
torch.distributed.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer
from scaledtrain.errors import PeerLostError, WaitTimeoutError

__all__ = ["NUMBERS", "LocalWire", "Message", "Wire", "empty_like", "padded"]

NUMBERS = 8  # float64 in every message (whole ones exact up to 2^53); a wire may use the last


class Message(NamedTuple):
    """What came."""

    numbers: Sequence[float]
    tensors: Sequence[Tensor] | None
    """In memory of the wire, until they are released; None if the message carried none."""


class Wire(Protocol):
    """One end. One thread sends and one receives at a time; they may be two.

    What has been sent arrives, even if the sender dies at once.

    Attributes:
        bytes_sent: of the tensors sent to another process so far.
        bytes_received: of those received from one.
    """

    bytes_sent: int
    bytes_received: int

    def write(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Copy tensors to where they are sent from, for a `send` that follows; returns them there.

        Raises:
            WaitTimeoutError: the other end has not released what it was sent before.
            PeerLostError: the other end died.
        """

    def write_and_sum(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """`write`; also returns the sum of all values, which is not finite if one of them is not.

        What was written need not be sent: the next takes its place.
        """

    def send(self, numbers: Sequence[float], tensors: Sequence[Tensor] | None = None) -> None:
        """Send numbers, at most 7 of them, and tensors; those may be reused on return.

        Raises:
            WaitTimeoutError: the other end does not take it.
            PeerLostError: the other end died.
        """

    def receive(self, timeout_seconds: float | None) -> Message:
        """Wait for the next message; None: for as long as the other end lives.

        Raises:
            WaitTimeoutError: none came in time. The wire cannot be used any more.
            PeerLostError: the other end died.
        """

    def release(self) -> None:
        """The tensors that were received first, of those not released yet, are used no more."""

    def close(self) -> None:
        """Give back what this end holds; the other end learns of it."""

    def join(self, seconds: float) -> None:
        """After `close`: wait until no thread of this end runs, which may take the other end."""


def padded(numbers: Sequence[float]) -> list[float]:
    """As many numbers as every message has."""
    return [*map(float, numbers), *[0.0] * (NUMBERS - len(numbers))]


class LocalWire:
    """One end of a wire between two threads of one process, which sends nothing to another.

    Args:
        incoming: templates of the tensors that this end receives.
        slots: how many messages with tensors it may hold unreleased.
        what: who is at the other end, for messages.
        timeout_seconds: the longest that the other end waits for a slot.
    """

    bytes_sent = 0
    bytes_received = 0

    def __init__(
        self, incoming: Sequence[Tensor], slots: int, what: str, timeout_seconds: float
    ) -> None:
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[FlatBuffer] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put(FlatBuffer(incoming))
        self._lent: queue.SimpleQueue[FlatBuffer] = queue.SimpleQueue()
        self._what = what
        self._timeout_seconds = timeout_seconds
        self._other: LocalWire = self
        self._written: FlatBuffer | None = None

    @classmethod
    def pair(
        cls,
        incoming: tuple[Sequence[Tensor], Sequence[Tensor]],
        slots: tuple[int, int],
        whats: tuple[str, str],
        timeout_seconds: float,
    ) -> tuple[LocalWire, LocalWire]:
        """Both ends; each argument is for the first end and for the second."""
        first, second = (
            cls(incoming[end], slots[end], whats[1 - end], timeout_seconds) for end in (0, 1)
        )
        first._other, second._other = second, first
        return first, second

    def write(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Copy them into a free slot of the other end."""
        slot = self._place()
        slot.write(tensors)
        return slot.views

    def write_and_sum(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """Copy them into a free slot of the other end."""
        slot = self._place()
        return slot.views, slot.write_and_sum(tensors)

    def _place(self) -> FlatBuffer:
        if self._written is None:
            try:
                self._written = self._other._free.get(timeout=self._timeout_seconds)
            except queue.Empty:
                raise WaitTimeoutError(
                    f"{self._what} has not taken what it was sent {self._timeout_seconds:g} s ago; "
                    "it is stuck or too slow: look at it, or raise timeout_seconds"
                ) from None
        return self._written

    def send(self, numbers: Sequence[float], tensors: Sequence[Tensor] | None = None) -> None:
        """Put a message into the other end's queue."""
        if tensors is not None:
            if self._written is None or tensors is not self._written.views:
                tensors = self.write(tensors)
            assert self._written is not None
            self._other._lent.put(self._written)
            self._written = None
        self._other._inbox.put(Message(padded(numbers), tensors))

    def receive(self, timeout_seconds: float | None) -> Message:
        """Take the next message out of the queue."""
        try:
            message = self._inbox.get(timeout=timeout_seconds)
        except queue.Empty:
            raise WaitTimeoutError(
                f"waited {timeout_seconds:g} s for {self._what}; it is stuck or too slow: look at "
                "it, or raise timeout_seconds"
            ) from None
        if message is None:
            self._inbox.put(None)
            raise PeerLostError(f"{self._what} has ended; its own message says why")
        return message

    def release(self) -> None:
        """Make a slot free again."""
        self._free.put(self._lent.get_nowait())

    def close(self) -> None:
        """Wake whoever waits at the other end."""
        self._other._inbox.put(None)

    def join(self, seconds: float) -> None:
        """There is no thread."""


def empty_like(like: Sequence[Tensor], device: torch.device | str = "cpu") -> list[Tensor]:
    """Tensors of the same shapes and dtypes, of undefined values."""
    return [torch.empty(t.shape, dtype=t.dtype, device=device) for t in like]
