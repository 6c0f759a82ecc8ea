"""What replicas that train for themselves have in common: parameters that a server keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.comm.protocols import Link, ServeOptions
from scaledtrain.comm.serving.partition import Piece
from scaledtrain.replica import MakeOptimizer, Replica, Updater
from scaledtrain.server import Server

__all__ = ["Centre"]

_BEAT_SECONDS = 1.0


class Centre:
    """One replica's access to parameters on a server, which uses every push at once.

    Args:
        replica: whose parameters it begins with; rank 0's count.
        link: where the server lives.
        make_optimizer: the server's.

    Attributes:
        version: pushes that had been used when this replica last fetched the parameters.
        staleness: of the push before that, None if there was none.
        fastest: the largest speed that a replica told with its last push; 0 if none did.
        stopped: some replica asked for the end of the run.
    """

    def __init__(self, replica: Replica, link: Link, make_optimizer: MakeOptimizer) -> None:
        def make_server(pieces: Sequence[Piece]) -> Server:
            names = [replica.names[piece.tensor] for piece in pieces]

            def make_updater(parameters: Sequence[nn.Parameter]) -> Updater:
                return Updater(zip(names, parameters, strict=True), make_optimizer)

            parts = [piece.of(replica.parameters) for piece in pieces]
            return Server(parts, make_updater, link.group.size)

        self._replica = replica
        self._store = link.serve(replica.parameters, make_server, ServeOptions())
        self._buffer: list[Tensor] = [p.detach().clone() for p in replica.parameters]
        self._timeline = link.timeline
        self._last_beat = self._timeline.now()
        self.version = 0
        self.staleness: int | None = None
        self.fastest = 0.0
        self.stopped = False

    def start(self) -> None:
        """A run begins; nothing limits the number of pushes."""
        self.stopped = False
        self._store.start(None)

    def beat(self) -> None:
        """This replica has made a step: about once in a second the server is told that it lives.

        Else those that are done would give up one whose rounds take longer than the timeout.
        """
        now = self._timeline.now()
        if now - self._last_beat >= _BEAT_SECONDS:
            self._last_beat = now
            self._store.skip()

    def fetch(self) -> list[Tensor]:
        """The server's parameters as they are now; not to be written to, valid until the next."""
        pulled = self._store.pull(self._buffer)
        self.version, self.fastest = pulled.version, pulled.fastest
        self.staleness = pulled.staleness if pulled.staleness >= 0 else None
        self.stopped = self.stopped or pulled.stopped
        return self._buffer

    def push(self, update: Sequence[Tensor], speed: float = 0.0) -> None:
        """Let the server take a gradient that belongs to the parameters last fetched."""
        self._store.push(update, self.version, speed)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the replica has the server's parameters."""
        own: list[Tensor] = list(self._replica.parameters)
        kept, version = [p.detach().clone() for p in own], self.version
        with torch.no_grad():
            torch._foreach_copy_(own, self.fetch())
        self.version = version  # what this replica computes with has not changed
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(own, kept)

    def stop(self) -> None:
        """Ask that the run ends; the others hear of it when they fetch."""
        self._store.stop()

    @torch.no_grad()
    def settle(self) -> bool:
        """Wait until every replica is here; all have the server's parameters then.

        Returns:
            Whether no replica has been lost.
        """
        pulled = self._store.settle(self._buffer)
        self.version = pulled.version
        torch._foreach_copy_(list[Tensor](self._replica.parameters), self._buffer)
        return pulled.complete

    def state_dict(self) -> dict[str, Any]:
        """The version, and on the server's rank the server."""
        return {"version": self.version, "server": self._store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, before any replica makes a step."""
        self.version = state["version"]
        if state["server"]:
            self._store.load_state_dict(state["server"])
