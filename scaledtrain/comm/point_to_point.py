"""A wire over torch.distributed's send and recv: the server may be on another host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer
from scaledtrain.comm.process_group import clear_errors
from scaledtrain.comm.remote_store import HEADER_NUMBERS, Request
from scaledtrain.errors import PeerLostError

__all__ = ["TorchServerWire", "TorchWorkerWire"]

_FOREVER = 365 * 24 * 3600.0


class TorchWorkerWire:
    """Each message is a header of float64, and behind it a flat buffer where there is one.

    Args:
        like: the parameters (their shapes and dtypes).
        server_rank: where the server is.
        group: gloo group made for this server alone, since its threads wait in it.
        store: for finding out who is missing when a message fails.
        timeout_seconds: the longest wait for an answer.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        server_rank: int,
        group: dist.ProcessGroup,
        store: dist.Store,
        timeout_seconds: float,
    ) -> None:
        self.parameters = self._flat = FlatBuffer(like)  # one serves both ways, one after the other
        self._server_rank = server_rank
        self._group = group
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)

    def push(self, gradient: Sequence[Tensor], version: int) -> None:
        """Send header and gradient."""
        self._flat.write(gradient)
        self._send(Request.PUSH, version)
        self._move(Request.PUSH, self._flat.bytes, dist.isend)

    def ask(self, kind: Request, number: float) -> Sequence[float]:
        """Send a header, receive a header."""
        self._send(kind, number)
        header = torch.zeros(HEADER_NUMBERS, dtype=torch.float64)
        # How long a worker may wait is the server's to judge; here only its death counts.
        self._move(kind, header, dist.irecv, _FOREVER)
        numbers: list[float] = header.tolist()
        return numbers

    def take_parameters(self) -> None:
        """Receive the flat buffer."""
        self._move(Request.PULL, self._flat.bytes, dist.irecv)

    def close(self) -> None:
        """Send CLOSE."""
        self._send(Request.CLOSE, 0.0)

    def _send(self, kind: Request, number: float) -> None:
        header = torch.tensor([kind, number, 0, 0, 0], dtype=torch.float64)
        self._move(kind, header, dist.isend)

    def _move(
        self, kind: Request, message: Tensor, how: Callable[..., Any], seconds: float | None = None
    ) -> None:
        what = f"{kind.name.lower()} (the server is on rank {self._server_rank})"
        seconds = self._timeout_seconds if seconds is None else seconds
        with clear_errors(what, self._rank, self._size, self._store, seconds):
            work = how(message, self._server_rank, group=self._group, tag=self._rank)
            work.wait(timedelta(seconds=seconds))


class TorchServerWire:
    """The server's end; a dead worker shows as a broken connection.

    Args:
        like: the parameters.
        worker: the rank at the other end.
        group: as of the worker's end, with a timeout longer than any step.
    """

    def __init__(self, like: Sequence[Tensor], worker: int, group: dist.ProcessGroup) -> None:
        self.gradient = self.parameters = FlatBuffer(like)
        self._worker = worker
        self._group = group
        self._header = torch.zeros(HEADER_NUMBERS, dtype=torch.float64)

    def next_request(self) -> tuple[Request, float]:
        """Receive a header, and a gradient if one follows."""
        try:
            dist.recv(self._header, self._worker, group=self._group, tag=self._worker)
            kind, number = Request(int(self._header[0])), float(self._header[1])
            if kind == Request.PUSH:
                dist.recv(self.gradient.bytes, self._worker, group=self._group, tag=self._worker)
        except RuntimeError as error:
            raise PeerLostError(
                f"rank {self._worker} died; its own message says why ({str(error).splitlines()[0]})"
            ) from error
        return kind, number

    def handled_push(self) -> None:
        """Nothing to do: the next message waits in the connection."""

    def answer(self, header: Sequence[float], with_parameters: bool) -> None:
        """Send a header, and the parameters."""
        message = torch.tensor(header, dtype=torch.float64)
        dist.send(message, self._worker, group=self._group, tag=self._worker)
        if with_parameters:
            dist.send(self.parameters.bytes, self._worker, group=self._group, tag=self._worker)
