"""The threads beside a server that answer its workers' requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from scaledtrain.comm.host import ServerHost
from scaledtrain.comm.requests import FAULTS, Request, numbers_of
from scaledtrain.comm.wire import Message, Wire
from scaledtrain.errors import ClusterError, PeerLostError

__all__ = ["Decode", "serve_worker"]

Decode = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From the tensors of a message to a gradient."""


def serve_worker(host: ServerHost, worker: int, wire: Wire, decode: Decode) -> None:
    """Answer one worker's requests until it leaves, dies, or the server stops.

    Args:
        host: the server.
        worker: who is at the other end.
        wire: to the worker.
        decode: turns the tensors of a PUSH into a gradient.
    """
    try:
        while (message := wire.receive(None)).numbers[0] != Request.CLOSE:
            try:
                _answer(host, worker, wire, message, decode)
            except PeerLostError:
                raise
            except Exception as error:  # the rank that holds the server raises it
                host.fail(error)
                wire.send([Request.FAILED])
                return
    except ClusterError as error:
        host.lose(worker, str(error))
        with suppress(ClusterError):  # it may live, and another rank be dead
            wire.send([Request.FAILED])


def _answer(host: ServerHost, worker: int, wire: Wire, message: Message, decode: Decode) -> None:
    kind, number = Request(int(message.numbers[0])), message.numbers[1]

    def still() -> None:
        wire.send([Request.STILL])

    if kind == Request.PUSH:
        assert message.tensors is not None
        host.push(worker, decode(message.tensors), int(number), message.numbers[2])
        wire.release()
    elif kind in (Request.PULL, Request.SETTLE):
        give = host.pull if kind == Request.PULL else host.settle
        written: list[Sequence[Tensor]] = []
        pulled = give(worker, lambda tensors: written.append(wire.write(tensors)), still)
        wire.send(numbers_of(kind, pulled), written[0])
    elif kind == Request.REJECT:
        host.reject(worker, int(number), FAULTS[int(message.numbers[2])])
    elif kind == Request.SKIP:
        host.skip(worker)
    elif kind == Request.STOP:
        host.stop()
    elif kind == Request.START:
        host.start(worker, None if number < 0 else int(number), still)
        wire.send([kind])
    else:
        wire.send([kind, host.version()])
