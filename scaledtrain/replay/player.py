"""Lets the events of a log happen again, in their order, to a server in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Pulled
from scaledtrain.comm.serving.event_log import Event
from scaledtrain.comm.serving.partition import Partition
from scaledtrain.errors import ReplayError
from scaledtrain.replay.history import OWN, History, Life
from scaledtrain.server import Server
from scaledtrain.server.operations import Kind, Operation, Outcome, apply
from scaledtrain.sim.world import Rank, World

__all__ = ["Arrived", "Player", "Request", "Shards"]

_NAMES = {Kind.PULL: "pulls", Kind.PUSH: "pushes", Kind.READ: "takes the final parameters"}


class Shards:
    """A server as its shards, each with its part, as on real processes.

    Args:
        servers: of each shard.
        partition: what each holds.
        like: the parameters.
    """

    def __init__(
        self, servers: Sequence[Server], partition: Partition, like: Sequence[Tensor]
    ) -> None:
        self.first = servers[0]
        self._servers = servers
        self._partition = partition
        self._like = [t.detach() for t in like]

    def apply(self, operation: Operation, gradient: Sequence[Tensor] = ()) -> list[Outcome]:
        """Let each shard do it; returns what came of it on each."""
        return [
            apply(server, operation, self._partition.part(gradient, shard) if gradient else ())
            for shard, server in enumerate(self._servers)
        ]

    @torch.no_grad()
    def copy(self, parts: Sequence[Sequence[Tensor]], into: Sequence[Tensor]) -> None:
        """Put the shards' parts together."""
        for shard, part in enumerate(parts):
            places = self._partition.part(into, shard)
            for place, value in zip(places, part, strict=True):
                place.copy_(value)

    def parameters(self) -> list[Tensor]:
        """A copy of all parameters as they are now, in the server's dtype."""
        parts = [server.parameters for server in self._servers]
        wide = [t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in self._like]
        self.copy(parts, wide)
        return wide


@dataclass
class Request:
    """What a worker wants of the server."""

    kind: Kind
    version: int = -1
    tensors: Sequence[Tensor] = ()
    """The gradient that it pushes, or where the parameters are to go."""
    pulled: Pulled | None = None
    """The answer."""
    done: bool = False
    waiting: Rank | None = None


@dataclass(frozen=True)
class Arrived:
    """A push that has just happened."""

    number: int
    """Of the event."""
    event: Event
    step: int
    """Which of the worker's pushes it is, from 1."""
    gradient: Sequence[Tensor]
    """As the server received it."""
    before: list[Tensor]
    """The server's parameters."""
    after: list[Tensor]


