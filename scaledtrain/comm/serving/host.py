"""A server among threads: one lock, a condition on which workers wait, and who is still alive.

The order in which threads get the lock is the order of events: the server's shards on other ranks
are told of each event in this order, and the event log writes it down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from scaledtrain.comm.protocols import Pulled
from scaledtrain.comm.serving.event_log import EventLog
from scaledtrain.comm.serving.requests import Request, numbers_of
from scaledtrain.comm.serving.roll import Meeting, Roll
from scaledtrain.comm.wires.wire import Wire
from scaledtrain.errors import ClusterError, PeerLostError, WaitTimeoutError
from scaledtrain.server import Server
from scaledtrain.server.operations import Kind, Operation, Outcome, apply

__all__ = ["SIGNS_OF_LIFE", "Condition", "ServerHost", "Write"]

_logger = logging.getLogger(__name__)

Write = Callable[[Sequence[Tensor]], object]
"""Copies what a worker is given to where it goes."""

_MAX_FAULTS = 100  # in a row: then no good gradient is to be expected any more
SIGNS_OF_LIFE = 4  # to a worker that waits, in the time after which it would give up


class Condition(Protocol):
    """Where threads wait until something is true, as ``threading.Condition`` has it."""

    def __enter__(self) -> bool:
        """Take the lock."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Give it back."""

    def acquire(self) -> bool:
        """Take the lock again."""

    def release(self) -> None:
        """Give it back for a while."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait, without the lock, until it is true or the time is over; returns which."""

    def notify_all(self) -> None:
        """Let those that wait here look again."""


def _conditions_of_threads() -> Callable[[], Condition]:
    lock = threading.RLock()
    return lambda: threading.Condition(lock)


