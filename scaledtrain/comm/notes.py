"""Texts that the ranks of a job leave for each other beside their training."""

from __future__ import annotations

import torch.distributed as dist

from scaledtrain.comm.store_client import own_client, reconnected

__all__ = ["Notes"]


class Notes:
    """Named texts in the job's key-value store, over a connection of its own.

    Whoever calls may be kept for as long as the process with the store is stuck, so it is a thread
    of its own that does, and never the one that trains. Once the connection is lost each call
    raises RuntimeError, until `connect_again` has made another one.

    Args:
        store: of these notes alone; None: this rank is alone.
        rank: this one.
        size: how many ranks there are.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int) -> None:
        self._origin: dist.Store = dist.HashStore() if store is None else store
        self._store = own_client(self._origin)
        self.rank = rank
        self.size = size

    def connect_again(self) -> bool:
        """After a connection was lost; False: the process with the store has ended."""
        store = reconnected(self._origin)
        if store is not None:
            self._store = store
        return store is not None

    def write(self, name: str, text: str) -> None:
        """Replace a text."""
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """The text; None: nobody has written it."""
        return self._store.get(name).decode() if self._store.check([name]) else None

    def first(self, name: str, text: str) -> str:
        """Write a text unless there is one; returns what is there then, on all ranks the same."""
        return self._store.compare_set(name, "", text).decode()
