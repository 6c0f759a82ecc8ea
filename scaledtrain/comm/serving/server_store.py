"""A worker's access to the server: over wires, or by plain calls where it lives in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Group, Pulled
from scaledtrain.comm.serving.encoding import Encoder
from scaledtrain.comm.serving.host import ServerHost
from scaledtrain.comm.serving.partition import Partition
from scaledtrain.comm.serving.pushes import Pushes
from scaledtrain.comm.serving.requests import FAULTS, Request, find_fault, pulled_from
from scaledtrain.comm.wires.wire import Message, Wire
from scaledtrain.errors import ClusterError, ConfigError
from scaledtrain.server.checks import find_misfit
from scaledtrain.timeline import Timeline

__all__ = ["DirectStore", "Local", "WireStore"]


class Local(Protocol):
    """The server's part that lives in this process: `ServerHost` or `ServerShard`."""

    @property
    def failure(self) -> BaseException | None:
        """What ended it."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore its state."""


class DirectStore(Pushes):
    """The store of the worker in the process of a server of one shard: plain calls.

    Args:
        host: the server.
        worker: this worker's number.
        like: the parameters.
        timeline: where waiting and communication are recorded.
        pieces: see `Pushes`.
    """

    def __init__(
        self,
        host: ServerHost,
        worker: int,
        like: Sequence[Tensor],
        timeline: Timeline,
        pieces: Group,
    ) -> None:
        super().__init__(timeline, pieces)
        self._host = host
        self._worker = worker
        self._like = like
        self._update: Sequence[Tensor] = ()

    def start(self, last_version: int | None) -> None:
        """Wait for all workers."""
        start = self._timeline.now()
        self._host.start(self._worker, last_version)
        self._timeline.add("waiting", start)

    def _judge(self, update: Sequence[Tensor]) -> int | None:
        self._update = update
        return find_fault(self._worker, update, self._like)

    def _stage(self) -> None:
        pass

    def _hand_over(self, version: int, speed: float) -> None:
        update, self._update = self._update, ()
        self._host.push(self._worker, update, version, speed)

    def _reject(self, version: int, fault: int) -> None:
        self._host.reject(self._worker, version, FAULTS[fault])

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Copy the parameters, when the admission policy says so."""
        start = self._timeline.now()
        pulled = self._host.pull(self._worker, _copy_to(into))
        self._timeline.add("waiting", start)
        return pulled

    def skip(self) -> None:
        """Let the server count a step without a gradient."""
        self._host.skip(self._worker)

    def version(self) -> int:
        """Updates that the server has made."""
        return self._host.version(self._worker)

    def stop(self) -> None:
        """Ask that every worker ends."""
        self._host.stop()

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait for all workers, then pull."""
        start = self._timeline.now()
        pulled = self._host.settle(self._worker, _copy_to(into))
        self._timeline.add("waiting", start)
        return pulled

    def state_dict(self) -> dict[str, Any]:
        """The server's state."""
        return self._host.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the server's state."""
        self._host.load_state_dict(state)

    def close(self) -> None:
        """Nothing to do: the server needs no message to know."""


