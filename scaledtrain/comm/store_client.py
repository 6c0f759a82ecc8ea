"""A connection to the job's key-value store for one purpose alone."""

from __future__ import annotations

import socket
from typing import Any

import torch.distributed as dist

__all__ = ["own_client", "reconnected"]

_CONNECT_SECONDS = 2.0


def own_client(store: dist.Store) -> dist.Store:
    """The same store over a connection of its own: whoever waits in another one keeps that."""
    client: dist.Store = store.clone()  # type: ignore[attr-defined]
    return client


def reconnected(store: dist.Store) -> dist.Store | None:
    """The same after a connection was lost; None: nobody answers there any more."""
    origin: Any = store
    while isinstance(origin, dist.PrefixStore):
        origin = origin.underlying_store
    try:
        # First so, since the store's own client would try for as long as it may wait.
        socket.create_connection((origin.host, origin.port), _CONNECT_SECONDS).close()
        return own_client(store)
    except (AttributeError, OSError, RuntimeError, dist.DistError):
        return None
