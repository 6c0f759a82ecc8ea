"""What a server, its shards and its workers tell each other: the first number of each message.

=========  ==========================  ==========================================================
request    numbers                     answer
=========  ==========================  ==========================================================
PUSH       version, speed; a gradient  none
STAGE      a part of a gradient        none: a shard keeps it until the PUSH has been judged
REJECT     version, which fault        none
SKIP, STOP, CLOSE                      none
START      the last version, or -1     START, when all are there
PULL                                   PULL, what `Pulled` holds; parameters, from every shard
SETTLE                                 SETTLE, the same
VERSION                                VERSION, the version
=========  ==========================  ==========================================================

While a worker waits it is sent STILL now and then. FAILED in place of an answer: the server
stopped. The first shard tells the others every `Operation` (its kind, worker and version, and
whether it was accepted; of a PULL or READ the kind, the worker, and what `Pulled` holds), and
besides DISCARD, JOIN and CLOSE.

Where a worker is several ranks, with a piece of its replica each, the first one asks and is
answered by the first shard as above. Each other one has a wire to the shard of its piece alone, to
which it sends STAGE and nothing else; that shard hands on what the first shard tells it: START,
VERSION, STILL, FAILED (of one worker, or -1: of all), and the answers to PULL and SETTLE.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import IntEnum

from torch import Tensor

from scaledtrain.comm.protocols import Pulled
from scaledtrain.server.checks import find_misfit, find_not_finite

__all__ = ["FAULTS", "Request", "find_fault", "numbers_of", "pulled_from"]

_logger = logging.getLogger(__name__)

FAULTS = ("its gradient holds NaN or infinity", "its gradient does not fit the parameters")


class Request(IntEnum):
    """The first number of a message, if it is not the `Kind` of an operation."""

    PUSH = 101
    STAGE = 102
    REJECT = 103
    SKIP = 104
    STOP = 105
    CLOSE = 106
    START = 107
    PULL = 108
    SETTLE = 109
    VERSION = 110
    STILL = 111
    FAILED = 112
    DISCARD = 113
    """The part of a gradient that this worker staged will not be used."""
    JOIN = 114
    """A new process has taken this worker's place; the version is how often that has happened."""


def pulled_from(numbers: Sequence[float]) -> Pulled:
    """What the answer to PULL or SETTLE says."""
    _, version, staleness, learning_rate, flags, fastest, *_ = numbers
    stopped, complete = int(flags) & 1, int(flags) & 2
    return Pulled(
        int(version), int(staleness), learning_rate, bool(stopped), fastest, bool(complete)
    )


def numbers_of(kind: int, pulled: Pulled) -> list[float]:
    """The answer to PULL or SETTLE."""
    flags = pulled.stopped + 2 * pulled.complete
    return [
        kind, pulled.version, pulled.staleness, pulled.learning_rate, flags, pulled.fastest
    ]  # fmt: skip


def find_fault(worker: int, gradient: Sequence[Tensor], like: Sequence[Tensor]) -> int | None:
    """Which of `FAULTS` it has; the log of this worker says where."""
    why, fault = find_misfit(gradient, like), 1
    if why is None:
        why, fault = find_not_finite(gradient), 0
    if why is None:
        return None
    _logger.warning("worker %d made a gradient that no server can use: %s", worker, why)
    return fault
