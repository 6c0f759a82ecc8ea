"""What ranks keep for each other: traces by hand, and what stays the same whatever happens."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaledtrain.peers import (
    AveragingPeer,
    PushSumPeer,
    averaging_neighbours,
    exponential_neighbour,
)

DOUBLE = torch.float64
SETTINGS = settings(max_examples=60, deadline=None)


def values(*numbers: float) -> list[Tensor]:
    return [torch.tensor([float(x)], dtype=DOUBLE) for x in numbers]


def averaging(*numbers: float) -> list[AveragingPeer]:
    return [AveragingPeer(values(x)) for x in numbers]


def of(peer: AveragingPeer) -> float:
    return peer.tensors[0].item()


def test_averaging_between_which_another_rank_comes() -> None:
    """x = (0, 4, 8). 0 sends its 0 to 1, which goes to 2 and answers (0 - 4)/2 = -2.

    Before 0 takes the answer, 2 sends its 8 to 0: that goes to 4 and answers 4, so 2 goes to 4.
    Then 0 goes to 4 + 2 = 6. Sum: 6 + 2 + 4 = 12 as before.
    """
    zero, one, two = averaging(0, 4, 8)
    answer = [t.clone() for t in one.receive(0, [t.clone() for t in zero.tensors])]
    assert (answer[0].item(), of(one)) == (-2.0, 2.0)
    late = [t.clone() for t in zero.receive(2, [t.clone() for t in two.tensors])]
    two.finish(late)
    assert (of(zero), of(two)) == (4.0, 4.0)
    zero.finish(answer)
    assert [of(p) for p in (zero, one, two)] == [6.0, 2.0, 4.0]


def test_averaging_two_at_once_swaps_them() -> None:
    """Both send before either answers: 0 <- 4: to 2, answers 2; 1 <- 0: to 2, answers -2.

    Then 0: 2 + 2 = 4 and 1: 2 - 2 = 0. Nothing is averaged, nothing lost.
    """
    zero, one = averaging(0, 4)
    sent = [t.clone() for t in zero.tensors], [t.clone() for t in one.tensors]
    for_zero = [t.clone() for t in one.receive(0, sent[0])]
    for_one = [t.clone() for t in zero.receive(1, sent[1])]
    zero.finish(for_zero)
    one.finish(for_one)
    assert (of(zero), of(one)) == (4.0, 0.0)


@st.composite
def interleavings(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int]]]:
    """What happens to 2 to 5 ranks, in an order that any number of threads could produce."""
    n = draw(st.integers(2, 5))
    events = []
    for _ in range(draw(st.integers(1, 25))):
        rank = draw(st.integers(0, n - 1))
        other = draw(st.integers(0, n - 2))
        kind = draw(st.sampled_from(["send", "arrive", "finish", "move"]))
        events.append((kind, rank, other + (other >= rank)))
    return n, events


@SETTINGS
@given(interleavings())
def test_averaging_keeps_the_sum_whatever_interleaves(
    case: tuple[int, list[tuple[str, int, int]]],
) -> None:
    """Exactly: whole numbers halved at most 25 times fit into the 53 bits of a float64."""
    n, events = case
    peers = averaging(*(100 * i for i in range(n)))
    expected = Fraction(sum(100 * i for i in range(n)))
    sent: dict[int, tuple[int, list[Tensor]]] = {}  # one call at a time of each rank
    answers: dict[int, list[Tensor]] = {}
    for kind, rank, other in events:
        if kind == "send" and rank not in sent and rank not in answers:
            sent[rank] = (other, [t.clone() for t in peers[rank].tensors])
        elif kind == "arrive" and rank in sent:
            to, message = sent.pop(rank)
            answers[rank] = [t.clone() for t in peers[to].receive(rank, message)]
        elif kind == "finish" and rank in answers:
            peers[rank].finish(answers.pop(rank))
        elif kind == "move":  # by a gradient, whatever is on its way
            peers[rank].tensors[0] += 1.0
            expected += 1
        # What an answer says that was not yet taken is on its way: it will be subtracted.
        on_its_way = sum((-Fraction(a[0].item()) for a in answers.values()), Fraction(0))
        assert sum(Fraction(of(p)) for p in peers) + on_its_way == expected


def test_averaging_brings_all_to_the_mean() -> None:
    """Random pairs, one after the other: x = 0..7 goes to 3.5; each pair halves its difference."""
    peers = averaging(*range(8))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        i, j = torch.randperm(8, generator=generator)[:2].tolist()
        peers[i].finish(peers[j].receive(i, [t.clone() for t in peers[i].tensors]))
    for peer in peers:
        assert of(peer) == pytest.approx(3.5, abs=1e-6)


@pytest.mark.parametrize("present", [[0], [0, 1], [0, 1, 2], [1, 4, 5, 7, 8]])
def test_who_calls_is_never_called(present: list[int]) -> None:
    calls = {rank: averaging_neighbours(rank, present) for rank in present}
    called = set().union(*calls.values())
    assert called == set(present[1::2])
    assert not any(calls[rank] for rank in called)
    assert all(calls[rank] or len(present) == 1 for rank in set(present) - called)


def test_an_optimizer_sees_what_messages_change() -> None:
    (peer,) = averaging(1)
    peer.receive(1, values(3))
    assert peer.parameters[0].item() == 2.0
    peer.write(values(5))
    into = [torch.nn.Parameter(torch.zeros(1, dtype=DOUBLE))]
    peer.read(into)
    assert into[0].item() == peer.parameters[0].item() == 5.0


# Push-sum.


def push_sums(*numbers: float) -> list[PushSumPeer]:
    return [PushSumPeer(values(x)) for x in numbers]


def z(peer: PushSumPeer) -> float:
    into = values(0)
    peer.read(into)
    return into[0].item()


def test_push_sum_by_hand() -> None:
    """z = (0, 8). 0 gives (0, 1/2): 1 has (8, 3/2), z = 16/3. 1 gives (4, 3/4): 0 has (4, 5/4).

    z = (16/5, 16/3); sum x = 4 + 4 = 8 and sum w = 5/4 + 3/4 = 2, as in the beginning.
    """
    zero, one = push_sums(0, 8)
    message = zero.message()
    zero.give(message)
    assert (message[0].item(), message[1].item(), zero.weight) == (0.0, 0.5, 0.5)
    assert one.receive(0, message) == []
    assert z(one) == pytest.approx(16 / 3)
    one.give(message)
    zero.receive(1, message)
    assert (zero.share[0].item(), zero.weight, one.share[0].item(), one.weight) == (
        4,
        1.25,
        4,
        0.75,
    )
    assert (z(zero), z(one)) == (pytest.approx(16 / 5), pytest.approx(16 / 3))


@SETTINGS
@given(interleavings())
def test_push_sum_keeps_both_sums_whatever_interleaves(
    case: tuple[int, list[tuple[str, int, int]]],
) -> None:
    """Exactly, as above; messages arrive in any order, any time later."""
    n, events = case
    peers = push_sums(*(100 * i for i in range(n)))
    expected = Fraction(sum(100 * i for i in range(n)))
    flying: list[tuple[int, list[Tensor]]] = []
    for kind, rank, other in events:
        if kind == "send":
            message = peers[rank].message()
            peers[rank].give(message)
            flying.append((other, message))
        elif kind == "arrive" and flying:
            to, message = flying.pop(rank % len(flying))
            peers[to].receive(-1, message)
        elif kind == "move":
            peers[rank].share[0] += 1.0
            expected += 1
        for i, total in ((0, expected), (1, Fraction(n))):
            held = sum(Fraction(p.share[i].item()) for p in peers)
            assert held + sum(Fraction(m[i].item()) for _, m in flying) == total


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_push_sum_brings_all_to_the_mean(n: int) -> None:
    """In turns that are not in step: rank r sends in every (1 + r % 3)-th round only."""
    peers = push_sums(*range(n))
    for turn in range(300):
        for rank, peer in enumerate(peers):
            if turn % (1 + rank % 3) == 0 and peer.may_give:
                to = exponential_neighbour(rank, range(n), turn)
                assert to is not None
                message = peer.message()
                peer.give(message)
                peers[to].receive(rank, message)
    for peer in peers:
        assert z(peer) == pytest.approx((n - 1) / 2, abs=1e-6)


def test_push_sum_in_step_reaches_all_in_log_n_turns() -> None:
    """8 ranks, 3 turns, all at once: every z is the mean 3.5 exactly, and every w is 1."""
    peers = push_sums(*range(8))
    for turn in range(3):
        messages = [p.message() for p in peers]
        for peer, message in zip(peers, messages, strict=True):
            peer.give(message)
        for rank, message in enumerate(messages):
            to = exponential_neighbour(rank, range(8), turn)
            assert to is not None
            peers[to].receive(rank, message)
    assert [z(p) for p in peers] == [3.5] * 8
    assert [p.weight for p in peers] == [1.0] * 8


def test_push_sum_gives_nothing_below_one_half() -> None:
    """1 -> 1/2 -> 1/4: a rank that nobody sends to keeps a quarter."""
    (peer,) = push_sums(6)
    for may, weight in ((True, 0.5), (True, 0.25)):
        assert peer.may_give is may
        peer.give(peer.message())
        assert peer.weight == weight
    assert not peer.may_give
    assert z(peer) == 6.0
    peer.restart()
    assert (peer.share[0].item(), peer.weight) == (6.0, 1.0)


def test_push_sum_with_a_weight_of_one_is_bit_for_bit() -> None:
    numbers = torch.randn(100, generator=torch.Generator().manual_seed(0))
    peer, into = PushSumPeer([numbers]), [torch.zeros(100)]
    peer.read(into)
    assert torch.equal(into[0], numbers)
    peer.write([numbers * 3])
    assert torch.equal(peer.share[0], numbers * 3)


def test_push_sum_writes_z() -> None:
    """w = 1/2: x = z / 2, read back as z."""
    (peer,) = push_sums(6)
    peer.give(peer.message())
    peer.write(values(10))
    assert (peer.share[0].item(), z(peer)) == (5.0, 10.0)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, [None, None]),
        (2, [1, 1, 1]),
        (3, [1, 2, 1]),
        (4, [1, 2, 1]),
        (5, [1, 2, 4, 1]),
        (9, [1, 2, 4, 8, 1]),
    ],
)
def test_exponential_graph(n: int, expected: list[int | None]) -> None:
    got = [exponential_neighbour(0, range(n), turn) for turn in range(len(expected))]
    assert got == expected


def test_exponential_graph_over_those_that_are_left() -> None:
    """Of 0..5 the ranks 1, 2, 5 are left: a ring of three, by turns 1 and 2 places on."""
    assert [exponential_neighbour(2, [1, 2, 5], turn) for turn in (0, 1)] == [5, 1]
    assert exponential_neighbour(2, [2], 0) is None
