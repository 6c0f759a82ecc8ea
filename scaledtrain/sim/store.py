"""A worker's access to a server in virtual time: the server is the one of real runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.flat import bytes_of
from scaledtrain.comm.protocols import Pulled, ServeOptions
from scaledtrain.comm.serving.encoding import RoundTrip
from scaledtrain.comm.serving.host import ServerHost
from scaledtrain.comm.serving.partition import Partition
from scaledtrain.comm.serving.requests import FAULTS, find_fault
from scaledtrain.errors import ClusterError
from scaledtrain.sim.post import Post, Route
from scaledtrain.sim.world import Rank, World
from scaledtrain.timeline import Timeline

__all__ = ["VirtualServer", "VirtualStore"]


@dataclass(frozen=True)
class VirtualServer:
    """One server, whose shards are places from where its parts are sent.

    Args:
        host: does what the workers ask for.
        homes: the rank of each shard; the first one orders.
        partition: what each shard holds.
        options: as the strategy gave them.
    """

    host: ServerHost
    homes: Sequence[int]
    partition: Partition
    options: ServeOptions

    def bytes_of_shards(self, tensors: Sequence[Tensor]) -> list[int]:
        """Of these parameters, by shard."""
        return [bytes_of(self.partition.part(tensors, s)) for s in range(len(self.homes))]


class VirtualStore:
    """The store of one worker.

    A push travels to every shard, and counts when its last part has come; a pull is asked of the
    first shard, behind the push, and answered by all of them at that moment. The parts' way is what
    takes time; what the server computes takes none.

    Args:
        server: the one.
        world: where it is.
        post: carries the messages.
        me: the worker's rank.
        attempt: how often it has come back.
        like: the parameters.
        timeline: where waiting and communication are recorded.
        own_card: what comes from this server is all that comes into this worker's host.
    """

    def __init__(
        self,
        server: VirtualServer,
        world: World,
        post: Post,
        me: Rank,
        attempt: int,
        like: Sequence[Tensor],
        timeline: Timeline,
        own_card: bool,
    ) -> None:
        self._server = server
        self._host = server.host
        self._world = world
        self._post = post
        self._me = me
        self._worker = me.number
        self._attempt = attempt
        self._like = list(like)
        self._timeline = timeline
        self._own_card = own_card
        self._there = [post.route(self._worker, home) for home in server.homes]
        self._back = [post.route(home, self._worker) for home in server.homes]
        self._pull_bytes = server.bytes_of_shards(like)
        codec, shards = server.options.compression, len(server.homes)
        self._compressed: RoundTrip | None = None
        if codec is not None:
            self._compressed = RoundTrip(codec, server.partition, like, shards)
        self._ahead: _Ahead | None = None
        self._line = _Line()
        self.bytes_sent = 0

    def start(self, last_version: int | None) -> None:
        """Wait for all workers."""
        start = self._timeline.now()
        self._ask(self._me)
        self._host.start(self._worker, last_version, None, self._attempt)
        self._answer(self._me, [0])
        self._timeline.add("waiting", start)

    def push(self, update: Sequence[Tensor], version: int, speed: float = 0.0) -> None:
        """Send the shards their parts."""
        fault = None if update[0].is_meta else find_fault(self._worker, update, self._like)
        if fault is not None:
            why = FAULTS[fault]
            self._tell(lambda: self._host.reject(self._worker, version, why, self._attempt))
            return
        sizes, gradient = self._encoded(update)
        self.bytes_sent += sum(sizes)

        def push() -> None:
            with suppress(ClusterError):  # the server failed: whoever asks it next is told
                self._host.push(self._worker, gradient, version, speed, self._attempt)

        self._send(self._there, sizes, self._line.place(push, self._world.now))

    def _encoded(self, update: Sequence[Tensor]) -> tuple[list[int], Sequence[Tensor]]:
        """What each shard is sent, in bytes; and what the server makes of it, as it is now."""
        if self._compressed is not None:
            return self._compressed.make(update)
        if self._server.homes == [self._worker]:  # it is used before anybody changes it
            return [0], update
        return self._server.bytes_of_shards(update), [u.detach().clone() for u in update]

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Take what was asked for, or ask now."""
        if not self._server.options.overlap:
            return self._take(self._me, self._host.pull, into)
        ahead = self._ahead or self._ask_ahead(self._host.pull)
        start = self._timeline.now()
        pulled = ahead.wait(self._me)
        self._timeline.add("waiting", start)
        _copy(into, ahead.tensors)
        self._ahead = None if pulled.stopped else self._ask_ahead(self._host.pull)
        return pulled

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait for all workers, then take the parameters."""
        if self._ahead is not None:
            self._ahead.wait(self._me)
            self._ahead = None
        return self._take(self._me, self._host.settle, into)

    def skip(self) -> None:
        """Let the server count a step without a gradient."""
        self._tell(lambda: self._host.skip(self._worker, self._attempt))

    def version(self) -> int:
        """Ask the server."""
        self._ask(self._me)
        version = self._host.version(self._worker, self._attempt)
        self._answer(self._me, [0])
        return version

    def stop(self) -> None:
        """Ask that every worker ends."""
        self._tell(self._host.stop)

    def state_dict(self) -> dict[str, Any]:
        """On the rank of its first shard the server's state; what this worker has not sent yet."""
        local = self._host.state_dict() if self._worker == self._server.homes[0] else {}
        if self._compressed is None:
            return local
        return {**local, "feedback": self._compressed.encoder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the server's state, and this worker's."""
        if self._worker == self._server.homes[0]:
            self._host.load_state_dict(state)
        if self._compressed is not None and "feedback" in state:
            self._compressed.encoder.load_state_dict(state["feedback"])

    def close(self) -> None:
        """Leave."""
        self._tell(lambda: self._host.leave(self._worker, self._attempt))

    def _take(self, me: Rank, give: Callable[..., Pulled], into: Sequence[Tensor]) -> Pulled:
        start = self._timeline.now()
        self._ask(me)
        pulled = give(self._worker, lambda tensors: _copy(into, tensors), None, self._attempt)
        start = self._timeline.add("waiting", start)
        self._answer(me, self._pull_bytes)
        self._timeline.add("communication", start)
        return pulled

    def _ask_ahead(self, give: Callable[..., Pulled]) -> _Ahead:
        ahead = _Ahead([torch.empty_like(t) for t in self._like])

        def run() -> None:
            errand = self._world.running
            self._ask(errand, self._line.hold)
            pulled = give(
                self._worker, lambda tensors: _copy(ahead.tensors, tensors), None, self._attempt
            )
            self._line.go_on()
            self._answer(errand, self._pull_bytes)
            ahead.came(pulled)

        self._me.begin_errand(run)
        return ahead

    def _ask(self, me: Rank, at_once: Callable[[], None] = lambda: None) -> None:
        """Return when the server has heard a question, behind all that was sent before.

        Args:
            me: who asks.
            at_once: done when it is heard.
        """
        heard = waits = False

        def hear() -> None:
            nonlocal heard
            heard = True
            at_once()
            if waits:
                me.go_on()

        self._tell(hear)
        if not heard:
            waits = True
            me.wait("for the server to hear it")

    def _answer(self, me: Rank, sizes: Sequence[int]) -> None:
        """The shards' parts come; ``me`` waits for the last."""
        come = waits = False

        def arrived() -> None:
            nonlocal come
            come = True
            if waits:
                me.go_on()

        self._send(self._back, sizes, arrived, self._own_card)
        if not come:
            waits = True
            me.wait("for the server's parameters to come")

    def _send(
        self,
        routes: Sequence[Route],
        sizes: Sequence[int],
        arrived: Callable[[], None],
        last_is_own: bool = False,
    ) -> None:
        """Send parts over several ways; ``arrived``, when the last has come."""
        missing = len(sizes)
        if missing == 1:
            self._post.send(routes[0], sizes[0], self._worker, arrived, last_is_own)
            return

        def one_arrived() -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                arrived()

        for route, n_bytes in zip(routes, sizes, strict=False):
            self._post.send(route, n_bytes, self._worker, one_arrived, last_is_own)

    def _tell(self, what: Callable[[], object]) -> None:
        """Send the first shard a message without tensors."""

        def arrived() -> None:
            with suppress(ClusterError):
                what()

        if not self._line.follow(arrived, self._world.now):
            self._send(self._there, [0], self._line.place(arrived, self._world.now))


class _Line:
    """A worker's messages are taken in the order in which it sent them, whatever their ways.

    One without tensors that is sent at the same moment as the one before it, and so comes with it,
    needs no way of its own. A server that lets a worker wait for an answer takes none of its
    messages meanwhile.
    """

    def __init__(self) -> None:
        self._under_way: deque[_Sent] = deque()
        self._held = False

    def place(self, action: Callable[[], None], now: float) -> Callable[[], None]:
        """For a message that is sent now; to be called when it has come.

        Args:
            action: what is done with it when all before it have come, too.
            now: the time.
        """
        sent = _Sent(action, now)
        self._under_way.append(sent)

        def come() -> None:
            sent.has_come = True
            self._take()

        return come

    def _take(self) -> None:
        while not self._held and self._under_way and self._under_way[0].has_come:
            first = self._under_way[0]
            action = first.actions.popleft()
            if not first.actions:
                self._under_way.popleft()
            action()

    def hold(self) -> None:
        """Take no message any more."""
        self._held = True

    def go_on(self) -> None:
        """Take messages again."""
        self._held = False
        self._take()

    def follow(self, action: Callable[[], None], now: float) -> bool:
        """Let something be done right after the last message, if that is sent at this moment."""
        last = self._under_way[-1] if self._under_way else None
        if last is None or last.has_come or last.sent_at != now:
            return False
        last.actions.append(action)
        return True


class _Sent:
    """A message, and what is done when it has come."""

    __slots__ = ("actions", "has_come", "sent_at")

    def __init__(self, action: Callable[[], None], sent_at: float) -> None:
        self.actions = deque([action])
        self.sent_at = sent_at
        self.has_come = False


class _Ahead:
    """Parameters that were asked for, and are taken later."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._pulled: Pulled | None = None
        self._waiting: Rank | None = None

    def came(self, pulled: Pulled) -> None:
        self._pulled = pulled
        if self._waiting is not None:
            self._waiting.wake()

    def wait(self, me: Rank) -> Pulled:
        if self._pulled is None:
            self._waiting = me
            me.wait("for parameters that it asked for ahead")
        assert self._pulled is not None
        return self._pulled


@torch.no_grad()
def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    if not tensors[0].is_meta:
        torch._foreach_copy_(list(into), list(tensors))
