"""Who takes part: runs, leaving, stopping and dying, told by one word each."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from scaledtrain.comm.local import LocalBoard
from scaledtrain.errors import WaitTimeoutError
from scaledtrain.strategies.roster import Roster
from tests.worlds import World


def rosters(size: int) -> tuple[World, list[Roster]]:
    world = World(size)
    return world, world.run(lambda link: Roster(link.board(), link.rank, lambda: 0.0))


def test_who_has_not_begun_is_expected_and_who_left_is_not() -> None:
    """Rank 1 leaves the first run, and cannot go on to the next before 0 and 2 leave it, too."""
    world, all_three = rosters(3)
    zero, one, two = all_three
    zero.begin()
    assert zero.present() == [0, 1, 2]
    one.begin()
    two.begin()
    one.stop()
    assert zero.present() == [0, 1, 2]  # it asks for the end, but still takes messages
    left, both = threading.Event(), threading.Barrier(2, timeout=10)

    def run(link: Any) -> list[int]:
        if link.rank == 1:
            all_three[1].leave("the end")
            left.set()
            return []
        while 1 in all_three[link.rank].present():
            pass
        seen = all_three[link.rank].present()
        assert not left.is_set()
        both.wait()  # neither goes before the other has seen it
        all_three[link.rank].leave("the end")
        return seen

    assert world.run(run) == [[0, 2], [], [0, 2]]
    assert zero.present() == [0, 1, 2]  # of the next run


def test_the_next_run_of_one_is_the_end_of_the_last_for_another() -> None:
    """Rank 1 has begun the next run before rank 0 looked whether it left the last one."""
    _, (zero, one) = rosters(2)
    zero.begin()
    one.begin()
    one.begin()
    assert zero.present() == [0]
    assert zero.leave("the end") is True


def test_a_stop_is_of_one_run_and_outlasts_leaving() -> None:
    world, (zero, one) = rosters(2)
    zero.begin()
    one.begin()
    assert not zero.stopped
    one.stop()
    assert zero.stopped
    assert one.stopped

    def run(link: Any) -> bool:
        if link.rank == 1:
            return one.leave("the end")
        while 1 in zero.present():
            pass
        assert zero.stopped  # rank 1 has left, but asked before
        return zero.leave("the end")

    assert world.run(run) == [True, True]
    assert not zero.stopped
    zero.begin()
    one.begin()
    assert not zero.stopped


def test_the_dead_are_left_out_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    world, (zero, one, two) = rosters(3)
    for roster in (zero, one, two):
        roster.begin()
    assert zero.dead == frozenset()
    world.dead.add(1)
    zero.lost(2)  # a message to it failed, before the board knew
    assert zero.dead == zero.dead == {1, 2}
    assert zero.present() == [0]
    assert [r.getMessage()[:39] for r in caplog.records] == [
        "rank 2 died; rank 0 goes on without it:",
        "rank 1 died; rank 0 goes on without it:",
    ]
    assert two.present() == [0, 2]
    assert zero.leave("the end") is False


def test_all_alive_at_the_end() -> None:
    world, (zero, one) = rosters(2)
    zero.begin()
    one.begin()
    assert world.run(lambda link: (zero, one)[link.rank].leave("the end")) == [True, True]


def test_beats_are_told_once_a_second() -> None:
    now = [0.0]
    board = LocalBoard()
    roster = Roster(board, 0, lambda: now[0])
    roster.begin()
    words = []
    for now[0] in (0.25, 0.75, 1.0, 1.5, 2.0, 2.5):
        roster.beat()
        words.append(board.read()[0])
    # One at 1.0, one at 2.0; the lowest two bits tell of leaving and stopping.
    assert [word - words[0] for word in words] == [0, 0, 4, 4, 8, 8]


def test_alone() -> None:
    roster = Roster(LocalBoard(), 0, lambda: 0.0)
    assert roster.present() == [0]
    roster.begin()
    assert roster.leave("the end") is True
    with pytest.raises(WaitTimeoutError, match="the end waits for another rank"):
        LocalBoard().wait(lambda words: words[0] == 1, "the end")