class Player:
    """The log, how far it has been played, and who waits for his turn.

    Args:
        world: whose ranks make the requests.
        events: of the log.
        history: of these events.
        revive: starts a new process of a worker.
        watch: called with each push when it has happened; returns whether to go on.

    Attributes:
        position: events that have happened.
        shards: the server, once it has been made.
        stopped: ``watch`` did not want to go on.
    """

    def __init__(
        self,
        world: World,
        events: Sequence[Event],
        history: History,
        revive: Callable[[int, Life], None],
        watch: Callable[[Arrived], bool] | None,
    ) -> None:
        self.position = 0
        self.shards: Shards | None = None
        self.stopped = False
        self._world = world
        self._events = events
        self._history = history
        self._revive = revive
        self._watch = watch
        self._requests: dict[Life, list[Request]] = {}
        self._current = [history.first(worker) for worker in range(len(world.ranks))]
        self._complete = True
        self._failed = False
        world.on_stall(self._on_stall)

    @property
    def finished(self) -> bool:
        """Whether every event has happened."""
        return self.position == len(self._events)

    def serve(self, shards: Shards) -> None:
        """This is the server."""
        self.shards = shards
        for life in self._requests:
            self._look(life)
        self._advance()

    def ask(self, life: Life, request: Request) -> Request:
        """Put a request behind those that the process has made before."""
        self._requests.setdefault(life, []).append(request)
        self._look(life)
        self._advance()
        return request

    def wait(self, request: Request) -> None:
        """Return when it is its turn, and it has been answered."""
        while not request.done:
            request.waiting = self._world.running
            request.waiting.wait(f"for the log to come to where it {_NAMES[request.kind]}")

    def _look(self, life: Life) -> None:
        """Answer the first requests, as long as the log has nothing to say to them."""
        requests = self._requests[life]
        while requests and self.shards is not None:
            request = requests[0]
            expected = life.expects(request.kind)
            if expected in ("next", "never"):
                return
            if expected == "other":
                self._fail(life, _NAMES[request.kind])
                return
            del requests[0]
            self._answer(request, life, stopped=True)

    def _fail(self, life: Life, does: str) -> None:
        number = life.next_number
        assert number is not None
        kind, worker, _ = self._events[number].operation
        self.fail(
            f"event {number + 1} of the log: worker {worker} {_NAMES[kind]}, but in the replay it "
            f"{does}"
        )

    def fail(self, why: str) -> None:
        """End the replay with an error, from whatever rank runs now."""

        def raise_error() -> None:
            raise _unlike(why)

        self._failed = True
        self._world.at(self._world.now, -1, raise_error)

    def raise_unless_finished(self) -> None:
        """Nobody can go on: at the end of the log, that is as it should be.

        Raises:
            ReplayError: it is not the end.
        """
        if not (self.finished or self.stopped):
            kind, worker, _ = self._events[self.position].operation
            raise _unlike(
                f"event {self.position + 1} of the log: worker {worker} {_NAMES[kind]}, but in the "
                "replay it does not"
            )

    def _answer(self, request: Request, life: Life, stopped: bool = False) -> None:
        assert self.shards is not None
        request.pulled = Pulled(
            version=self.shards.first.version,
            staleness=-1,
            learning_rate=self.shards.first.learning_rate,
            stopped=stopped or self.shards.first.finished,
            complete=self._complete,
        )
        request.done = True
        if request.waiting is not None:
            request.waiting.wake()

    def _advance(self) -> None:
        """Let everything happen that can."""
        while not (self.finished or self._failed or self.stopped) and self.shards is not None:
            event, life = self._events[self.position], self._history.of_event[self.position]
            if event.operation.kind not in OWN:
                self._by_itself(event, life)
                continue
            assert life is not None
            requests = self._requests.get(life)
            if not requests:
                return
            request = requests.pop(0)
            life.happened()
            self.position += 1
            if event.operation.kind == Kind.PUSH:
                self._push(event, request)
            else:
                outcomes = self.shards.apply(event.operation)
                self.shards.copy([outcome.tensors for outcome in outcomes], request.tensors)
            self._answer(request, life)
            self._look(life)

    def _by_itself(self, event: Event, life: Life | None) -> None:
        assert self.shards is not None
        number, operation = self.position, event.operation
        self.position += 1
        self._complete = self._complete and number not in self._history.losses
        if life is not None and life is not self._current[operation.worker]:
            self._current[operation.worker] = life
            self._revive(operation.worker, life)
        self.shards.apply(operation)

    def _push(self, event: Event, request: Request) -> None:
        assert self.shards is not None
        number, told = self.position, event.operation
        if request.version != told.version:
            self.fail(
                f"event {number} of the log: worker {told.worker} pushes a gradient of version "
                f"{told.version}, but in the replay one of version {request.version}"
            )
            return
        before = [] if self._watch is None else self.shards.parameters()
        outcome = self.shards.apply(told, request.tensors)[0]
        if (outcome.accepted, outcome.staleness) != (event.accepted, event.staleness):
            self.fail(
                f"event {number} of the log: a push of worker {told.worker} was "
                f"{_judged(event.accepted)} with staleness {event.staleness}, but in the replay it "
                f"is {_judged(outcome.accepted)} with staleness {outcome.staleness}"
            )
        elif self._watch is not None:
            step = self.shards.first.ledger.pushed[told.worker]
            after = self.shards.parameters()
            arrived = Arrived(number, event, step, request.tensors, before, after)
            if not self._watch(arrived):
                self.stopped = True
                self._world.at(self._world.now, -1, self._end)

    def _on_stall(self) -> bool:
        self.raise_unless_finished()
        self._end()
        return True

    def _end(self) -> None:
        for rank in self._world.ranks:
            rank.kill()


def _unlike(why: str) -> ReplayError:
    return ReplayError(
        f"{why}; the code or the data of this run are not those that it was made with, or time "
        "decided something that the log does not say"
    )


def _judged(accepted: bool) -> str:
    return "accepted" if accepted else "rejected"
