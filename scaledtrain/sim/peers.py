"""Messages to the others' peers in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from scaledtrain.comm.flat import bytes_of
from scaledtrain.comm.protocols import Peer
from scaledtrain.errors import PeerLostError
from scaledtrain.sim.post import Post
from scaledtrain.sim.world import Rank

__all__ = ["Door", "VirtualPeers"]


class Door:
    """Where messages to one rank's peer arrive; they wait outside while the rank is busy with it.

    Args:
        peer: takes them.
    """

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._locked = False
        self._outside: list[Callable[[], None]] = []

    def enter(self, visit: Callable[[], None]) -> None:
        """Do something with the peer, as soon as it is not locked."""
        if self._locked:
            self._outside.append(visit)
        else:
            visit()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no message reaches the peer."""
        self._locked = True
        try:
            yield
        finally:
            self._locked = False
            outside, self._outside = self._outside, []
            for visit in outside:
                visit()


class VirtualPeers:
    """One rank's way to the peers of all others.

    Args:
        doors: of all ranks that live, by rank.
        me: this rank.
        post: carries the messages.
        answers: whether messages are answered with tensors, too.
    """

    def __init__(self, doors: dict[int, Door], me: Rank, post: Post, answers: bool) -> None:
        self._doors = doors
        self._me = me
        self._post = post
        self._answers = answers
        self.bytes_sent = 0

    def lock(self) -> AbstractContextManager[None]:
        """While it is held, no message reaches this rank's own peer."""
        return self._doors[self._me.number].lock()

    def call(self, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> _Call:
        """Begin to send a message; it is received when the handle's ``wait`` returns."""
        self.bytes_sent += bytes_of(tensors)
        call = _Call(self._me, rank)
        me = self._me.number

        def arrived() -> None:
            door = self._doors.get(rank)
            if door is None:
                call.end()
            else:
                door.enter(lambda: receive(door))

        def receive(door: Door) -> None:
            answer = door.peer.receive(me, tensors)
            copies = [t.clone() for t in answer] if self._answers else []
            back = self._post.route(rank, me)
            self._post.send(back, bytes_of(copies), me, lambda: answered(copies))

        @torch.no_grad()
        def answered(copies: list[Tensor]) -> None:
            if into and not into[0].is_meta:
                torch._foreach_copy_(list(into), copies)
            call.received = True
            call.end()

        self._post.send(self._post.route(me, rank), bytes_of(tensors), me, arrived)
        return call


class _Call:
    """A message under way."""

    def __init__(self, me: Rank, rank: int) -> None:
        self.received = False
        self._me = me
        self._rank = rank
        self._ended = False
        self._waits = False

    def end(self) -> None:
        """The answer has come, or never will."""
        self._ended = True
        if self._waits:
            self._me.wake()

    def wait(self) -> None:
        """Return when the message has been received, and the answer is there."""
        if not self._ended:
            self._waits = True
            self._me.wait(f"for an answer of rank {self._rank}")
            self._waits = False
        if not self.received:
            raise PeerLostError(f"rank {self._rank} died")
