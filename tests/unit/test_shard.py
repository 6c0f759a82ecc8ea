"""A shard that does what the first one tells it; what breaks at one worker stays there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from scaledtrain.comm.protocols import Pulled
from scaledtrain.comm.serving.requests import Request, pulled_from
from scaledtrain.comm.serving.shard import ServerShard
from scaledtrain.comm.wires.wire import LocalWire, Message, Wire
from scaledtrain.errors import ClusterError, PeerLostError, RendezvousError, WaitTimeoutError
from scaledtrain.replica import Replica
from scaledtrain.server import Server
from scaledtrain.server.operations import Kind

LONG = 30.0  # nothing here waits so long, unless something is wrong
LIKE = [torch.empty(1, 1)]
ONE = [torch.ones(1, 1)]


class Deaf:
    """A wire to a worker that takes nothing."""

    closed = False

    def write(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors

    def send(self, numbers: Sequence[float], tensors: Sequence[Tensor] | None = None) -> None:
        raise WaitTimeoutError("worker 1 does not take it")

    def receive(self, timeout_seconds: float | None) -> Message:
        raise WaitTimeoutError("worker 1 sends nothing")

    def close(self) -> None:
        self.closed = True


def no_connection(worker: int, attempt: int) -> Wire:
    raise RendezvousError(f"worker {worker} did not come")


class Shard:
    """One parameter, 0 at first, a gradient of 1 takes 1 from it; worker 0 listens, 1 does not."""

    def __init__(self) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        replica = Replica(model, partial(torch.optim.SGD, lr=1.0))
        self.server = Server(replica.parameters, replica.updater, 2)
        self.shard = ServerShard(self.server, no_connection, lambda sent: sent, 0.1)
        self.first, self._first = self._pair("the first shard")
        self.worker, self._worker = self._pair("worker 0")
        self.deaf = Deaf()

    @staticmethod
    def _pair(who: str) -> tuple[LocalWire, LocalWire]:
        return LocalWire.pair((LIKE, LIKE), (4, 4), ("the shard", who), LONG)

    def run(self, *told: Sequence[float]) -> None:
        """Tell it all of this, then that it is over."""
        for numbers in told:
            self.first.send(numbers)
        self.first.send([Request.CLOSE])
        workers: dict[int, Wire] = {0: self._worker, 1: self.deaf}  # type: ignore[dict-item]
        self.shard.guarded(lambda: self.shard.run(self._first, workers))


def test_what_the_first_shard_tells_a_piece_of_a_replica_is_passed_on() -> None:
    """Worker 1 is deaf: it keeps nobody from hearing."""
    shard = Shard()
    told: list[list[float]] = [
        [Request.START, 0],
        [Request.STILL, 1],
        [Request.STILL, 0],
        [Kind.PULL, 0, 3, 2, 0.5, 1, 7.0],  # version, staleness, learning rate, flags, fastest
        [Request.VERSION, 0, 4],
        [Request.FAILED, -1],
    ]
    shard.run(*told)
    heard = [shard.worker.receive(LONG) for _ in range(5)]
    assert [message.numbers[0] for message in heard] == [
        Request.START, Request.STILL, Kind.PULL, Request.VERSION, Request.FAILED
    ]  # fmt: skip
    assert pulled_from(heard[2].numbers) == Pulled(
        3, 2, 0.5, stopped=True, fastest=7.0, complete=False
    )
    assert heard[2].tensors is not None
    assert heard[3].numbers[1] == 4


def test_a_part_is_used_or_thrown_away_as_the_first_shard_says() -> None:
    shard = Shard()
    for value in (1.0, 10.0, 100.0):
        shard.worker.send([Request.STAGE], [torch.full((1, 1), value)])
    shard.run(
        [Kind.PUSH, 0, 0, True],
        [Request.DISCARD, 0],
        [Kind.PUSH, 0, 1, True],
        [Kind.PULL, 0, -1, False],
    )
    assert shard.shard.failure is None
    numbers, tensors = shard.worker.receive(LONG)
    assert numbers[0] == Kind.PULL
    assert tensors is not None
    assert tensors[0].item() == -101.0  # without the 10


def test_a_worker_that_takes_nothing_does_not_stop_the_shard() -> None:
    shard = Shard()
    shard.worker.send([Request.STAGE], ONE)
    shard.run(
        [Kind.PULL, 1, -1, False],
        [Kind.READ, 1, -1, False],
        [Kind.REMOVE, 1, -1, False],
        [Request.JOIN, 1, 1],  # whoever should have come does not
        [Kind.PUSH, 0, 0, True],
    )
    assert shard.shard.failure is None
    assert shard.deaf.closed
    assert (shard.server.version, shard.server.members) == (1, {0})


def test_shards_that_disagree_end_the_run_for_all() -> None:
    shard = Shard()
    shard.worker.send([Request.STAGE], ONE)
    shard.run([Kind.PUSH, 0, 0, False])
    assert isinstance(shard.shard.failure, ClusterError)
    assert "disagree over a push of worker 0: accepted here" in str(shard.shard.failure)
    assert shard.worker.receive(LONG).numbers[0] == Request.FAILED


def test_a_shard_that_fails_hangs_up_on_the_first() -> None:
    """Else the first would send to it until its time is over, and the workers wait meanwhile."""
    shard = Shard()
    shard.run([Kind.PUSH, 1, 0, True])  # a part that never comes
    assert isinstance(shard.shard.failure, WaitTimeoutError)
    with pytest.raises(PeerLostError, match="the first shard has ended"):
        shard.first.receive(LONG)
