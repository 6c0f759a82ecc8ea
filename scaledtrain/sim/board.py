"""The board in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scaledtrain.sim.world import Rank, World

__all__ = ["VirtualBoard", "Words"]

_DEAD = -1


class Words:
    """One number of each rank, and who waits for what.

    All that wait here wait for about the same, so a change is shown to one of them only: when it is
    content, the others look, too; and all look when nothing else is left to happen.

    Args:
        world: of the ranks.
    """

    def __init__(self, world: World) -> None:
        self.words = [0] * len(world.ranks)
        self._waiting: list[tuple[Rank, Callable[[Sequence[int]], bool], str]] = []
        world.on_stall(self._look)

    def write(self, rank: int, word: int) -> None:
        """Replace a word."""
        self.words[rank] = word
        if self._waiting and self._waiting[0][1](self.words):
            self._look()

    def lose(self, rank: int) -> None:
        """A rank died."""
        self.write(rank, _DEAD)

    def wait(self, rank: Rank, until: Callable[[Sequence[int]], bool], doing: str) -> None:
        """Return when the words are so."""
        while not until(self.words):
            self._waiting.append((rank, until, doing))
            rank.wait(lambda: f"in {doing} for the others")

    def _look(self) -> bool:
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            if entry[1](self.words):
                entry[0].wake()
            else:
                self._waiting.append(entry)
        return len(self._waiting) < len(waiting)


class VirtualBoard:
    """One rank's access to a board; what is written is seen at once.

    Args:
        words: of all.
        me: this rank.
    """

    def __init__(self, words: Words, me: Rank) -> None:
        self._words = words
        self._me = me

    def write(self, word: int) -> None:
        """Replace this rank's word."""
        self._words.write(self._me.number, word)

    def read(self) -> Sequence[int]:
        """The words; -1 of a rank that died."""
        return self._words.words

    def wait(self, until: Callable[[Sequence[int]], bool], doing: str) -> None:
        """Return as soon as the words are such that ``until`` is true."""
        self._words.wait(self._me, until, doing)
