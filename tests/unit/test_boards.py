"""What both kinds of boards keep to; threads of one process stand for ranks."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from scaledtrain.comm import boards, shared_memory
from scaledtrain.comm.boards import SharedBoard, StoreBoard
from scaledtrain.comm.shared_memory import SharedSegment
from scaledtrain.errors import WaitTimeoutError
from tests.ranks import drop_connections

LONG = 30.0  # nothing here waits so long, unless something is wrong

Boards = Sequence[SharedBoard] | Sequence[StoreBoard]
Make = Callable[[int, float], Boards]


def shared(size: int, seconds: float) -> Sequence[SharedBoard]:
    store = dist.HashStore()

    def one(rank: int) -> SharedBoard:
        segment = SharedSegment.connect(
            store, "board", rank, size, n_bytes=8 * size, timeout_seconds=LONG
        )
        assert segment is not None
        return SharedBoard(segment, seconds)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def stored(size: int, seconds: float) -> Sequence[StoreBoard]:
    store = dist.HashStore()
    return [StoreBoard(store, rank, size, seconds) for rank in range(size)]


every_kind = pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            shared,
            id="shared memory",
            marks=pytest.mark.skipif(not shared_memory.available(), reason="needs Linux"),
        ),
        pytest.param(stored, id="store"),
    ],
)


def close(made: Boards) -> None:
    for board in reversed(made):  # rank 0 would wait for the others
        board.close()


@every_kind
def test_what_one_writes_all_read_and_it_itself_at_once(make: Make) -> None:
    made = make(3, LONG)
    assert list(made[1].read()) == [0, 0, 0]
    for rank, word in enumerate([5, 2**53 - 1, 7]):
        made[rank].write(word)
        assert made[rank].read()[rank] == word
    for board in made:
        board.wait(lambda words: list(words) == [5, 2**53 - 1, 7], "a test")
        assert list(board.read()) == [5, 2**53 - 1, 7]
    close(made)


@every_kind
def test_the_last_word_stays_when_its_rank_leaves(make: Make) -> None:
    made = make(2, LONG)
    made[1].write(3)
    made[1].close()
    made[0].wait(lambda words: words[1] == 3, "a test")
    close(made)


@every_kind
def test_a_wait_in_which_nothing_changes_ends_with_who_stands_where(make: Make) -> None:
    made = make(2, 0.3)
    made[0].write(4)
    made[1].write(2)
    with pytest.raises(
        WaitTimeoutError,
        match=r"rank 0 waited 0\.3 s in the end of fit .*\(rank 0: 4, rank 1: 2\)",
    ):
        made[0].wait(lambda words: words[1] == 4, "the end of fit")
    close(made)


class Clock:
    """Time that passes only while somebody sleeps; each second rank 1 makes a step."""

    def __init__(self, steps: Callable[[int], None]) -> None:
        self._steps = steps
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        before, self._now = self._now, self._now + seconds
        if int(self._now) > int(before):
            self._steps(int(self._now))


@pytest.mark.skipif(not shared_memory.available(), reason="needs Linux")
def test_a_wait_lasts_as_long_as_others_get_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 needs 20 s for its steps, which is more than the timeout, but 1 s for each."""
    made = shared(2, 3.0)
    clock = Clock(made[1].write)
    monkeypatch.setattr(boards, "time", clock)
    made[0].wait(lambda words: words[1] == 20, "a test")
    assert int(clock.monotonic()) == 20
    clock._steps = lambda step: None
    with pytest.raises(WaitTimeoutError, match="rank 1: 20"):
        made[0].wait(lambda words: words[1] == 21, "a test")
    assert clock.monotonic() == pytest.approx(23.0, abs=0.1)
    close(made)


@pytest.mark.skipif(not shared_memory.available(), reason="needs Linux")
def test_a_process_that_ends_is_told_of_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    made = shared(2, LONG)
    made[1].write(8)
    monkeypatch.setattr(made[0]._segment.processes[1], "alive", lambda: False)
    assert list(made[0].read()) == [0, -1]
    close(made)


def test_a_rank_that_falls_silent_is_told_of_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "_SILENCE_SECONDS", 0.4)
    made = stored(3, LONG)
    made[2].write(8)
    made[0].wait(lambda words: words[2] == 8, "a test")
    made[2].close()  # it writes no more, as if it had died
    made[0].wait(lambda words: list(words) == [0, 0, -1], "a test")
    close(made[:2])


class Gone:
    """A store whose server is gone."""

    def clone(self) -> Gone:
        return self

    def set(self, key: str, value: str) -> None:
        if not value.endswith(" 0"):
            raise dist.DistNetworkError("Broken pipe")


@pytest.mark.parametrize(("rank", "words"), [(0, [6, 0]), (1, [-1, 6])])
def test_without_its_store_rank_0_is_dead_for_the_others(rank: int, words: list[int]) -> None:
    board = StoreBoard(Gone(), rank, 2, LONG)  # type: ignore[arg-type]
    board.write(6)
    board._thread.join(LONG)
    assert list(board.read()) == words
    board.close()


def test_leaving_does_not_wait_for_a_connection_that_nobody_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def connect(store: dist.Store) -> None:
        asked.set()
        answered.wait(LONG)

    monkeypatch.setattr(boards, "reconnected", connect)
    monkeypatch.setattr(boards, "_CLOSE_SECONDS", 0.1)
    board = StoreBoard(Gone(), 1, 2, LONG)  # type: ignore[arg-type]
    assert asked.wait(LONG)
    board.close()
    assert board._thread.is_alive()  # it still waits for an answer
    answered.set()
    board._thread.join(LONG)


def test_the_rank_with_the_store_leaves_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "_CLOSE_SECONDS", LONG)
    made = stored(3, LONG)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(made[0].close)
        made[2].close()
        with pytest.raises(futures.TimeoutError):
            leaving.result(0.5)
        made[1].close()
        leaving.result(LONG)


def test_nobody_waits_for_a_rank_that_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "_CLOSE_SECONDS", LONG)
    monkeypatch.setattr(boards, "_SILENCE_SECONDS", 0.4)
    made = stored(2, LONG)
    made[1]._has_store = False  # so that it does not tell that it leaves
    made[1].close()
    made[0].wait(lambda words: words[1] == -1, "a test")
    begin = time.monotonic()
    made[0].close()
    assert time.monotonic() - begin < LONG / 2


@pytest.mark.skipif(sys.platform != "linux", reason="finds sockets in /proc")
def test_a_lost_connection_to_the_store_is_made_again() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [StoreBoard(store, rank, 2, LONG) for rank in range(2)]
    made[0].write(1)
    made[1].wait(lambda words: words[0] == 1, "a test")
    drop_connections(store.port)
    made[1].write(7)
    made[0].wait(lambda words: words[1] == 7, "a test")
    made[0].write(8)
    made[1].wait(lambda words: words[0] == 8, "a test")
    close(made)
