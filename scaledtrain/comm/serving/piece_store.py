"""A store for a piece of a worker's replica: its first rank asks, the others hear what it hears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Group, Pulled, ServeOptions
from scaledtrain.comm.serving.pushes import Pushes
from scaledtrain.comm.serving.requests import Request, find_fault, pulled_from
from scaledtrain.comm.serving.server_store import Local
from scaledtrain.comm.wires.wire import Message, Wire
from scaledtrain.comm.wires.wiring import Job
from scaledtrain.errors import ClusterError, ConfigError, WaitTimeoutError
from scaledtrain.server.checks import find_misfit
from scaledtrain.timeline import Timeline

__all__ = ["PieceStore", "Pieces"]


@dataclass(frozen=True)
class Pieces:
    """The ranks that have a worker's replica together.

    Args:
        job: these ranks, from whose numbers the pieces have theirs.
        group: the same.
    """

    job: Job
    group: Group

    def check(self, options: ServeOptions) -> None:
        """Raise ConfigError where an option is given that a worker of several ranks cannot have."""
        given = {
            f"shards={options.shards}": options.shards > 1,
            "overlap": options.overlap,
            f"compression={options.compression}": options.compression is not None,
        }
        if refused := [name for name, is_given in given.items() if is_given]:
            raise ConfigError(
                f"{' and '.join(refused)} of a parameter server cannot be where mesh.shard or "
                f"mesh.pipe is above 1: the server is divided already, over the {self.group.size} "
                "ranks of the first replica, and each rank exchanges its piece, as it is, between "
                f"two steps; leave {'them' if len(refused) > 1 else 'it'} out, or let each rank "
                "have a whole replica (mesh.shard=1, mesh.pipe=1)"
            )


class PieceStore(Pushes):
    """The store of a rank that has a later piece of its replica than the first.

    It sends the shard of its piece its parts of gradients, and asks for nothing: what the replica's
    first rank asks the first shard is answered here, too, by the shard of this piece. All ranks of
    a replica make the same calls.

    Args:
        wire: to the shard of this piece.
        like: this piece of the parameters.
        job: the workers.
        pieces: the ranks of this one's replica.
        local: the shard, if it lives in this process.
        timeline: where waiting and communication are recorded.
    """

    def __init__(
        self,
        wire: Wire,
        like: Sequence[Tensor],
        job: Job,
        pieces: Pieces,
        local: Local | None,
        timeline: Timeline,
    ) -> None:
        super().__init__(timeline, pieces.group)
        self._wire = wire
        self._like = like
        self._worker = job.rank
        self._rank = job.name(job.rank)
        self._leader = pieces.job.name(0)
        self._local = local
        self._timeout_seconds = job.timeout_seconds
        self._part: Sequence[Tensor] = ()

    def start(self, last_version: int | None) -> None:
        """Wait for all workers."""
        start = self._timeline.now()
        self._receive("start")
        self._timeline.add("waiting", start)

    def _judge(self, update: Sequence[Tensor]) -> int | None:
        if find_misfit(update, self._like) is None:
            self._part, total = self._wire.write_and_sum(update)
            if math.isfinite(total):
                return None
        return find_fault(self._worker, update, self._like)

    def _stage(self) -> None:
        self._wire.send([Request.STAGE], self._part)

    def _hand_over(self, version: int, speed: float) -> None:
        pass

    def _reject(self, version: int, fault: int) -> None:
        pass

    def skip(self) -> None:
        """The first rank says it."""

    def stop(self) -> None:
        """The first rank says it."""

    def version(self) -> int:
        """What the first rank is told."""
        return int(self._receive("version").numbers[1])

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Take this piece when the first rank pulls; the tensors keep their memory."""
        return self._take(into, "pull")

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait for all workers, then take the parameters."""
        return self._take(into, "the end of fit")

    @torch.no_grad()
    def _take(self, into: Sequence[Tensor], doing: str) -> Pulled:
        start = self._timeline.now()
        message = self._receive(doing)
        start = self._timeline.add("waiting", start)
        assert message.tensors is not None
        torch._foreach_copy_(list(into), list(message.tensors))
        self._wire.release()
        self._timeline.add("communication", start)
        return pulled_from(message.numbers)

    def _receive(self, doing: str) -> Message:
        while True:
            try:
                message = self._wire.receive(self._timeout_seconds)
            except WaitTimeoutError as error:
                raise WaitTimeoutError(
                    f"rank {self._rank} waited {self._timeout_seconds:g} s in {doing} for rank "
                    f"{self._leader}, which speaks to the server for their replica: it is stuck, "
                    f"or too slow: look at it, or raise timeout_seconds ({error})"
                ) from error
            if message.numbers[0] == Request.FAILED:
                failure = self._local.failure if self._local is not None else None
                raise ClusterError(
                    f"rank {self._rank} cannot go on: rank {self._leader}, which speaks to the "
                    "parameter server for their replica, is lost, or the server stopped; their "
                    "own messages say why"
                    if failure is None
                    else f"the parameter server stopped: {failure}"
                ) from failure
            if message.numbers[0] != Request.STILL:
                return message

    def state_dict(self) -> dict[str, Any]:
        """The state of the shard in this process; empty if there is none."""
        return {} if self._local is None else self._local.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the shard in this process."""
        if self._local is not None:
            self._local.load_state_dict(state)

    def close(self) -> None:
        """The first rank says it."""
