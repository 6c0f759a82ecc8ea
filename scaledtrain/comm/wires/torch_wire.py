"""A wire over torch.distributed's send and recv: the other end may be on another host.

Each wire is a process group of two ranks of its own, so that a rank that dies breaks its own wires
only, and a rank that comes back can be given a new one. Numbers go over gloo, tensors too, or over
NCCL where both ends compute on GPUs of their own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.flat import FlatBuffer, bytes_of
from scaledtrain.comm.wires.wire import NUMBERS, Message, empty_like, padded
from scaledtrain.errors import PeerLostError, RendezvousError, WaitTimeoutError

__all__ = ["TorchWire"]

_FOREVER = 365 * 24 * 3600.0
_SMALL_BYTES = 64 * 1024  # a tensor up to this size travels with the others in one message
_MESSAGE, _RECEIPT = 0, 1  # tags
_BYE = -1.0  # in the last place of a message
_BYE_SECONDS = 0.2


class _Slot:
    """Memory for the tensors of one message: small ones in one flat buffer, large ones alone."""

    def __init__(self, like: Sequence[Tensor], device: torch.device) -> None:
        self._is_small = [t.numel() * t.element_size() <= _SMALL_BYTES for t in like]
        self._flat = FlatBuffer(self._pick(like, small=True), device=device)
        large = iter(empty_like(self._pick(like, small=False), device))
        small = iter(self._flat.views)
        self.views = [next(small) if is_small else next(large) for is_small in self._is_small]

    def messages(self) -> list[Tensor]:
        """What is sent and received, in this order."""
        large = self._pick(self.views, small=False)
        return [self._flat.bytes, *large] if self._flat.views else large

    def messages_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same for tensors that lie elsewhere: large ones are not copied if they fit."""
        if self._flat.views:
            self._flat.write(self._pick(tensors, small=True))
        views = self._pick(self.views, small=False)
        large = [
            t.detach().to(v.device, v.dtype).contiguous()
            for t, v in zip(self._pick(tensors, small=False), views, strict=True)
        ]
        return [self._flat.bytes, *large] if self._flat.views else large

    def _pick(self, tensors: Sequence[Tensor], small: bool) -> list[Tensor]:
        pairs = zip(tensors, self._is_small, strict=True)
        return [t for t, is_small in pairs if is_small == small]


