"""A `Store` whose server lives in another process: requests and answers over some wire.

Each worker has one wire to one thread beside the server. What the messages are is written here,
once; a wire (torch.distributed, shared memory) only carries them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer
from scaledtrain.comm.host import ServerHost
from scaledtrain.comm.protocols import Pulled
from scaledtrain.errors import ClusterError, PeerLostError
from scaledtrain.timeline import Timeline

__all__ = [
    "HEADER_NUMBERS",
    "RemoteStore",
    "Request",
    "ServerWire",
    "WorkerWire",
    "serve_in_thread",
]

HEADER_NUMBERS = 5  # float64 in every message; versions are exact up to 2^53
_NO_LIMIT = -1.0


class Request(IntEnum):
    """What a worker asks; the first number of a message. A push alone has no answer."""

    PUSH = 1
    PULL = 2
    LIMIT = 3
    STOP = 4
    SETTLE = 5
    CLOSE = 6
    SKIP = 7
    FAILED = 8  # an answer: the server stopped


class WorkerWire(Protocol):
    """The worker's end."""

    parameters: FlatBuffer
    """Filled by `take_parameters`."""

    def push(self, gradient: Sequence[Tensor], version: int) -> None:
        """Send a gradient; the tensors may be reused on return."""

    def ask(self, kind: Request, number: float) -> Sequence[float]:
        """Send a request and wait for its answer's header."""

    def take_parameters(self) -> None:
        """Receive the parameters that follow the answer to PULL and SETTLE."""

    def close(self) -> None:
        """Tell the server that this worker leaves."""


class ServerWire(Protocol):
    """The server's end of one worker's wire."""

    gradient: FlatBuffer
    """Holds the gradient while a PUSH is being handled."""
    parameters: FlatBuffer
    """Sent with the answer to PULL and SETTLE."""

    def next_request(self) -> tuple[Request, float]:
        """Wait for the worker's next request, however long it computes.

        Raises:
            PeerLostError: the worker died.
        """

    def handled_push(self) -> None:
        """The gradient has been used and its memory is free."""

    def answer(self, header: Sequence[float], with_parameters: bool) -> None:
        """Answer the last request."""


class RemoteStore:
    """The worker's side of a server in another process.

    Args:
        wire: carries the messages.
        timeline: a push counts as communication; a pull as waiting until the server answers (its
            queue and the admission policy cannot be told apart from here), then as communication.
    """

    def __init__(self, wire: WorkerWire, timeline: Timeline) -> None:
        self._wire = wire
        self._timeline = timeline
        self._closed = False

    def push(self, update: Sequence[Tensor], version: int) -> None:
        """Send a gradient; does not wait for the server to use it."""
        start = self._timeline.now()
        self._wire.push(update, version)
        self._timeline.add("communication", start)

    def skip(self) -> None:
        """Let the server count a step without a gradient."""
        self._ask(Request.SKIP)

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Ask for the parameters and wait for them."""
        return self._fetch(Request.PULL, into)

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait for all workers, then fetch the parameters."""
        return self._fetch(Request.SETTLE, into)

    def limit(self, last_version: int | None) -> None:
        """Make no update beyond this version."""
        self._ask(Request.LIMIT, _NO_LIMIT if last_version is None else last_version)

    def stop(self) -> None:
        """Ask that every worker ends."""
        self._ask(Request.STOP)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the server is elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def close(self) -> None:
        """Leave; the server no longer answers this worker."""
        if not self._closed:
            self._closed = True
            self._wire.close()

    def _fetch(self, kind: Request, into: Sequence[Tensor]) -> Pulled:
        start = self._timeline.now()
        header = self._ask(kind)
        start = self._timeline.add("waiting", start)
        self._wire.take_parameters()
        self._wire.parameters.read(into)
        self._timeline.add("communication", start)
        _, version, staleness, learning_rate, stopped = header
        return Pulled(int(version), int(staleness), learning_rate, bool(stopped))

    def _ask(self, kind: Request, number: float = 0.0) -> Sequence[float]:
        header = self._wire.ask(kind, number)
        if header[0] == Request.FAILED:
            raise ClusterError("the parameter server stopped; the rank that holds it says why")
        return header


def serve_in_thread(host: ServerHost, worker: int, wire: ServerWire) -> threading.Thread:
    """Answer one worker's requests in a thread until it leaves."""

    def serve() -> None:
        try:
            while (request := wire.next_request())[0] != Request.CLOSE:
                try:
                    _handle(host, worker, wire, *request)
                except Exception as error:  # the rank that holds the server raises it
                    host.fail(error)
                    if request[0] == Request.PUSH:
                        wire.handled_push()
                        continue  # the worker does not listen now; its next request fails, too
                    wire.answer([Request.FAILED, 0, 0, 0, 0], with_parameters=False)
                    return
        except Exception as error:
            host.fail(PeerLostError(f"the server lost worker {worker}: {error}"))

    thread = threading.Thread(target=serve, name=f"server-for-worker-{worker}", daemon=True)
    thread.start()
    return thread


def _handle(host: ServerHost, worker: int, wire: ServerWire, kind: Request, number: float) -> None:
    if kind == Request.PUSH:
        host.push(worker, wire.gradient.views, int(number))
        wire.handled_push()
        return
    if kind in (Request.PULL, Request.SETTLE):
        act = host.pull if kind == Request.PULL else host.settle
        pulled = act(worker, wire.parameters.views)
        numbers = [pulled.version, pulled.staleness, pulled.learning_rate, pulled.stopped]
        wire.answer([kind, *numbers], with_parameters=True)
        return
    if kind == Request.LIMIT:
        host.limit(None if number == _NO_LIMIT else int(number))
    elif kind == Request.STOP:
        host.stop()
    elif kind == Request.SKIP:
        host.skip(worker)
    wire.answer([kind, 0, 0, 0, 0], with_parameters=False)
