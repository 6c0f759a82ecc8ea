"""Everything that happens to a server, as data: what is sent to its shards, logged and replayed.

Two servers that are given the same operations in the same order, and with each push the same
gradient, hold the same parameters, bit for bit. So the shards of one server agree without asking
each other, and a log of operations is enough to make a run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from scaledtrain.server.server import Server

__all__ = ["Kind", "Operation", "Outcome", "apply"]


class Kind(IntEnum):
    """What happened."""

    PULL = 1
    """A worker took the parameters and computes with them."""
    PUSH = 2
    """A worker's gradient came."""
    REJECT = 3
    """A worker's gradient was found unusable before it came."""
    SKIP = 4
    """A worker's step ended without a gradient."""
    REMOVE = 5
    """A worker takes part no longer; ``version``: 0 where it has ended a run and will be back for
    the next one, -1 where it is lost."""
    ADD = 6
    """A worker takes part (again); ``version``: how often its process has been replaced by a new
    one, -1 where it goes on from a run to the next."""
    LIMIT = 7
    """``version`` is the last that may be made from now on; -1: there is no limit."""
    READ = 8
    """A worker took the final parameters; it does not compute with them."""


class Operation(NamedTuple):
    """One of them."""

    kind: Kind
    worker: int
    """Whose; -1 for none."""
    version: int = -1
    """Of a push or rejection: at which the gradient was computed."""


class Outcome(NamedTuple):
    """What came of it."""

    accepted: bool = False
    """Whether a pushed gradient is used."""
    staleness: int = -1
    """Of a pushed gradient; -1 for other operations."""
    fault: str | None = None
    """What is wrong with a pushed gradient and whose it is; None if it only came too late."""
    tensors: Sequence[Tensor] = ()
    """What a pull or read hands out; valid until the next operation."""


def apply(
    server: Server, operation: Operation, gradient: Sequence[Tensor] = (), why: str = ""
) -> Outcome:
    """Let a server, or one shard of it, do it.

    Args:
        server: the one.
        operation: what.
        gradient: of a push, all of it finite: whoever computed it has seen to that.
        why: what is wrong with a rejected gradient.
    """
    kind, worker, version = operation
    if kind == Kind.PULL:
        return Outcome(tensors=server.pull(worker))
    if kind == Kind.READ:
        return Outcome(tensors=server.parameters)
    if kind == Kind.PUSH:
        return Outcome(*server.push(worker, gradient, version, finite=True))
    if kind == Kind.REJECT:
        return Outcome(*server.reject(worker, version, why))
    if kind == Kind.SKIP:
        server.skip(worker)
    elif kind == Kind.REMOVE:
        server.remove(worker, done=version == 0)
    elif kind == Kind.ADD:
        server.add(worker)
    else:
        server.last_version = None if version < 0 else version
    return Outcome()
