"""Who takes part in the run under way, where no server and no barrier says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from scaledtrain.comm.protocols import Board

__all__ = ["Roster"]

_logger = logging.getLogger(__name__)

_LEFT, _STOP = 1, 2  # bits of a word; above them the beats, above these the run
_BEAT = 4
_RUN = 2**32
_BEAT_SECONDS = 1.0


class Roster:
    """What each rank tells the others in one word: its run, that it lives, left, asks for the end.

    Runs are counted, so that a word of the last run is not taken for one of this run: while one
    rank still waits for the last to leave, another may be in the next run already.

    Args:
        board: where the words stand; nobody else writes on it.
        rank: this rank.
        now: the clock, in seconds.
    """

    def __init__(self, board: Board, rank: int, now: Callable[[], float]) -> None:
        self._board = board
        self._rank = rank
        self._now = now
        self._run = 0
        self._state = 0
        self._beats = 0
        self._last_beat = now()
        self._dead: set[int] = set()

    def begin(self) -> None:
        """This rank begins the next run."""
        self._run += 1
        self._state = self._beats = 0
        self._write()

    def beat(self) -> None:
        """This rank has made a step: about once in a second it is told, so that others wait on."""
        if self._now() - self._last_beat >= _BEAT_SECONDS:
            self._beats += 1
            self._write()

    def stop(self) -> None:
        """Ask that every rank ends the run."""
        self._state |= _STOP
        self._write()

    @property
    def stopped(self) -> bool:
        """Whether a rank asked that this run ends."""
        first = self._run * _RUN
        return any(word & _STOP and first <= word < first + _RUN for word in self._board.read())

    def present(self) -> list[int]:
        """The ranks that take part in this run or will, this one included, in order."""
        return self._present(self._board.read())

    def lost(self, rank: int) -> None:
        """That rank died, as a message to it has shown."""
        if rank not in self._dead:
            self._dead.add(rank)
            _logger.warning(
                "rank %d died; rank %d goes on without it: what only that one knew is lost",
                rank,
                self._rank,
            )

    @property
    def dead(self) -> frozenset[int]:
        """The ranks that are known to have died."""
        for rank, word in enumerate(self._board.read()):
            if word < 0:
                self.lost(rank)
        return frozenset(self._dead)

    def leave(self, doing: str) -> bool:
        """Take part no longer, wait until nobody does, and be ready for the next run.

        Returns:
            Whether all ranks are alive.

        Raises:
            WaitTimeoutError: a rank neither left nor made a step for too long.
        """
        self._state |= _LEFT
        self._write()
        self._board.wait(lambda words: not self._present(words), doing)
        self.begin()
        return not self.dead

    def _present(self, words: Sequence[int]) -> list[int]:
        ranks = enumerate(words)
        return [r for r, word in ranks if not self._has_left(word) and r not in self._dead]

    def _has_left(self, word: int) -> bool:
        if word < 0:
            return True
        run = word // _RUN
        return run > self._run or (run == self._run and bool(word & _LEFT))

    def _write(self) -> None:
        self._last_beat = self._now()
        self._board.write(self._run * _RUN + self._beats * _BEAT + self._state)
