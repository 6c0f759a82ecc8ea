"""Collectives in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from scaledtrain.comm.flat import bytes_of
from scaledtrain.comm.protocols import ReduceOp
from scaledtrain.comm.reduction import reduce_in_rank_order
from scaledtrain.errors import ClusterError, PeerLostError
from scaledtrain.sim.network import Network
from scaledtrain.sim.world import Rank, World
from scaledtrain.timeline import Timeline

__all__ = ["Collectives", "VirtualGroup"]

_MAX_NAMED = 8
_FORWARD = 1.0 / 3.0  # of the time of a microbatch; the rest is backward

_Kind = Literal["all_reduce", "broadcast", "all_gather"]


class Collectives:
    """What the groups of all ranks have in common: the collectives that are under way.

    One takes place when its last rank has come; then it costs what the network says, after the one
    before it.

    Args:
        world: of the ranks.
        network: tells the costs.
    """

    def __init__(self, world: World, network: Network) -> None:
        self.world = world
        self.size = len(world.ranks)
        self._network = network
        self._open: dict[int, Collective] = {}
        self._free_at = 0.0
        self.lost: str | None = None

    def number(self, index: int, kind: _Kind, about: tuple[Any, ...]) -> Collective:
        """The collective that every rank calls as its ``index``-th."""
        collective = self._open.get(index)
        if collective is None:
            collective = self._open[index] = Collective(self, index, kind, about)
        elif (collective.kind, collective.about) != (kind, about):
            raise ClusterError(
                f"the ranks called different collectives at once: {collective.kind} with "
                f"{collective.about}, and {kind} with {about}. Every rank must make the same calls "
                "in the same order, with tensors of the same shapes and dtypes"
            )
        return collective

    def lose(self, rank: int) -> None:
        """A rank died: no collective can take place any more."""
        self.lost = self.lost or (
            f"rank {rank} died at {self.world.now:g} virtual seconds; a strategy that needs all "
            "ranks in every step ends with it"
        )
        for collective in self._open.values():
            collective.wake()

    def complete(self, collective: Collective) -> float:
        """All have come: do it, and tell when it is done."""
        del self._open[collective.index]
        n_bytes = max(bytes_of(tensors) for tensors in collective.tensors)
        cost = {
            "all_reduce": self._network.all_reduce_seconds,
            "broadcast": self._network.broadcast_seconds,
            "all_gather": self._network.all_gather_seconds,
        }[collective.kind](n_bytes, range(self.size))
        self._free_at = max(self.world.now, self._free_at) + cost
        return self._free_at


class Collective:
    """One call of all ranks."""

    def __init__(
        self, all_of: Collectives, index: int, kind: _Kind, about: tuple[Any, ...]
    ) -> None:
        self.kind = kind
        self.about = about
        self.index = index
        self.tensors: list[list[Tensor]] = [[] for _ in range(all_of.size)]
        self.last_came_at = 0.0
        self.done_at: float | None = None
        self._all_of = all_of
        self._weights = [1.0] * all_of.size
        self._missing = set(range(all_of.size))
        self._waiting: list[Rank] = []

    def arrive(self, rank: int, tensors: Sequence[Tensor], weight: float) -> None:
        """A rank has come, now."""
        self.tensors[rank] = [t.detach() for t in tensors]
        self._weights[rank] = weight
        self._missing.discard(rank)
        if not self._missing:
            self.last_came_at = self._all_of.world.now
            self._take_place()
            self.done_at = self._all_of.complete(self)
            self.wake(self.done_at)

    @torch.no_grad()
    def _take_place(self) -> None:
        filled = [t for t in self.tensors[0] if not t.is_meta]
        if self.kind == "all_gather" or not filled:
            return
        values = [[t for t in tensors if not t.is_meta] for tensors in self.tensors]
        if self.kind == "broadcast":
            result = values[self.about[0]]
        else:
            result = reduce_in_rank_order(values, self.about[0], self._weights)
        for tensors in values:
            if tensors is not result:
                torch._foreach_copy_(tensors, result)

    def wait(self, rank: Rank) -> None:
        """Return when it is done."""
        while self.done_at is None:
            self._raise_lost()
            self._waiting.append(rank)
            rank.wait(self._doing)
        rank.sleep_until(self.done_at)

    def wake(self, moment: float | None = None) -> None:
        """Let all that wait go on."""
        waiting, self._waiting = self._waiting, []
        for rank in waiting:
            rank.wake(moment)

    def _raise_lost(self) -> None:
        if self._all_of.lost is not None:
            raise PeerLostError(self._all_of.lost)

    def _doing(self) -> str:
        missing = sorted(self._missing)
        named = ", ".join(map(str, missing[:_MAX_NAMED]))
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        return f"in {self.kind} for rank{'s' if len(missing) > 1 else ''} {named}{more}"


class VirtualGroup:
    """One rank's place in the group of all ranks.

    An all-reduce that begins inside a backward pass, which takes no virtual time while the host
    does it, is held until its time is known: of the gradients that were handed over in one pass,
    the first b of B bytes are complete when 1/3 + 2/3 b / B of the microbatch's time has passed.

    Args:
        collectives: of all ranks.
        rank: this one.
        timeline: where waiting and communication are recorded.
    """

    overlaps = True

    def __init__(self, collectives: Collectives, rank: Rank, timeline: Timeline) -> None:
        self.rank = rank.number
        self.size = collectives.size
        self.bytes_sent = 0
        self._collectives = collectives
        self._me = rank
        self._timeline = timeline
        self._calls = 0
        self._held: list[_Begun] = []

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> _Begun:
        """Begin to reduce, in the order of ranks."""
        self.bytes_sent += bytes_of(tensors)
        begun = self._begin("all_reduce", op, tensors, weight)
        self._held.append(begun)
        return begun

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Copy rank ``src``'s values to all."""
        if src == self.rank:
            self.bytes_sent += bytes_of(tensors)
        self.begin_held()
        begun = self._begin("broadcast", src, tensors, 1.0)
        begun.arrive()
        begun.wait()

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every rank's tensors, by rank."""
        self.bytes_sent += bytes_of(tensors)
        self.begin_held()
        copies = [t.detach().clone() for t in tensors]
        begun = self._begin("all_gather", None, copies, 1.0)
        begun.arrive()
        begun.wait()
        gathered = [list(of_rank) for of_rank in begun.collective.tensors]
        gathered[self.rank] = list(tensors)
        return gathered

    def begin_held(self) -> None:
        """What is held begins now."""
        held, self._held = self._held, []
        for begun in held:
            begun.arrive()

    def begin_held_within(self, start: float, end: float) -> None:
        """What is held was begun by a microbatch that is computed from ``start`` to ``end``."""
        held, self._held = self._held, []
        total = sum(begun.n_bytes for begun in held) or 1
        ready = 0
        for begun in held:
            ready += begun.n_bytes
            share = _FORWARD + (1.0 - _FORWARD) * ready / total
            moment = start + share * (end - start)
            self._collectives.world.at(moment, self.rank, begun.arrive)

    def _begin(self, kind: _Kind, how: Any, tensors: Sequence[Tensor], weight: float) -> _Begun:
        about = (how, *((tuple(t.shape), t.dtype) for t in tensors))
        collective = self._collectives.number(self._calls, kind, about)
        self._calls += 1
        return _Begun(self, collective, tensors, weight)

    def finish(self, begun: _Begun) -> None:
        """Wait for one that has begun."""
        self.begin_held()
        start = self._timeline.now()
        collective = begun.collective
        collective.wait(self._me)
        if collective.last_came_at > start:
            start = self._timeline.add("waiting", start, collective.last_came_at)
        self._timeline.add("communication", start)


class _Begun:
    """A collective as one rank has begun it."""

    def __init__(
        self,
        group: VirtualGroup,
        collective: Collective,
        tensors: Sequence[Tensor],
        weight: float,
    ) -> None:
        self.collective = collective
        self.n_bytes = bytes_of(tensors)
        self._arrive: Callable[[], None] | None = lambda: collective.arrive(
            group.rank, tensors, weight
        )
        self._group = group

    def arrive(self) -> None:
        """This rank takes part from now on."""
        arrive, self._arrive = self._arrive, None
        if arrive is not None:
            arrive()

    def wait(self) -> None:
        """Return when the result is in the tensors."""
        self._group.finish(self)
