"""How replicas come to know each other's costs: the same numbers everywhere, at the same step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from scaledtrain.balance.shares import Cost
from scaledtrain.comm.protocols import Board, Group

__all__ = ["Agree", "InLockstep", "OnBoard"]

# A word of a board has 53 bits.
_COST_BITS = 18
_ROUNDS = 2**16
_OCTAVE = 2**12  # codes between a time and twice that: they differ by 0.02 %
_DEAD = -1  # a word of a rank that died
_LOWEST = -40  # 2^-40 s and less is no time
_OVER = 1  # the last bit: this rank says nothing more


class Agree(Protocol):
    """Tells all replicas what each of them measured."""

    def __call__(self, number: int, mine: Cost | None) -> Sequence[Cost] | None:
        """Costs by replica, the same for all that ask; None: not all of them have any.

        Args:
            number: of the decision, from 1; all ask at the same ones.
            mine: of this rank; None: it has measured nothing.
        """

    def start(self) -> None:
        """A run begins; no replica asks before all have come here."""

    def end(self) -> None:
        """This rank will not ask again in this run."""


class InLockstep:
    """One reduction: for replicas that make every step, and end, together.

    Args:
        group: of the replicas.
        pieces: of the ranks that have this rank's replica, of which the slowest counts.
        device: where reductions are made.
    """

    def __init__(self, group: Group, pieces: Group, device: torch.device) -> None:
        self._group = group
        self._pieces = pieces
        self._device = device

    def __call__(self, number: int, mine: Cost | None) -> Sequence[Cost] | None:
        """Costs by replica."""
        cost = torch.tensor(mine or (0.0, 0.0), dtype=torch.float64)
        if self._pieces.size > 1:
            self._pieces.all_reduce([cost], "max").wait()
        costs = torch.zeros(self._group.size, 2, dtype=torch.float64, device=self._device)
        costs[self._group.rank] = cost
        self._group.all_reduce([costs], "sum").wait()
        found = [Cost(fixed, per_sample) for fixed, per_sample in costs.tolist()]
        return found if all(cost.per_sample > 0.0 for cost in found) else None

    def start(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing: the others end, too."""


class OnBoard:
    """A number on a board: where a replica may end, or die, without the others.

    Args:
        board: of the replicas, each of one rank.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._word = 0

    def __call__(self, number: int, mine: Cost | None) -> Sequence[Cost] | None:
        """Costs by replica; None from when on one of them has left.

        One that has left since it said its costs counts: the others may have seen them before. (Of
        one that died they may have, too; who looks later then keeps the shares that it has.)
        """
        number = 1 + (number - 1) % (_ROUNDS - 1)  # 0: none yet
        codes = [_code(seconds) for seconds in mine or (0.0, 0.0)]
        self._word = (((number << _COST_BITS) | codes[0]) << _COST_BITS | codes[1]) << 1
        self._board.write(self._word)
        words: Sequence[int] = []

        def all_there(now: Sequence[int]) -> bool:
            nonlocal words
            words = list(now)
            return all(word == _DEAD or word & _OVER or _number(word) == number for word in words)

        self._board.wait(all_there, "the balance of samples")
        if any(word == _DEAD or _number(word) != number for word in words):
            return None
        costs = [_cost(word) for word in words]
        return costs if all(cost.per_sample > 0.0 for cost in costs) else None

    def start(self) -> None:
        """Be there again."""
        self._word = 0
        self._board.write(0)

    def end(self) -> None:
        """Let nobody wait for this rank."""
        self._board.write(self._word | _OVER)


def _number(word: int) -> int:
    return word >> 2 * _COST_BITS + 1


def _cost(word: int) -> Cost:
    mask = (1 << _COST_BITS) - 1
    return Cost(_seconds(word >> _COST_BITS + 1 & mask), _seconds(word >> 1 & mask))


def _code(seconds: float) -> int:
    if seconds <= 2.0**_LOWEST:
        return 0
    code = round((math.log2(seconds) - _LOWEST) * _OCTAVE)
    return min(max(code, 1), (1 << _COST_BITS) - 1)


def _seconds(code: int) -> float:
    return 2.0 ** (code / _OCTAVE + _LOWEST) if code else 0.0
