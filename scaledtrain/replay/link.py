"""One rank's world in a replay: its server does what the log says, when the log says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.local import AbsentGroup, Undivided
from scaledtrain.comm.protocols import Board, Group, MakeServer, Peer, Peers, Pulled, ServeOptions
from scaledtrain.comm.serving.encoding import RoundTrip
from scaledtrain.comm.serving.partition import Partition
from scaledtrain.comm.serving.requests import find_fault
from scaledtrain.errors import ConfigError
from scaledtrain.replay.history import Life
from scaledtrain.replay.player import Player, Request, Shards
from scaledtrain.server.operations import Kind
from scaledtrain.sim.group import Collectives, VirtualGroup
from scaledtrain.sim.world import Rank
from scaledtrain.timeline import Timeline

__all__ = ["ReplayLink", "ReplayStore", "StandingClock"]

_ANCIENT = 2**40  # versions: older than any gradient is


class StandingClock:
    """A clock on which nothing takes time, so that time decides nothing."""

    def now(self) -> float:
        """0."""
        return 0.0

    def sleep_until(self, moment: float, abandon: Callable[[], bool] | None = None) -> bool:
        """Return at once."""
        return True


class ReplayStore:
    """The store of one worker.

    Args:
        player: of the log.
        life: what this process did.
        worker: whose store it is.
        like: the parameters.
        partition: which shard holds what.
        options: as the strategy gave them.
    """

    bytes_sent = 0

    def __init__(
        self,
        player: Player,
        life: Life,
        worker: int,
        like: Sequence[Tensor],
        partition: Partition,
        options: ServeOptions,
    ) -> None:
        self._player = player
        self._life = life
        self._worker = worker
        self._like = list(like)
        self._overlap = options.overlap
        self._compressed: RoundTrip | None = None
        if options.compression is not None:
            self._compressed = RoundTrip(options.compression, partition, like, options.shards)
        self._ahead: Request | None = None
        self._pulled = 0

    def start(self, last_version: int | None) -> None:
        """Nothing: the log has the limit, and the order."""

    def push(self, update: Sequence[Tensor], version: int, speed: float = 0.0) -> None:
        """Return when the log has this push, and the server has used it."""
        if find_fault(self._worker, update, self._like) is not None:
            return  # the log has the rejection
        if self._compressed is not None:
            _, update = self._compressed.make(update)
        self._done(Request(Kind.PUSH, version, update))

    def skip(self) -> None:
        """Nothing: the log has it."""

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Return when the log has this pull; ``stopped``, if the worker then ended."""
        if not self._overlap:
            pulled = self._done(Request(Kind.PULL, tensors=into))
        else:
            pulled = self._take_ahead(self._ahead or self._ask_ahead(), into)
        stopped = self._life.ends() or pulled.stopped
        if self._overlap and not stopped:
            self._ahead = self._ask_ahead()
        self._pulled = pulled.version
        return Pulled(pulled.version, -1, pulled.learning_rate, stopped)

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Return when the log has it that the worker took the final parameters."""
        if self._ahead is not None:
            self._take_ahead(self._ahead, into)
        elif self._life.expects(Kind.READ) == "other":  # it was told to end by one more pull
            self._done(Request(Kind.PULL, tensors=into))
        return self._done(Request(Kind.READ, tensors=into))

    def version(self) -> int:
        """One that makes a worker abandon its work where it did so, and nowhere else."""
        return self._pulled + (_ANCIENT if self._life.abandons else 0)

    def stop(self) -> None:
        """Nothing: the log has who ended when."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is saved in a replay."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was saved."""

    def close(self) -> None:
        """Nothing to do."""

    def _done(self, request: Request) -> Pulled:
        self._player.wait(self._player.ask(self._life, request))
        assert request.pulled is not None
        return request.pulled

    def _ask_ahead(self) -> Request:
        room = [torch.empty_like(t) for t in self._like]
        return self._player.ask(self._life, Request(Kind.PULL, tensors=room))

    @torch.no_grad()
    def _take_ahead(self, ahead: Request, into: Sequence[Tensor]) -> Pulled:
        self._player.wait(ahead)
        self._ahead = None
        torch._foreach_copy_(list(into), list(ahead.tensors))
        assert ahead.pulled is not None
        return ahead.pulled


class ReplayLink(Undivided):
    """A `Link` of a replay.

    Args:
        player: of the log.
        life: what this process did.
        me: its rank.
        collectives: of all ranks.
    """

    transport = "event log"
    device = torch.device("cpu")
    bytes_sent = 0

    def __init__(self, player: Player, life: Life, me: Rank, collectives: Collectives) -> None:
        self._player = player
        self._life = life
        self._me = me
        self.clock = StandingClock()
        self.timeline = Timeline(clock=self.clock)
        self.event_log: Path | None = None
        self.group: Group = (
            AbsentGroup(me.number, collectives.size)
            if self.returned
            else VirtualGroup(collectives, me, self.timeline)
        )

    @property
    def returned(self) -> bool:
        """This process took the place of one that died."""
        return self._life.attempt > 0

    def pace(self, seed: int) -> None:
        """None: no time passes."""

    def serve(
        self, like: Sequence[Tensor], make_server: MakeServer, options: ServeOptions
    ) -> ReplayStore:
        """Make the server's shards, on rank 0, and give this worker its store."""
        partition = Partition(like, options.shards, options.cut)
        if self._me.number == 0:
            servers = [make_server(pieces) for pieces in partition.pieces]
            self._player.serve(Shards(servers, partition, like))
        return ReplayStore(self._player, self._life, self._me.number, like, partition, options)

    def share(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Raise ConfigError."""
        raise self._error()

    def board(self) -> Board:
        """Raise ConfigError."""
        raise self._error()

    def meet(self, like: Sequence[Tensor], peer: Peer, answers: bool) -> Peers:
        """Raise ConfigError."""
        raise self._error()

    def _error(self) -> ConfigError:
        return ConfigError(
            "the strategy's ranks talk to each other without a server, in an order that no event "
            "log has; only runs with a server can be replayed"
        )
