"""What an admission policy is: the questions in which asynchronous algorithms differ.

Under every policy a worker pulls the parameters, computes a gradient, pushes it and asks to go on.
The policy says which gradients count, how many make an update, and who must wait for whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

__all__ = ["Admission", "ServerView"]


class ServerView(Protocol):
    """What a policy may know of the server."""

    @property
    def version(self) -> int:
        """Updates made."""

    @property
    def members(self) -> AbstractSet[int]:
        """Workers taking part now: not those that died, or that are done."""

    @property
    def clocks(self) -> Sequence[int]:
        """For each worker, the steps it has finished: its pushes, accepted or not, and skips."""

    @property
    def slowest(self) -> int:
        """The least clock among the members; it never falls."""

    @property
    def pulled(self) -> Sequence[int]:
        """For each worker, the version it pulled last; -1 before its first pull."""

    @property
    def pending(self) -> Mapping[int, int]:
        """Who gave how many of the gradients that wait for the next update."""

    @property
    def gathered(self) -> int:
        """How many gradients wait for the next update."""


class Admission:
    """The questions, with the answers of asynchronous SGD; a policy overrides those that differ.

    A policy is a frozen dataclass of a few lines and keeps no state: all it may look at is the
    server's.

    Example:
        Gradients that missed three updates or more are refused, and two make an update:

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class FreshPairs(Admission):
        ...     def accepts(self, worker: int, staleness: int, server: ServerView) -> bool:
        ...         return staleness < 3
        ...     def gradients_per_update(self, n_members: int) -> int:
        ...         return 2
    """

    waits_for_all = False
    """Whether no worker begins a step before all have ended the last one."""

    def accepts(self, worker: int, staleness: int, server: ServerView) -> bool:
        """Whether this gradient is used."""
        return True

    def gradients_per_update(self, n_members: int) -> int:
        """How many gradients make one update, with their mean, among so many workers."""
        return 1

    def completes(self, server: ServerView) -> bool:
        """Whether the gradients that wait make an update now; asked after a push or a departure."""
        return server.gathered >= self.gradients_per_update(len(server.members))

    def releases(self, worker: int, server: ServerView) -> bool:
        """Whether this member may pull and begin its next step now, or must wait for others."""
        return True

    def abandons(self, staleness: int) -> bool:
        """Whether to give up a gradient as soon as it would arrive with this staleness.

        It then pulls again and pushes nothing. A function of the staleness alone, so that a worker
        that sees the server's version can answer it by itself.
        """
        return False
