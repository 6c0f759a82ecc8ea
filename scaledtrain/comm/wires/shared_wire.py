"""A wire through memory that two processes of one host share: what is sent is one copy away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer, aligned, bytes_of, flat_bytes
from scaledtrain.comm.shared_memory import SharedSegment
from scaledtrain.comm.wires.wire import NUMBERS, Message, padded

__all__ = ["SharedWire"]

_RING = 256  # messages on their way; more than one asks before it listens
_LINE = 64
_DOING = "a message"
_SEMAPHORES = 3  # of a lane: a message is there, a place in the ring is free, a slot is free


class _Lane:
    """One direction: a ring of numbers, and slots for tensors that are used in turn."""

    def __init__(
        self, segment: SharedSegment, first: int, start: int, like: Sequence[Tensor], slots: int
    ) -> None:
        self.sent, self.room, self.free = (segment.semaphore(first + i) for i in range(_SEMAPHORES))
        ring = segment.tensor(start, [_RING, _LINE // 8], torch.float64)
        self._ring = ring.numpy()  # a row of it costs less to read and write than a tensor's
        self._at = 0
        start += _RING * _LINE
        n_bytes = flat_bytes(like)
        self.slots = [
            FlatBuffer(like, segment.tensor(start + i * n_bytes, [n_bytes], torch.uint8))
            for i in range(slots)
        ]
        self.slot = 0

    @staticmethod
    def n_bytes(like: Sequence[Tensor], slots: int) -> int:
        return _RING * _LINE + aligned(slots * flat_bytes(like), 4096)

    def put(self, numbers: Sequence[float], with_tensors: bool) -> None:
        """The last place is for the mark of a message with tensors."""
        row = padded(numbers)
        row[-1] = float(with_tensors)
        self._ring[self._at % _RING] = row
        self._at += 1

    def take(self) -> tuple[list[float], bool]:
        row: list[float] = self._ring[self._at % _RING].tolist()
        self._at += 1
        return row, bool(row[-1])

    def next_slot(self) -> FlatBuffer:
        slot = self.slots[self.slot % len(self.slots)]
        self.slot += 1
        return slot


class SharedWire:
    """One end of a wire through shared memory; see `connect`.

    Args:
        segment: that both ends have mapped; this end is its rank 0 or 1.
        like: templates of the tensors that end 0 and end 1 receive.
        slots: how many messages with tensors end 0 and end 1 may hold unreleased.
        timeout_seconds: the longest to wait for a place at the other end.
    """

    def __init__(
        self,
        segment: SharedSegment,
        like: tuple[Sequence[Tensor], Sequence[Tensor]],
        slots: tuple[int, int],
        timeout_seconds: float,
    ) -> None:
        self._segment = segment
        self._other = 1 - segment.rank
        self._timeout_seconds = timeout_seconds
        middle = _Lane.n_bytes(like[0], slots[0])
        lanes = [
            _Lane(segment, _SEMAPHORES * end, middle * end, like[end], slots[end]) for end in (0, 1)
        ]
        self._incoming, self._outgoing = lanes[segment.rank], lanes[self._other]
        self._written: FlatBuffer | None = None
        self._sizes = bytes_of(like[segment.rank]), bytes_of(like[self._other])
        self.bytes_sent = 0
        self.bytes_received = 0
        for _ in range(_RING - 1):  # a sender waits for these, and a sender alone
            self._outgoing.room.post()
        for _ in self._outgoing.slots:
            self._outgoing.free.post()

    @classmethod
    def connect(
        cls,
        store: dist.Store,
        name: str,
        end: int,
        like: tuple[Sequence[Tensor], Sequence[Tensor]],
        slots: tuple[int, int],
        ranks: tuple[int, int],
        timeout_seconds: float,
    ) -> SharedWire | None:
        """Make the wire; None at both ends if they cannot share memory. Both ends call this.

        Args:
            store: where they meet.
            name: of this wire.
            end: 0 or 1.
            like: see the class.
            slots: see the class.
            ranks: of the job, at end 0 and end 1; for messages.
            timeout_seconds: the longest to wait, here and later.
        """
        segment = SharedSegment.connect(
            store,
            name,
            end,
            2,
            n_bytes=sum(map(_Lane.n_bytes, like, slots)),
            n_semaphores=2 * _SEMAPHORES,
            timeout_seconds=timeout_seconds,
            ranks=ranks,
        )
        return None if segment is None else cls(segment, like, slots, timeout_seconds)

    def write(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Copy them to where the other end will find them."""
        slot = self._place()
        slot.write(tensors)
        return slot.views

    def write_and_sum(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """Copy them to where the other end will find them."""
        slot = self._place()
        return slot.views, slot.write_and_sum(tensors)

    def _place(self) -> FlatBuffer:
        if self._written is None:
            lane = self._outgoing
            self._segment.wait(lane.free, self._other, _DOING, self._timeout_seconds)
            self._written = lane.next_slot()
        return self._written

    def send(self, numbers: Sequence[float], tensors: Sequence[Tensor] | None = None) -> None:
        """Let the other end see a message."""
        if tensors is not None:
            if self._written is None or tensors is not self._written.views:
                self.write(tensors)
            self._written = None
        self._segment.wait(self._outgoing.room, self._other, _DOING, self._timeout_seconds)
        if tensors is not None:
            self.bytes_sent += self._sizes[1]
        self._outgoing.put(numbers, tensors is not None)
        self._outgoing.sent.post()

    def receive(self, timeout_seconds: float | None) -> Message:
        """Sleep until a message is there; spins briefly where one is expected at once."""
        lane = self._incoming
        seconds = math.inf if timeout_seconds is None else timeout_seconds
        self._segment.wait(
            lane.sent, self._other, _DOING, seconds, spin=timeout_seconds is not None
        )
        numbers, with_tensors = lane.take()
        lane.room.post()
        if not with_tensors:
            return Message(numbers, None)
        self.bytes_received += self._sizes[0]
        return Message(numbers, lane.next_slot().views)

    def release(self) -> None:
        """Let the other end write into the slot that was received first."""
        self._incoming.free.post()

    def close(self) -> None:
        """Leave; the memory is given back when the tensors in it are."""
        self._segment.close()

    def join(self, seconds: float) -> None:
        """There is no thread."""


assert _LINE // 8 == NUMBERS