class TorchWire:
    """One end of a wire over torch.distributed.

    Args:
        store: where both ends meet, of this wire alone.
        end: 0 or 1.
        like: templates of the tensors that end 0 and end 1 receive.
        slots: how many messages with tensors end 0 and end 1 may hold unreleased.
        ranks: of the job, at end 0 and end 1; for messages.
        timeout_seconds: the longest that the other end may take to accept what is sent.
        device: where the tensors of messages lie; a CUDA device at both ends: they go over NCCL.
        reads_ahead: this end takes in what comes before anybody asks for it, as far as it has
            slots; without, a message waits at the other end until somebody does.
        gives_receipts: this end reads ahead, and says when it has the tensors of a message.
        wants_receipts: the other end gives receipts; tensors count as sent when it has them.

    Raises:
        RendezvousError: the other end did not come, or cannot be reached.
    """

    def __init__(
        self,
        store: dist.Store,
        end: int,
        like: tuple[Sequence[Tensor], Sequence[Tensor]],
        slots: tuple[int, int],
        ranks: tuple[int, int],
        timeout_seconds: float,
        device: torch.device,
        reads_ahead: bool = False,
        gives_receipts: bool = False,
        wants_receipts: bool = False,
    ) -> None:
        self._other = 1 - end
        self._me, self._peer = ranks[end], ranks[1 - end]
        self._timeout_seconds = timeout_seconds
        self._gives_receipts = gives_receipts
        self._wants_receipts = wants_receipts
        make: Any = dist.ProcessGroupGloo
        timeout = timedelta(seconds=timeout_seconds)
        try:
            self._numbers: Any = make(dist.PrefixStore("gloo", store), end, 2, timeout)
            self._tensors: Any = self._numbers
            if device.type == "cuda":
                make = dist.ProcessGroupNCCL
                self._tensors = make(dist.PrefixStore("nccl", store), end, 2, timeout)
        except RuntimeError as error:
            raise RendezvousError(
                f"rank {self._me} could not connect to rank {self._peer}, which died, or cannot be "
                f"reached from this host ({str(error).splitlines()[0]})"
            ) from error
        self._outgoing = _Slot(like[self._other], device)
        self._sizes = bytes_of(like[end]), bytes_of(like[self._other])
        self.bytes_sent = 0
        self.bytes_received = 0
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._lent: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(slots[end]):
            self._free.put(_Slot(like[end], device))
        self._ahead: queue.SimpleQueue[Message | Exception] | None = None
        self._reader: threading.Thread | None = None
        if reads_ahead:
            self._ahead = queue.SimpleQueue()
            name = f"reads-what-rank-{self._peer}-sends"
            self._reader = threading.Thread(target=self._read_ahead, name=name, daemon=True)
            self._reader.start()

    def write(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Copy them to this end's own memory for sending."""
        with torch.no_grad():
            torch._foreach_copy_(self._outgoing.views, list(tensors))
        return self._outgoing.views

    def write_and_sum(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """Only add them up: `send` takes large ones from where they are."""
        return tensors, sum(t.sum().item() for t in tensors)

    def send(self, numbers: Sequence[float], tensors: Sequence[Tensor] | None = None) -> None:
        """Send numbers, then the tensors."""
        row = padded(numbers)
        row[-1] = float(tensors is not None)
        head = torch.tensor(row, dtype=torch.float64)
        self._move("send", head, _MESSAGE, self._timeout_seconds)
        if tensors is None:
            return
        out = self._outgoing
        written = tensors is out.views
        for message in out.messages() if written else out.messages_of(tensors):
            self._move("send", message, _MESSAGE, self._timeout_seconds, self._tensors)
        self.bytes_sent += self._sizes[1]
        if self._wants_receipts:
            self._move("recv", head, _RECEIPT, self._timeout_seconds)

    def receive(self, timeout_seconds: float | None) -> Message:
        """Receive numbers, then the tensors that follow."""
        if self._ahead is None:
            return self._receive(timeout_seconds)
        try:
            message = self._ahead.get(timeout=timeout_seconds)
        except queue.Empty:
            raise self._late(timeout_seconds or 0.0) from None
        if isinstance(message, Exception):
            self._ahead.put(message)
            raise message
        return message

    def release(self) -> None:
        """Make the slot that was received first free."""
        self._free.put(self._lent.get_nowait())

    def close(self) -> None:
        """Break the connection, which wakes whoever waits at the other end."""
        if self._numbers is None:
            return
        if self._ahead is not None:
            # The thread that reads here keeps this end of the connection open. Another one may do
            # so at the other end; it ends when it reads this, and then this one does, too.
            with suppress(RuntimeError):
                bye = torch.full((NUMBERS,), _BYE, dtype=torch.float64)
                work = self._numbers.send([bye], self._other, _MESSAGE)
                work.wait(timedelta(seconds=_BYE_SECONDS))
        self._numbers = self._tensors = None
        self._free.put(None)  # wakes the thread that reads, if it waits for a slot

    def join(self, seconds: float) -> None:
        """Wait for the thread that reads: Python must not end while it is inside of gloo."""
        if self._reader is not None:
            self._reader.join(seconds)

    def _receive(self, timeout_seconds: float | None) -> Message:
        head = torch.zeros(NUMBERS, dtype=torch.float64)
        seconds = _FOREVER if timeout_seconds is None else timeout_seconds
        self._move("recv", head, _MESSAGE, seconds)
        row: list[float] = head.tolist()
        if row[-1] == _BYE:
            raise PeerLostError(f"rank {self._peer} has left")
        if not row[-1]:
            return Message(row, None)
        slot = self._free.get()
        if slot is None:
            raise self._closed()
        self._lent.put(slot)
        for message in slot.messages():
            self._move("recv", message, _MESSAGE, self._timeout_seconds, self._tensors)
        self.bytes_received += self._sizes[0]
        return Message(row, slot.views)

    def _read_ahead(self) -> None:
        assert self._ahead is not None
        while True:
            try:
                message = self._receive(None)
                if self._gives_receipts and message.tensors is not None:
                    receipt = torch.zeros(NUMBERS, dtype=torch.float64)
                    self._move("send", receipt, _RECEIPT, self._timeout_seconds)
            except Exception as error:  # told to whoever receives
                self._ahead.put(error)
                return
            self._ahead.put(message)

    def _move(
        self,
        how: Literal["send", "recv"],
        message: Tensor,
        tag: int,
        seconds: float,
        group: Any = None,
    ) -> None:
        group = group or self._numbers
        if group is None:
            raise self._closed()
        try:
            work = getattr(group, how)([message], self._other, tag)
            if message.is_cuda:
                work.wait()
                torch.cuda.current_stream(message.device).synchronize()
            else:
                work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            text = (str(error).strip().splitlines() or [repr(error)])[0]
            if "imed out" in text or "timeout" in text.lower():
                raise self._late(seconds) from error
            raise PeerLostError(
                f"rank {self._peer} died or left while rank {self._me} had a message for it or "
                f"from it; its own message says why ({text.split('. This is')[0]})"
            ) from error

    def _closed(self) -> PeerLostError:
        return PeerLostError(f"rank {self._me} has closed its connection to rank {self._peer}")

    def _late(self, seconds: float) -> WaitTimeoutError:
        return WaitTimeoutError(
            f"rank {self._me} waited {seconds:g} s for rank {self._peer}, which is stuck or too "
            "slow: look at it, or raise timeout_seconds"
        )
