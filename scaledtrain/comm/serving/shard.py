"""A shard of a server on another rank than the first: it does what the first has decided."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from scaledtrain.comm.serving.answering import Decode
from scaledtrain.comm.serving.requests import Request
from scaledtrain.comm.wires.wire import Wire
from scaledtrain.errors import ClusterError
from scaledtrain.server import Server
from scaledtrain.server.operations import Kind, Operation, apply

__all__ = ["ServerShard"]

_RELAYED = {Request.START, Request.VERSION, Request.STILL, Request.FAILED}


class ServerShard:
    """Holds a part of the parameters; every operation on them comes from the first shard.

    A worker sends the shard its part of a gradient before it tells the first shard of the push. So
    the part is here when the verdict comes, and it is the same for all parts.

    A worker may be the rank that has this part of a replica, which speaks to no other shard: what
    the first one has to tell it comes through here.

    Args:
        server: this part of it.
        connect: makes the wire to a worker that came back, for the so-and-so-many-th time.
        decode: turns the tensors of a worker's message into its part of a gradient.
        timeout_seconds: the longest to wait for what is sure to be on its way.
    """

    def __init__(
        self,
        server: Server,
        connect: Callable[[int, int], Wire],
        decode: Decode,
        timeout_seconds: float,
    ) -> None:
        self._server = server
        self._connect = connect
        self._decode = decode
        self._timeout_seconds = timeout_seconds
        self._first: Wire | None = None
        self._workers: dict[int, Wire] = {}
        self._lock = threading.Lock()
        self.failure: BaseException | None = None

    def guarded(self, run: Callable[[], None]) -> None:
        """Run; what ends it is kept as ``failure``, and every worker learns of it."""
        try:
            run()
        except Exception as error:
            self.failure = error
            if self._first is not None:
                self._first.close()  # the first shard must not wait for this one to listen
            for wire in self._workers.values():
                with suppress(ClusterError):
                    wire.send([Request.FAILED])

    def run(self, first: Wire, workers: dict[int, Wire]) -> None:
        """Do what the first shard tells until it closes, or dies.

        Args:
            first: the wire to it.
            workers: the wire to each worker.
        """
        self._first, self._workers = first, workers
        while (message := first.receive(None)).numbers[0] != Request.CLOSE:
            kind, worker, *rest = message.numbers[:-1]
            if kind == Request.JOIN:
                self._replace(int(worker), attempt=int(rest[0]))
            elif kind == Request.DISCARD:
                self._take_part(int(worker))
                self._workers[int(worker)].release()
            elif kind in _RELAYED:
                self._relay(int(worker), [kind, *rest])
            else:
                with self._lock:
                    self._do(Operation(Kind(int(kind)), int(worker), int(rest[0])), rest)

    def _relay(self, worker: int, numbers: Sequence[float]) -> None:
        for wire in self._workers.values() if worker < 0 else [self._workers[worker]]:
            with suppress(ClusterError):  # the first rank of its replica will be lost, too
                wire.send(numbers)

    def _replace(self, worker: int, attempt: int) -> None:
        self._workers[worker].close()
        with suppress(ClusterError):  # it died once more: the first shard will say so
            self._workers[worker] = self._connect(worker, attempt)

    def _do(self, operation: Operation, rest: Sequence[float]) -> None:
        wire = self._workers[operation.worker] if operation.worker >= 0 else None
        gradient: Sequence[Tensor] = ()
        if operation.kind == Kind.PUSH:
            gradient = self._take_part(operation.worker)
        outcome = apply(self._server, operation, gradient)
        if operation.kind == Kind.PUSH and wire is not None:
            wire.release()
            accepted = bool(rest[1])
            if outcome.accepted != accepted:
                raise ClusterError(
                    f"the shards of the server disagree over a push of worker {operation.worker}: "
                    f"{'rejected' if accepted else 'accepted'} here and not by the first ("
                    f"{outcome.fault}); an admission policy must decide by what the server tells it"
                )
        if operation.kind in (Kind.PULL, Kind.READ) and wire is not None:
            with suppress(ClusterError):  # the first shard will say that it is lost
                wire.send([operation.kind, *rest], wire.write(outcome.tensors))

    def _take_part(self, worker: int) -> Sequence[Tensor]:
        """This part of the gradient that a worker has staged; to be released."""
        tensors = self._workers[worker].receive(self._timeout_seconds).tensors
        assert tensors is not None
        return self._decode(tensors)

    def state_dict(self) -> dict[str, Any]:
        """The state of this part, between two operations."""
        with self._lock:
            return self._server.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; all workers take part again."""
        with self._lock:
            self._server.load_state_dict(state)
            for worker in set(range(self._server.n_workers)) - self._server.members:
                self._server.add(worker)