class WireStore(Pushes):
    """The store of a worker that reaches the shards of the server over wires.

    Args:
        wires: to each shard.
        partition: what each shard holds.
        like: the parameters.
        worker: this worker's number.
        encoder: of gradients; None: they are sent as they are.
        overlap: ask for the next parameters as soon as the last have come.
        local: the server's part in this process, if there is one.
        timeline: a push counts as communication; a pull as waiting until the first shard answers
            (its queue and the admission policy cannot be told apart from here), then as
            communication.
        timeout_seconds: the longest to wait for a sign of life.
        pieces: see `Pushes`.
    """

    def __init__(
        self,
        wires: Sequence[Wire],
        partition: Partition,
        like: Sequence[Tensor],
        worker: int,
        encoder: Encoder | None,
        overlap: bool,
        local: Local | None,
        timeline: Timeline,
        timeout_seconds: float,
        pieces: Group,
    ) -> None:
        super().__init__(timeline, pieces)
        self._wires = wires
        self._partition = partition
        self._like = like
        self._worker = worker
        self._encoder = encoder
        self._overlap = overlap
        self._local = local
        self._timeout_seconds = timeout_seconds
        self._parts: list[Sequence[Tensor]] = []
        self._asked = False
        self._borrowed = False  # the model computes in memory of the wires
        self._closed = False

    def start(self, last_version: int | None) -> None:
        """Wait for all workers."""
        start = self._timeline.now()
        self._wires[0].send([Request.START, -1 if last_version is None else last_version])
        self._receive(0)
        self._timeline.add("waiting", start)

    def _judge(self, update: Sequence[Tensor]) -> int | None:
        self._parts, fault = self._written(update)
        return fault

    def _stage(self) -> None:
        for wire, part in zip(self._wires[1:], self._parts[1:], strict=True):
            wire.send([Request.STAGE], part)

    def _hand_over(self, version: int, speed: float) -> None:
        parts, self._parts = self._parts, []
        self._wires[0].send([Request.PUSH, version, speed], parts[0])

    def _reject(self, version: int, fault: int) -> None:
        self._wires[0].send([Request.REJECT, version, fault])

    def _written(self, update: Sequence[Tensor]) -> tuple[list[Sequence[Tensor]], int | None]:
        """Each shard's part where its wire sends it from; and what is wrong with the update."""
        if self._encoder is not None or find_misfit(update, self._like) is not None:
            fault = find_fault(self._worker, update, self._like)
            if fault is not None or self._encoder is None:
                return [], fault
            return self._encoder.encode(update), None
        parts, total = [], 0.0
        for shard, wire in enumerate(self._wires):
            part, of_part = wire.write_and_sum(self._partition.part(update, shard))
            parts.append(part)
            total += of_part
        # The sum of finite values may overflow, too.
        fault = None if math.isfinite(total) else find_fault(self._worker, update, self._like)
        return parts, fault

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Take what was asked for, or ask now."""
        if not self._asked:
            self._ask(Request.PULL)
        pulled = self._take(into)
        if self._overlap and not pulled.stopped:
            self._ask(Request.PULL)
        return pulled

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait for all workers, then take the parameters into memory of the tensors' own."""
        if self._asked:
            self._take(into)
        self._ask(Request.SETTLE)
        pulled = self._take(into)
        self._return_borrowed(into)
        return pulled

    def skip(self) -> None:
        """Let the server count a step without a gradient."""
        self._wires[0].send([Request.SKIP])

    def version(self) -> int:
        """Ask the server.

        Raises:
            ConfigError: parameters have been asked for ahead, so that nothing else can be.
        """
        if self._asked:
            raise ConfigError(
                "a worker that pulls ahead (overlap) cannot ask for the version meanwhile; choose "
                "a policy that does not stop work under way, or no overlap"
            )
        self._wires[0].send([Request.VERSION])
        return int(self._receive(0).numbers[1])

    def stop(self) -> None:
        """Ask that every worker ends."""
        self._wires[0].send([Request.STOP])

    def state_dict(self) -> dict[str, Any]:
        """The state of the server's part in this process, and what this worker has not sent yet."""
        local = {} if self._local is None else self._local.state_dict()
        return local if self._encoder is None else {**local, "feedback": self._encoder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the server's part in this process, and this worker's."""
        if self._local is not None:
            self._local.load_state_dict(state)
        if self._encoder is not None and "feedback" in state:
            self._encoder.load_state_dict(state["feedback"])

    def close(self) -> None:
        """Leave; the server no longer answers this worker."""
        if not self._closed:
            self._closed = True
            with suppress(ClusterError):  # the server has ended before
                self._wires[0].send([Request.CLOSE])

    def _ask(self, kind: Request) -> None:
        if self._borrowed and not self._overlap:  # there is one place, which the model is in
            self._release()
        self._wires[0].send([kind])
        self._asked = True

    def _take(self, into: Sequence[Tensor]) -> Pulled:
        start = self._timeline.now()
        first = self._receive(0)
        start = self._timeline.add("waiting", start)
        others = [self._receive(shard) for shard in range(1, len(self._wires))]
        self._asked = False
        for shard, message in enumerate([first, *others]):
            assert message.tensors is not None
            self._bind(into, shard, message.tensors)
        if self._borrowed:
            self._release()
        self._borrowed = True
        self._timeline.add("communication", start)
        return pulled_from(first.numbers)

    @torch.no_grad()
    def _bind(self, into: Sequence[Tensor], shard: int, tensors: Sequence[Tensor]) -> None:
        """Whole tensors are used where they lie, which saves a copy; parts are copied together."""
        for piece, value in zip(self._partition.pieces[shard], tensors, strict=True):
            target = into[piece.tensor]
            same = target.device == value.device and target.dtype == value.dtype
            if piece.rows is None and same:
                target.data = value
            else:
                piece.of(into).copy_(value)

    @torch.no_grad()
    def _return_borrowed(self, into: Sequence[Tensor]) -> None:
        for pieces in self._partition.pieces:
            for piece in pieces:
                if piece.rows is None:
                    into[piece.tensor].data = into[piece.tensor].data.clone()
        self._release()

    def _release(self) -> None:
        for wire in self._wires:
            wire.release()
        self._borrowed = False

    def _receive(self, shard: int) -> Message:
        while True:
            message = self._wires[shard].receive(self._timeout_seconds)
            kind = message.numbers[0]
            if kind == Request.FAILED:
                failure = self._local.failure if self._local is not None else None
                raise ClusterError(
                    "the parameter server stopped; the rank that holds it says why"
                    if failure is None
                    else f"the parameter server stopped: {failure}"
                ) from failure
            if kind != Request.STILL:
                return message


def _copy_to(into: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    def copy(tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(into), list(tensors))

    return copy
