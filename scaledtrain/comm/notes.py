"""Texts that the ranks of a job leave for each other beside their training."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["Notes"]


class Notes:
    """Named texts in the job's key-value store, over a connection of its own.

    Whoever calls may be kept for as long as the process with the store is stuck, so it is a thread
    of its own that does, and never the one that trains. Once that process has ended, each call
    raises RuntimeError.

    Args:
        store: of these notes alone; None: this rank is alone.
        rank: this one.
        size: how many ranks there are.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int) -> None:
        # Its own client: whoever waits in another one keeps it for that long.
        self._store: dist.Store = (dist.HashStore() if store is None else store).clone()  # type: ignore[attr-defined]
        self.rank = rank
        self.size = size

    def write(self, name: str, text: str) -> None:
        """Replace a text."""
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """The text; None: nobody has written it."""
        return self._store.get(name).decode() if self._store.check([name]) else None

    def first(self, name: str, text: str) -> str:
        """Write a text unless there is one; returns what is there then, on all ranks the same."""
        return self._store.compare_set(name, "", text).decode()
