"""Messages between the ranks of a pipeline: sent without waiting, received before they are needed.

From one rank to another all messages go in the order of the sender's actions. The receiver knows
that order, since schedules are data, and posts receives in it, ahead of its own needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm.process_group import device_of_messages
from scaledtrain.errors import ClusterError, ConfigError, PeerLostError, WaitTimeoutError
from scaledtrain.parallel.pipeline.schedules import Action
from scaledtrain.timeline import Timeline

__all__ = ["AHEAD", "Form", "Mailbox", "Message", "TensorForm", "form_of", "messages"]

AHEAD = 2
"""Receives from each rank that are posted before they are needed."""
_HEADER = 256  # numbers in a header
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class Message(NamedTuple):
    """What one rank tells another."""

    what: Literal["activations", "gradients", "loss", "tied", "tied sum", "tied weight"]
    stage: int
    """That has sent the activations, or that the gradients are for; of tied weights their group."""
    microbatch: int
    form: Hashable = None
    """Messages that agree in this, in the stage and in what they are have tensors of one form."""

    def __str__(self) -> str:
        if self.what == "loss":
            return "the loss"
        if self.what in ("tied", "tied sum"):
            return "the gradient of tied weights"
        if self.what == "tied weight":
            return "a tied weight"
        verb = "of" if self.what == "activations" else "for"
        return f"the {self.what} {verb} stage {self.stage}, microbatch {self.microbatch},"


class TensorForm(NamedTuple):
    """All that there is to know of a tensor before it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class Form(NamedTuple):
    """Of the tensors in a message."""

    tensors: tuple[TensorForm, ...]
    is_tuple: bool
    """Whether they were a tuple, and not a tensor."""


