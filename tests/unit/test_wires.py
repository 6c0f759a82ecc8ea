"""What every wire keeps to; two threads of one process stand for the two ranks at its ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm import shared_memory
from scaledtrain.comm.wires.shared_wire import SharedWire
from scaledtrain.comm.wires.torch_wire import TorchWire
from scaledtrain.comm.wires.wire import LocalWire, Wire
from scaledtrain.errors import PeerLostError, RendezvousError, WaitTimeoutError

LONG = 30.0  # nothing here waits so long, unless something is wrong
SHORT = 0.3
# What end 0 and end 1 receive: a scalar, nothing, two dtypes, and one that travels alone (80 kB).
UP = [torch.empty(()), torch.empty(0, 3), torch.empty(2, 2, dtype=torch.bfloat16)]
DOWN = [torch.empty(20_000), torch.empty(3, dtype=torch.float64)]
UP_BYTES, DOWN_BYTES = 4 + 0 + 4 * 2, 20_000 * 4 + 3 * 8
SLOTS = (1, 2)
CPU = torch.device("cpu")

Pair = tuple[Wire, Wire]


def local_pair(seconds: float) -> Pair:
    return LocalWire.pair((UP, DOWN), SLOTS, ("rank 0", "rank 1"), seconds)


def both(make: Callable[[int], Wire | None]) -> Pair:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(make, range(2))
    assert first is not None
    assert second is not None
    return first, second


def shared_pair(seconds: float) -> Pair:
    store = dist.HashStore()

    def make(end: int) -> SharedWire | None:
        return SharedWire.connect(store, "wire", end, (UP, DOWN), SLOTS, (0, 1), LONG)

    wires = both(make)
    for wire in wires:
        wire._timeout_seconds = seconds  # type: ignore[attr-defined]
    return wires


def torch_pair(seconds: float, ahead: bool = False, receipts: bool = False) -> Pair:
    """Where ``ahead``, end 1 reads ahead; ``receipts``: it also says that it has."""
    store = dist.HashStore()

    def make(end: int) -> TorchWire:
        return TorchWire(
            store,
            end,
            (UP, DOWN),
            SLOTS,
            (0, 1),
            LONG,
            CPU,
            reads_ahead=ahead and end == 1,
            gives_receipts=receipts and end == 1,
            wants_receipts=receipts and end == 0,
        )

    wires = both(make)
    for wire in wires:
        wire._timeout_seconds = seconds  # type: ignore[attr-defined]
    return wires


needs_linux = pytest.mark.skipif(not shared_memory.available(), reason="needs Linux")
KINDS = [
    pytest.param(local_pair, id="local"),
    pytest.param(shared_pair, id="shared", marks=needs_linux),
    pytest.param(torch_pair, id="torch"),
    pytest.param(partial(torch_pair, ahead=True), id="torch, reads ahead"),
    pytest.param(partial(torch_pair, ahead=True, receipts=True), id="torch, receipts"),
]
Make = Callable[[float], Pair]
every_kind = pytest.mark.parametrize("make", KINDS)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def filled(like: list[Tensor], value: float) -> list[Tensor]:
    return [torch.full(t.shape, value, dtype=t.dtype) for t in like]


def close(wires: Pair) -> None:
    for wire in wires:
        wire.close()


@every_kind
def test_numbers_and_tensors_come_whole_and_in_order(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    zero, one = wires = make(LONG)

    def sends() -> None:
        zero.send([1, 2.5, 2**53])
        zero.send([2], filled(DOWN, 7.0))
        zero.send([3, 0, 0, 0, 0, 0, -1.0])
        zero.send([4], [t[::2] for t in filled([torch.empty(40_000), torch.empty(6)], 8.0)])

    call = threads.submit(sends)
    numbers, tensors = one.receive(LONG)
    assert (list(numbers[:3]), tensors) == ([1, 2.5, 2**53], None)
    numbers, tensors = one.receive(LONG)
    assert numbers[0] == 2
    assert tensors is not None
    assert all(map(torch.equal, tensors, filled(DOWN, 7.0)))
    one.release()
    numbers, nothing = one.receive(LONG)
    assert (list(numbers[:7]), nothing) == ([3, 0, 0, 0, 0, 0, -1.0], None)
    numbers, tensors = one.receive(None)
    assert tensors is not None
    # Neither contiguous nor, the second, of the wire's dtype: 1 B of 4 would differ if not cast.
    assert all(map(torch.equal, tensors, filled(DOWN, 8.0)))
    call.result()
    close(wires)


@every_kind
def test_both_ends_send_and_what_is_written_is_sent_from_where_it_lies(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    zero, one = wires = make(LONG)

    def answers() -> None:
        numbers, tensors = zero.receive(LONG)
        assert numbers[0] == 5
        assert tensors is not None
        assert [t.shape for t in tensors] == [t.shape for t in UP]
        assert all(map(torch.equal, tensors, filled(UP, 1.5)))
        zero.release()
        written = zero.write(filled(DOWN, 2.0))
        written[1].fill_(3.0)  # had it been copied again, this would be lost
        zero.send([6], written)

    call = threads.submit(answers)
    one.send([5], one.write(filled(UP, 1.5)))
    numbers, tensors = one.receive(LONG)
    call.result()
    assert numbers[0] == 6
    assert tensors is not None
    assert torch.equal(tensors[0], torch.full((20_000,), 2.0))
    assert tensors[1].tolist() == [3.0, 3.0, 3.0]
    close(wires)


@every_kind
def test_what_was_received_stays_until_it_is_released(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    """End 1 holds two messages; the memory of the first is used again for the third."""
    zero, one = wires = make(LONG)

    def sends() -> None:
        for value in (1.0, 2.0, 3.0, 4.0):
            zero.send([value], filled(DOWN, value))

    call = threads.submit(sends)
    first, second = (one.receive(LONG).tensors for _ in range(2))
    assert first is not None
    assert second is not None
    assert [first[1][0].item(), second[1][0].item()] == [1.0, 2.0]
    one.release()
    third = one.receive(LONG).tensors
    assert third is not None
    assert third[1].data_ptr() == first[1].data_ptr()
    assert [second[1][0].item(), third[1][0].item()] == [2.0, 3.0]
    one.release()
    fourth = one.receive(LONG).tensors
    assert fourth is not None
    assert fourth[1].data_ptr() == second[1].data_ptr()
    call.result()
    close(wires)


@every_kind
def test_bytes_are_those_of_tensors_to_another_process(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    zero, one = wires = make(LONG)

    def sends() -> None:
        zero.send([1])
        for _ in range(2):
            zero.send([2], filled(DOWN, 0.0))
        zero.receive(LONG)

    call = threads.submit(sends)
    for _ in range(3):
        one.receive(LONG)
    one.send([3], filled(UP, 0.0))
    call.result()
    other_process = not isinstance(zero, LocalWire)
    assert (zero.bytes_sent, zero.bytes_received) == (
        2 * DOWN_BYTES * other_process,
        UP_BYTES * other_process,
    )
    assert (one.bytes_sent, one.bytes_received) == (
        UP_BYTES * other_process,
        2 * DOWN_BYTES * other_process,
    )
    close(wires)


@every_kind
def test_a_message_that_does_not_come_is_an_error_that_names_the_other_end(make: Make) -> None:
    _, one = wires = make(LONG)
    with pytest.raises(WaitTimeoutError, match=r"(?s)rank 0.*raise timeout_seconds"):
        one.receive(SHORT)
    close(wires)


@every_kind
def test_an_end_that_takes_nothing_is_an_error_that_names_it(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    """End 1 has room for two; nobody at it reads, or releases, more."""
    zero, one = wires = make(SHORT)
    taken = threads.submit(lambda: [one.receive(LONG) for _ in range(2)])
    with pytest.raises(WaitTimeoutError, match=r"(?s)rank 1.*raise timeout_seconds"):
        for _ in range(4):
            zero.send([1], filled(DOWN, 0.0))
    assert len(taken.result()) == 2
    close(wires)


@every_kind
def test_closing_wakes_who_waits_at_the_other_end(make: Make, threads: ThreadPoolExecutor) -> None:
    zero, one = wires = make(LONG)
    call = threads.submit(zero.receive, None)
    time.sleep(0.05)  # whether it waits already makes no difference to what is asserted
    one.close()
    if isinstance(one, TorchWire):
        del wires, one  # nothing of this end is left
    with pytest.raises(PeerLostError, match="rank 1"):
        call.result()
    zero.close()


@every_kind
def test_what_was_sent_before_closing_still_comes(make: Make, threads: ThreadPoolExecutor) -> None:
    zero, one = make(LONG)
    call = threads.submit(one.receive, LONG)
    zero.send([9])
    zero.close()
    assert call.result().numbers[0] == 9
    with pytest.raises(PeerLostError, match="rank 0"):
        one.receive(LONG)
    with pytest.raises(PeerLostError, match="rank 0"):  # and again
        one.receive(LONG)
    one.close()


def test_an_end_that_nobody_comes_to_is_an_error_that_names_it() -> None:
    store = dist.HashStore()
    with pytest.raises(RendezvousError, match="rank 3 could not connect to rank 7"):
        TorchWire(store, 0, (UP, DOWN), SLOTS, (3, 7), SHORT, CPU)


def test_reading_ahead_takes_what_nobody_asked_for_yet() -> None:
    """One thread does all: without reading ahead the first send would wait for a receive."""
    zero, one = wires = torch_pair(LONG, ahead=True, receipts=True)
    zero.send([1])
    for value in (2.0, 3.0):  # as many as end 1 has slots for
        zero.send([value], filled(DOWN, value))
    numbers = [one.receive(LONG).numbers[0] for _ in range(3)]
    assert numbers == [1, 2, 3]
    close(wires)


def test_a_receipt_means_that_the_tensors_are_there() -> None:
    """What was sent and receipted is received although the sender is gone."""
    zero, one = torch_pair(LONG, ahead=True, receipts=True)
    zero.send([1], filled(DOWN, 5.0))
    zero.close()
    del zero
    tensors = one.receive(LONG).tensors
    assert tensors is not None
    assert torch.equal(tensors[0], torch.full((20_000,), 5.0))
    with pytest.raises(PeerLostError, match="rank 0"):
        one.receive(LONG)
    one.close()


@every_kind
def test_many_small_messages_each_way_at_once(make: Make, threads: ThreadPoolExecutor) -> None:
    """More of them than a ring has places; each end has a thread that sends and one that reads."""
    zero, one = wires = make(LONG)

    def send(wire: Wire) -> None:
        for number in range(600):
            wire.send([number])

    def read(wire: Wire) -> list[float]:
        return [wire.receive(LONG).numbers[0] for _ in range(600)]

    readers = [threads.submit(read, wire) for wire in wires]
    for sender in [threads.submit(send, wire) for wire in (zero, one)]:
        sender.result()
    for reader in readers:
        assert reader.result() == list(range(600))
    close(wires)


def test_what_was_written_and_not_sent_gives_its_place_to_the_next() -> None:
    """A gradient with NaN is noticed while it is copied, and never arrives."""
    like = [torch.zeros(300_000), torch.zeros(3)]  # more than one piece; less
    ours, theirs = LocalWire.pair((like, like), (1, 1), ("a", "b"), timeout_seconds=1.0)
    bad = [torch.ones(300_000), torch.tensor([1.0, torch.nan, 1.0])]
    good = [torch.ones(300_000), torch.tensor([1.0, 2.0, 3.0])]
    assert math.isnan(theirs.write_and_sum(bad)[1])
    views, total = theirs.write_and_sum(good)
    assert total == 300_006.0
    theirs.send([7], views)
    message = ours.receive(1.0)
    assert message.tensors is not None
    assert message.tensors[1].tolist() == [1.0, 2.0, 3.0]
    assert bool((message.tensors[0] == 1.0).all())