class ServerHost:
    """Lets the threads that speak for the workers call one `Server`, each for its worker.

    A worker that dies is forgotten, and nobody waits for it any more. So is one that shows no sign
    of life for ``timeout_seconds`` while others wait for it; it takes part again when it pulls.

    A process that takes the place of one that died has its ``attempt``, 1 and so on, in its calls;
    what the one before asks for then raises PeerLostError.

    Args:
        server: the pure state machine; nothing else may touch it.
        timeout_seconds: the longest that workers wait for one that does nothing.
        log: where events are written.
        condition: makes conditions that share one lock; default: for threads.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        server: Server,
        timeout_seconds: float,
        log: EventLog | None = None,
        *,
        condition: Callable[[], Condition] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        condition = condition or _conditions_of_threads()
        self._server = server
        self._timeout_seconds = timeout_seconds
        self._log = log
        self._shards: list[Wire] = []
        self._relays: list[Wire] = []  # those of them that pass answers on
        self._changed = condition()  # on which those wait whom the admission policy keeps
        self._met = condition()  # ... who have come to a meeting
        self._now = now
        self._progress = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._staleness = [-1] * server.n_workers
        self._faults = 0
        self._last_fault = ""
        self._roll = Roll(server.n_workers)
        self._waiting: set[int] = set()
        self._heard = dict.fromkeys(range(server.n_workers), now())
        self._speeds: dict[int, float] = {}

    def add_shard(self, wire: Wire, relays: bool = False) -> None:
        """Tell another shard of the server everything from now on.

        Args:
            wire: to it.
            relays: it answers for this server ranks that speak to no other shard: those that have
                a piece of a worker's replica.
        """
        self._shards.append(wire)
        if relays:
            self._relays.append(wire)

    def push(
        self,
        worker: int,
        gradient: Sequence[Tensor],
        version: int,
        speed: float = 0.0,
        attempt: int = 0,
    ) -> None:
        """Hand a finite gradient to the server; wakes the workers that it sets free."""
        self._pushed(Operation(Kind.PUSH, worker, version), attempt, gradient, speed=speed)

    def reject(self, worker: int, version: int, why: str, attempt: int = 0) -> None:
        """Count a gradient that the worker itself found unusable."""
        self._pushed(Operation(Kind.REJECT, worker, version), attempt, why=why)

    def _pushed(
        self,
        operation: Operation,
        attempt: int,
        gradient: Sequence[Tensor] = (),
        why: str = "",
        speed: float = 0.0,
    ) -> None:
        with self._changed:
            worker = operation.worker
            self._hear(worker, attempt)
            if worker not in self._roll.alive:  # it was given up; it takes part again when it pulls
                if operation.kind == Kind.PUSH:
                    for shard in self._shards:
                        shard.send([Request.DISCARD, worker])
                return
            outcome = self._do(operation, gradient, why)
            self._staleness[worker] = outcome.staleness
            if speed > 0.0:
                self._speeds[worker] = speed
            if outcome.fault is None:
                self._faults = 0
            else:
                self._count_fault(outcome.fault)
            self._changed.notify_all()

    def skip(self, worker: int, attempt: int = 0) -> None:
        """Count a step of the worker that had no gradient."""
        with self._changed:
            self._hear(worker, attempt)
            if worker in self._roll.alive:
                self._do(Operation(Kind.SKIP, worker))
                self._changed.notify_all()

    def pull(
        self,
        worker: int,
        write: Write,
        still: Callable[[], object] | None = None,
        attempt: int = 0,
    ) -> Pulled:
        """Give out the parameters as soon as the worker may go on.

        Args:
            worker: who asks.
            write: called once, with the parameters.
            still: called now and then while the worker waits, so that it knows that it is not
                forgotten.
            attempt: which process of the worker asks.
        """
        with self._changed:
            self._hear(worker, attempt)
            if worker not in self._roll.alive:
                self._take_back(worker)

            def ready() -> bool:
                return self._stopped or self._server.may_go_on(worker)

            if not ready():
                self._wait(self._changed, worker, "pull", ready, still)
            return self._give(Kind.PULL, worker, write, self._roll.complete)

    def version(self, worker: int, attempt: int = 0) -> int:
        """Updates made; asking is a sign of life."""
        with self._changed:
            self._hear(worker, attempt)
            self._relay(Request.VERSION, worker, self._server.version)
            return self._server.version

    def start(
        self,
        worker: int,
        last_version: int | None,
        still: Callable[[], object] | None = None,
        attempt: int = 0,
    ) -> None:
        """Wait for all workers; make no update beyond this version.

        A worker that came back, or was given up before it came here, does not wait for the others,
        nor they for it, nor does it set a limit.
        """
        with self._changed:
            self._hear(worker, attempt)
            if worker not in self._roll.alive:
                self._take_back(worker)
            if self._roll.begins(worker):
                self._stopped = False
                if self._server.last_version != last_version:
                    limit = -1 if last_version is None else last_version
                    self._do(Operation(Kind.LIMIT, -1, limit))
                self._meet(worker, self._roll.beginning, still)
            self._relay(Request.START, worker)

    def stop(self) -> None:
        """Tell every worker at its next pull that the run is over."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def settle(
        self,
        worker: int,
        write: Write,
        still: Callable[[], object] | None = None,
        attempt: int = 0,
    ) -> Pulled:
        """Wait until all workers are here, then give the final parameters.

        They stay as they are until all workers have called `start`. A worker that was given up, and
        without which the others have ended this fit, does not wait.
        """
        with self._changed:
            self._hear(worker, attempt)
            waits = self._roll.ends(worker)
            # Those that still compute need not wait for it.
            self._do(Operation(Kind.REMOVE, worker, 0))
            self._changed.notify_all()
            if waits:
                self._meet(worker, self._roll.end, still)
            pulled = self._give(Kind.READ, worker, write, self._roll.ended_complete)
            self._roll.has_ended(worker)
            self._do(Operation(Kind.ADD, worker))
            return pulled

    def leave(self, worker: int, attempt: int = 0) -> None:
        """A worker will ask for nothing more; inside a fit, the others go on without it."""
        with self._changed:
            if self._roll.is_training(worker):
                self.lose(worker, "it left before the end", attempt)

    def lose(self, worker: int, why: str, attempt: int = 0) -> None:
        """Forget a worker; those that wait for it go on."""
        with self._changed:
            if attempt == self._roll.attempts[worker]:
                self._lose(worker, why)
                self._relay(Request.FAILED, worker)

    def join(self, worker: int, attempt: int = 0) -> None:
        """Let a worker that was lost take part again, level with the slowest."""
        with self._changed:
            self._hear(worker, attempt)
            self._take_back(worker)

    def replace(self, worker: int, attempt: int) -> None:
        """A new process takes the worker's place; it takes part when it has joined."""
        with self._changed:
            self._roll.attempts[worker] = attempt
            self._lose(worker, "a new process has taken its place")
            self._notify_everybody()  # the one before may still wait for something
            for shard in self._shards:
                shard.send([Request.JOIN, worker, attempt])

    def fail(self, error: BaseException) -> None:
        """Every call from now on, and every waiting one, raises: the run cannot go on."""
        with self._changed:
            if self._failure is None:
                self._failure = error
                self._relay(Request.FAILED, -1)
            self._notify_everybody()

    @property
    def failure(self) -> BaseException | None:
        """What `fail` was told first."""
        return self._failure

    def state_dict(self) -> dict[str, Any]:
        """The server's state between two pushes."""
        with self._changed:
            return self._server.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; all workers take part again."""
        with self._changed:
            self._server.load_state_dict(state)
            for worker in set(range(self._server.n_workers)) - self._server.members:
                self._server.add(worker)

    def close(self) -> None:
        """End the log; whoever still asks for anything is told that the server has ended."""
        with self._changed:
            self.fail(ClusterError("the rank that holds the parameter server has left"))
            if self._log is not None:
                self._log.close()

    def _hear(self, worker: int, attempt: int) -> None:
        """What the calls of workers begin with."""
        self._raise_failure()
        self._raise_if_replaced(worker, attempt)
        self._heard[worker] = self._now()

    def _raise_if_replaced(self, worker: int, attempt: int) -> None:
        if attempt != self._roll.attempts[worker]:
            raise PeerLostError(f"a new process has taken the place of worker {worker}")

    def _lose(self, worker: int, why: str) -> None:
        if not self._roll.lose(worker):
            return
        self._speeds.pop(worker, None)
        if self._failure is None:
            left = len(self._roll.alive)
            _logger.warning(
                "worker %d is lost, and the other %d go on without it: %s", worker, left, why
            )
            self._do(Operation(Kind.REMOVE, worker))
            self._hold_meetings()
        self._changed.notify_all()

    def _take_back(self, worker: int) -> None:
        _logger.warning("worker %d is back, and goes on from the current version", worker)
        self._roll.take_back(worker)
        self._staleness[worker] = -1
        # A log must tell a new process from one that had merely been given up.
        self._do(Operation(Kind.ADD, worker, self._roll.attempts[worker]))
        self._changed.notify_all()

    def _do(
        self,
        operation: Operation,
        gradient: Sequence[Tensor] = (),
        why: str = "",
        pulled: Pulled | None = None,
    ) -> Outcome:
        """Let the server do it, then its other shards, and write it down."""
        if pulled is None:
            self._progress += 1
        try:
            outcome = apply(self._server, operation, gradient, why)
            numbers: list[float] = [*operation, outcome.accepted]
            if pulled is not None:
                numbers[2:] = numbers_of(operation.kind, pulled)[1:]
            for shard in self._shards:
                shard.send(numbers)
        except Exception as error:
            self.fail(error)
            raise
        if self._log is not None:
            self._log.add(operation, outcome.accepted, outcome.staleness)
        return outcome

    def _relay(self, request: Request, worker: int, *numbers: float) -> None:
        """Let other ranks of a worker hear what its first one hears."""
        for shard in self._relays:
            with suppress(ClusterError):  # with the next operation all will learn of it
                shard.send([request, worker, *numbers])

    def _give(self, kind: Kind, worker: int, write: Write, complete: bool) -> Pulled:
        pulled = self._tell(worker, complete)
        write(self._do(Operation(kind, worker), pulled=pulled).tensors)
        return pulled

    def _tell(self, worker: int, complete: bool) -> Pulled:
        staleness, self._staleness[worker] = self._staleness[worker], -1  # told once
        return Pulled(
            version=self._server.version,
            staleness=staleness,
            learning_rate=self._server.learning_rate,
            stopped=self._stopped or self._server.finished,
            fastest=max(self._speeds.values(), default=0.0),
            complete=complete,
        )

    def _count_fault(self, fault: str) -> None:
        self._faults += 1
        if self._faults == 1 or fault != self._last_fault:
            _logger.warning("a gradient was rejected: %s", fault)
        self._last_fault = fault
        if self._faults >= _MAX_FAULTS:
            self.fail(
                ClusterError(
                    f"the last {_MAX_FAULTS} gradients were all rejected, the latest because of "
                    f"{fault}; lower the learning rate, clip gradients, or look at the data"
                )
            )
            self._raise_failure()

    def _meet(self, worker: int, meeting: Meeting, still: Callable[[], object] | None) -> None:
        """Return when all workers that are awaited there have come."""
        meeting.here.add(worker)
        mine = meeting.held
        self._hold_meetings()
        self._wait(self._met, worker, meeting.what, lambda: meeting.held > mine, still)

    def _hold_meetings(self) -> None:
        if self._roll.hold_meetings():
            self._met.notify_all()

    def _notify_everybody(self) -> None:
        self._changed.notify_all()
        self._met.notify_all()

    def _wait(
        self,
        condition: Condition,
        worker: int,
        what: str,
        ready: Callable[[], bool],
        still: Callable[[], object] | None,
    ) -> None:
        """Wait; those that show no sign of life for too long meanwhile are given up."""
        seconds = self._timeout_seconds / SIGNS_OF_LIFE
        attempt = self._roll.attempts[worker]

        def over() -> bool:
            replaced = self._roll.attempts[worker] != attempt
            return self._failure is not None or replaced or ready()

        self._waiting.add(worker)
        try:
            begin, before = self._now(), self._progress
            while not condition.wait_for(over, seconds):
                if still is not None:
                    condition.release()  # nobody else has to wait until it is taken
                    try:
                        still()
                    finally:
                        condition.acquire()
                self._relay(Request.STILL, worker)
                self._give_up_the_silent(worker, what)
                if before != self._progress:
                    begin, before = self._now(), self._progress
                if self._now() - begin >= self._timeout_seconds:
                    self._fail_if_all_wait(worker, what)
        finally:
            self._waiting.discard(worker)
            self._heard[worker] = self._now()
        self._raise_failure()
        self._raise_if_replaced(worker, attempt)

    def _give_up_the_silent(self, worker: int, what: str) -> None:
        now = self._now()
        for one in sorted(self._roll.alive - self._waiting):
            if now - self._heard[one] >= self._timeout_seconds:
                self._lose(
                    one,
                    f"worker {worker} waited for it in {what}, and it showed no sign of life for "
                    f"{self._timeout_seconds:g} s; it is stuck or too slow: look at it, or raise "
                    "timeout_seconds",
                )

    def _fail_if_all_wait(self, worker: int, what: str) -> None:
        """A policy may make all wait for each other."""
        if self._roll.alive <= self._waiting:
            steps = ", ".join(f"worker {i}: {c}" for i, c in enumerate(self._server.clocks))
            self.fail(
                WaitTimeoutError(
                    f"worker {worker} waited {self._timeout_seconds:g} s in {what}, and so do all "
                    f"others (steps so far: {steps}): the admission policy lets nobody go on"
                )
            )

    def _raise_failure(self) -> None:
        if isinstance(self._failure, ClusterError):
            raise self._failure
        if self._failure is not None:
            raise ClusterError(f"the parameter server stopped: {self._failure}") from self._failure
