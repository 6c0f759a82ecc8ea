"""The threads beside a server that answer its workers' requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from scaledtrain.comm.serving.host import ServerHost
from scaledtrain.comm.serving.requests import FAULTS, Request, numbers_of
from scaledtrain.comm.wires.wire import Message, Wire
from scaledtrain.errors import ClusterError

__all__ = ["Decode", "serve_worker"]

Decode = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From the tensors of a message to a gradient."""


_QUESTIONS = {Request.START, Request.PULL, Request.SETTLE, Request.VERSION}


def serve_worker(host: ServerHost, worker: int, attempt: int, wire: Wire, decode: Decode) -> None:
    """Answer one worker's requests until it leaves or dies.

    Args:
        host: the server.
        worker: who is at the other end.
        attempt: how often it has come back.
        wire: to the worker.
        decode: turns the tensors of a PUSH into a gradient.
    """
    with suppress(ClusterError):  # the server cannot go on: whoever asks it anything is told
        try:
            if attempt > 0:
                host.join(worker, attempt)
            while (message := wire.receive(None)).numbers[0] != Request.CLOSE:
                try:
                    _answer(host, worker, attempt, wire, message, decode)
                except ClusterError:
                    if host.failure is None:
                        raise  # of this wire
                    _refuse(wire, message)
                except Exception as error:  # the rank that holds the server raises it
                    host.fail(error)
                    _refuse(wire, message)
            host.leave(worker, attempt)
        except ClusterError as error:
            host.lose(worker, str(error), attempt)


def _refuse(wire: Wire, message: Message) -> None:
    """Where the worker listens; else its next question will have the same answer."""
    if message.numbers[0] in _QUESTIONS:
        wire.send([Request.FAILED])


def _answer(
    host: ServerHost, worker: int, attempt: int, wire: Wire, message: Message, decode: Decode
) -> None:
    kind, number = Request(int(message.numbers[0])), message.numbers[1]

    def still() -> None:
        wire.send([Request.STILL])

    if kind == Request.PUSH:
        assert message.tensors is not None
        try:
            gradient = decode(message.tensors)
            host.push(worker, gradient, int(number), message.numbers[2], attempt)
        finally:
            wire.release()
    elif kind in (Request.PULL, Request.SETTLE):
        give = host.pull if kind == Request.PULL else host.settle
        written: list[Sequence[Tensor]] = []
        pulled = give(worker, lambda tensors: written.append(wire.write(tensors)), still, attempt)
        wire.send(numbers_of(kind, pulled), written[0])
    elif kind == Request.REJECT:
        host.reject(worker, int(number), FAULTS[int(message.numbers[2])], attempt)
    elif kind == Request.SKIP:
        host.skip(worker, attempt)
    elif kind == Request.STOP:
        host.stop()
    elif kind == Request.START:
        host.start(worker, None if number < 0 else int(number), still, attempt)
        wire.send([kind])
    else:
        wire.send([kind, host.version(worker, attempt)])