def form_of(tensors: Sequence[Tensor], is_tuple: bool = True) -> Form:
    """The form of those tensors."""
    forms = (TensorForm(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
    return Form(tuple(forms), is_tuple)


def messages(
    actions: Iterable[Action],
    rank_of: Sequence[int],
    forms: Callable[[int], Hashable],
    to: int,
    with_loss: bool = True,
) -> Iterator[Message]:
    """What a rank sends to another one while it does those actions, in order.

    Args:
        actions: in order.
        rank_of: of each stage its rank.
        forms: microbatch -> its form.
        to: the other rank.
        with_loss: the last stage tells the loss.
    """
    actions = list(actions)
    last = len(rank_of) - 1
    computed = [a.microbatch for a in actions if a.kind == "F" and a.stage == last]
    left = len(computed)
    for kind, stage, i in actions:
        here = rank_of[stage]
        if kind == "F" and stage < last and here != rank_of[stage + 1] == to:
            yield Message("activations", stage, i, forms(i))
        if kind == "F" and stage == last:
            left -= 1
            if left == 0 and to != here and with_loss:  # the loss of the step is known
                yield Message("loss", last, max(computed))
        if kind in ("B", "I") and stage > 0 and here != rank_of[stage - 1] == to:
            yield Message("gradients", stage - 1, i, forms(i))


class Mailbox:
    """This rank's messages to and from the other ranks of a pipeline.

    The form of what a stage sends is told once for each form of microbatches, in a message of its
    own before the first; from then on both sides know it, and a message is its tensors alone.

    Args:
        group: of the ranks of the pipeline.
        back: the same ranks again, for messages to lower ranks. NCCL needs it, since messages of
            one group between two ranks wait for each other there; None: ``group``.
        device: where tensors arrive.
        timeout_seconds: how long to wait for a message.
        timeline: where waiting is recorded.

    Raises:
        ConfigError: a group of NCCL without another one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        back: dist.ProcessGroup | None,
        device: torch.device,
        timeout_seconds: float,
        timeline: Timeline | None = None,
    ) -> None:
        self._wire = device_of_messages(group, device)
        if back is None and self._wire.type == "cuda":
            raise ConfigError(
                "a pipeline over NCCL needs two process groups of its ranks, since messages of "
                "one group that go both ways wait for each other; give back=dist.new_group(...)"
            )
        self.rank = dist.get_rank(group)
        self._group, self._back = group, back or group
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._timeline = timeline
        n_ranks = dist.get_world_size(group)
        self._names = [dist.get_global_rank(group, rank) for rank in range(n_ranks)]
        self._expected: list[deque[Message]] = [deque() for _ in range(n_ranks)]
        self._source: dict[Message, int] = {}
        self._posted: dict[Message, tuple[list[dist.Work], list[Tensor]]] = {}
        self._n_posted = [0] * n_ranks
        self._sending: deque[tuple[dist.Work, Tensor, int, Message]] = deque()
        self._forms: dict[Hashable, Form] = {}
        self._told: set[Hashable] = set()
        self.bytes_sent = 0

    def set_form(self, message: Message, form: Form) -> None:
        """Messages like that one have a form that both sides know."""
        self._forms[message.what, message.stage, message.form] = form

    def expect(self, source: int, coming: Iterable[Message]) -> None:
        """Those messages will come from a rank, after what was expected before, in this order."""
        for message in coming:
            self._expected[source].append(message)
            self._source[message] = source
        self._post_ahead(source)

    def send(
        self, rank: int, message: Message, tensors: Sequence[Tensor], is_tuple: bool = True
    ) -> None:
        """Begin to send.

        Raises:
            ConfigError: the tensors have another form than those of an earlier message had.
        """
        if message.what in ("activations", "loss"):
            form = form_of(tensors, is_tuple)
            key = message.what, message.stage, message.form
            known = self._forms.setdefault(key, form)
            if known != form:
                raise ConfigError(
                    f"stage {message.stage} of a pipeline returned {_describe(form)} for "
                    f"microbatch {message.microbatch}, but {_describe(known)} for an earlier one "
                    "with inputs of the same shapes; what goes between stages must follow from the "
                    "shapes of the inputs"
                )
            if (rank, *key) not in self._told:
                self._told.add((rank, *key))
                self._isend(rank, message, _encode(form))
        for tensor in tensors:
            self._isend(rank, message, tensor.detach())

    def _isend(self, rank: int, message: Message, tensor: Tensor) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        group = self._group if rank > self.rank else self._back
        tensor = tensor.to(self._wire).contiguous()
        with self._clear_errors("to send", message, rank, "to"):
            work = dist.isend(tensor, group=group, group_dst=rank)
        assert work is not None
        self.bytes_sent += tensor.nbytes
        self._sending.append((work, tensor, rank, message))

    def receive(self, message: Message) -> tuple[list[Tensor], bool]:
        """Wait for a message; returns its tensors, and whether they were a tuple."""
        source = self._source.pop(message)
        start = 0.0 if self._timeline is None else self._timeline.now()
        while message not in self._posted:
            self._post(source, wait=True)
        works, tensors = self._posted.pop(message)
        for work in works:
            self._wait(work, message, source)
        if self._timeline is not None:
            self._timeline.add("waiting", start)
        self._n_posted[source] -= 1
        self._post_ahead(source)
        form = self._form(message)
        assert form is not None
        tensors = [tensor.to(self._device) for tensor in tensors]
        for tensor, (_, _, requires_grad) in zip(tensors, form.tensors, strict=True):
            tensor.requires_grad_(requires_grad and message.what == "activations")
        return tensors, form.is_tuple

    def finish(self) -> None:
        """Wait until everything is sent."""
        while self._sending:
            work, _, rank, message = self._sending[0]
            with self._clear_errors("to send", message, rank, "to"):
                self._wait_for(work)
            self._sending.popleft()

    def _post_ahead(self, source: int) -> None:
        while self._expected[source] and self._n_posted[source] < AHEAD:
            if not self._post(source, wait=False):
                return

    def _post(self, source: int, wait: bool) -> bool:
        """Post the receives of the next message; without ``wait`` only if its form is known."""
        message = self._expected[source][0]
        form = self._form(message)
        if form is None:
            if not wait:
                return False
            assert message.what in ("activations", "loss"), message
            header = torch.empty(_HEADER, dtype=torch.int64, device=self._wire)
            self._wait(self._irecv(source, message, header), message, source)
            form = _decode(header.tolist())
            self._forms[message.what, message.stage, message.form] = form
        self._expected[source].popleft()
        tensors = [
            torch.empty(shape, dtype=dtype, device=self._wire) for shape, dtype, _ in form.tensors
        ]
        works = [self._irecv(source, message, tensor) for tensor in tensors]
        self._posted[message] = works, tensors
        self._n_posted[source] += 1
        return True

    def _irecv(self, source: int, message: Message, tensor: Tensor) -> dist.Work:
        group = self._group if source < self.rank else self._back
        with self._clear_errors("for", message, source, "from"):
            work = dist.irecv(tensor, group=group, group_src=source)
        assert work is not None
        return work

    def _form(self, message: Message) -> Form | None:
        """Gradients have the form of the activations that they belong to."""
        if message.what != "gradients":
            return self._forms.get((message.what, message.stage, message.form))
        form = self._forms.get(("activations", message.stage, message.form))
        if form is None:
            return None
        return Form(tuple(t for t in form.tensors if t.requires_grad), True)

    def _wait(self, work: dist.Work, message: Message, source: int) -> None:
        with self._clear_errors("for", message, source, "from"):
            self._wait_for(work)

    def _wait_for(self, work: dist.Work) -> None:
        if self._wire.type == "cpu":
            work.wait(timedelta(seconds=self._timeout_seconds))
        else:  # it is the device that waits; the process group has a timeout of its own
            work.wait()

    def _clear_errors(self, doing: str, message: Message, rank: int, way: str) -> _Clear:
        me, other = self._names[self.rank], self._names[rank]
        return _Clear(
            f"rank {me} waited {self._timeout_seconds:g} s {doing} {message} {way} rank {other}, "
            "which is stuck or too slow, or ended: look at it, or raise timeout_seconds",
            f"rank {other} died or has ended while rank {me} waited {doing} {message} {way} it; "
            "its own message says why, or the system's log if it was killed (out of memory?)",
        )


class _Clear:
    """Turns what torch.distributed raises into errors that name the ranks."""

    def __init__(self, timed_out: str, lost: str) -> None:
        self._timed_out = timed_out
        self._lost = lost

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, ClusterError):
            return
        text = next(iter(str(error).strip().splitlines()), repr(error))
        if "timed out" in text.lower() or "timeout" in text.lower():
            raise WaitTimeoutError(f"{self._timed_out} ({text})") from error
        raise PeerLostError(f"{self._lost} ({text})") from error


def _encode(form: Form) -> Tensor:
    numbers = [len(form.tensors), int(form.is_tuple)]
    for shape, dtype, requires_grad in form.tensors:
        if dtype not in _DTYPES:
            raise ConfigError(f"a tensor of {dtype} cannot go from one stage to another")
        numbers += [_DTYPES.index(dtype), int(requires_grad), len(shape), *shape]
    if len(numbers) > _HEADER:
        raise ConfigError(
            f"a stage returned {len(form.tensors)} tensors, more than can be told to the next one; "
            "cut the model where fewer go on"
        )
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)))


def _decode(numbers: Sequence[int]) -> Form:
    count, is_tuple, *rest = numbers
    tensors = []
    for _ in range(count):
        dtype, requires_grad, n_dims = rest[:3]
        shape = tuple(rest[3 : 3 + n_dims])
        tensors.append(TensorForm(shape, _DTYPES[dtype], bool(requires_grad)))
        rest = rest[3 + n_dims :]
    return Form(tuple(tensors), bool(is_tuple))


def _describe(form: Form) -> str:
    def one(tensor: TensorForm) -> str:
        frozen = "" if tensor.requires_grad else " without gradient"
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{frozen}"

    return ", ".join(map(one, form.tensors)) or "no tensor"
