"""Messages between ranks' peers over both transports; threads of one process stand for ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm import shared_memory
from scaledtrain.comm.protocols import Peer
from scaledtrain.comm.wire_peers import WirePeers
from scaledtrain.comm.wires.wiring import Job
from scaledtrain.errors import PeerLostError, WaitTimeoutError

LONG = 30.0  # nothing here waits so long, unless something is wrong
LIKE = [torch.empty(3), torch.empty(20_000)]  # small ones travel together, others alone
BYTES = 4 * 3 + 4 * 20_000

transports = pytest.mark.parametrize(
    "share_memory",
    [
        pytest.param(
            True,
            id="shared memory",
            marks=pytest.mark.skipif(not shared_memory.available(), reason="needs Linux"),
        ),
        pytest.param(False, id="torch"),
    ],
)


def message(value: float) -> list[Tensor]:
    return [torch.full_like(t, value) for t in LIKE]


class Doubling:
    """Answers twice what it was sent, and keeps who sent what."""

    def __init__(self) -> None:
        self.received: list[tuple[int, float]] = []
        self._answer = message(0.0)

    def receive(self, sender: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        self.received.append((sender, tensors[1][-1].item()))
        for answer, tensor in zip(self._answer, tensors, strict=True):
            torch.mul(tensor, 2.0, out=answer)
        return self._answer


class Failing:
    def receive(self, sender: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        raise ValueError("of a wrong shape")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def meet(
    peers: Sequence[Peer], share_memory: bool, answers: bool = True, seconds: float = LONG
) -> list[WirePeers]:
    store = dist.HashStore()

    def one(rank: int) -> WirePeers:
        job = Job(store, rank, len(peers), share_memory, torch.device("cpu"), LONG)
        return WirePeers(job, LIKE, peers[rank], answers)

    with ThreadPoolExecutor(len(peers)) as pool:
        met = list(pool.map(one, range(len(peers))))
    for way in met:
        way._timeout_seconds = seconds
    return met


def close(ways: Sequence[WirePeers]) -> None:
    for way in ways:
        way.close()


@transports
def test_two_that_call_each_other_at_the_same_moment_all_get_their_answers(
    share_memory: bool, threads: ThreadPoolExecutor
) -> None:
    peers = [Doubling(), Doubling()]
    ways = meet(peers, share_memory)

    def call_often(rank: int) -> list[float]:
        answer, answers = message(0.0), []
        for number in range(100):
            ways[rank].call(1 - rank, message(100.0 * rank + number), answer).wait()
            assert answer[0].tolist() == [answer[1][0].item()] * 3
            answers.append(answer[1][-1].item())
        return answers

    zero, one = threads.map(call_often, (0, 1))
    assert zero == [2.0 * number for number in range(100)]
    assert one == [2.0 * (100 + number) for number in range(100)]
    assert peers[0].received == [(1, 100.0 + number) for number in range(100)]
    assert peers[1].received == [(0, float(number)) for number in range(100)]
    # 100 messages and 100 answers each way.
    assert [way.wires[0].bytes_sent for way in ways] == [200 * BYTES] * 2
    close(ways)


@transports
def test_three_in_a_ring_without_answers(share_memory: bool, threads: ThreadPoolExecutor) -> None:
    peers = [Doubling(), Doubling(), Doubling()]
    ways = meet(peers, share_memory, answers=False)

    def call_often(rank: int) -> None:
        for number in range(30):
            ways[rank].call((rank + 1) % 3, message(number)).wait()

    list(threads.map(call_often, range(3)))
    for rank, peer in enumerate(peers):
        assert peer.received == [((rank - 1) % 3, float(number)) for number in range(30)]
    assert sum(wire.bytes_sent for way in ways for wire in way.wires) == 3 * 30 * BYTES
    close(ways)


@transports
def test_no_message_reaches_a_peer_while_its_rank_holds_the_lock(share_memory: bool) -> None:
    peers = [Doubling(), Doubling()]
    ways = meet(peers, share_memory, seconds=0.2)
    answer = message(0.0)
    with ways[1].lock():
        late = ways[0].call(1, message(1.0), answer)
        with pytest.raises(WaitTimeoutError, match="rank 1 did not take a message within 0.2 s"):
            late.wait()
        assert not peers[1].received
    ways[0]._timeout_seconds = LONG
    # The late answer, 2, is not taken for that of the next call.
    ways[0].call(1, message(5.0), answer).wait()
    assert answer[0].tolist() == [10.0, 10.0, 10.0]
    assert peers[1].received == [(0, 1.0), (0, 5.0)]
    close(ways)


@transports
def test_a_rank_that_closes_fails_the_call_under_way_and_those_that_follow(
    share_memory: bool,
) -> None:
    ways = meet([Doubling(), Doubling()], share_memory)
    with ways[1].lock():
        call = ways[0].call(1, message(1.0))
        ways[1].close()
        with pytest.raises(PeerLostError, match="rank 1"):
            call.wait()
    ways[0].threads[0].join(LONG)  # it has heard
    with pytest.raises(PeerLostError, match="rank 1"):
        ways[0].call(1, message(1.0)).wait()
    ways[0].close()


@transports
def test_a_peer_that_fails_says_so_and_keeps_nobody_waiting(
    share_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ways = meet([Doubling(), Failing()], share_memory)
    with pytest.raises(PeerLostError, match="rank 1"):
        ways[0].call(1, message(1.0)).wait()
    assert "rank 0's message could not be taken in" in caplog.text
    assert "ValueError: of a wrong shape" in caplog.text
    with pytest.raises(PeerLostError, match="could not be taken in: ValueError"):
        ways[1].call(0, message(1.0))
    close(ways)


def test_who_is_lost_just_before_a_message_is_sent_does_not_keep_the_caller_waiting() -> None:
    """Shared memory takes a message for a rank that is gone: sending alone shows nothing."""
    if not shared_memory.available():
        pytest.skip("needs Linux")
    ways = meet([Doubling(), Doubling()], True)
    end = ways[0]._ends[1]
    send: Callable[..., None] = end.wire.send

    def lose_then_send(*arguments: object) -> None:
        end.lose("rank 1 died")
        send(*arguments)

    end.wire.send = lose_then_send  # type: ignore[method-assign]
    call = ways[0].call(1, message(1.0))
    with pytest.raises(PeerLostError, match="rank 1 died"):
        call.wait()
    close(ways)
