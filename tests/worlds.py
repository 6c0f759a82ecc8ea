"""Several ranks in one process: a thread each, or all driven by hand from the test's own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaledtrain import Replica, Strategy
from scaledtrain.clock import HostClock
from scaledtrain.comm.local import Done, LocalGroup, Undivided
from scaledtrain.comm.notes import Notes
from scaledtrain.comm.protocols import Handle, MakeServer, Peer, ReduceOp, ServeOptions
from scaledtrain.comm.serving.host import ServerHost
from scaledtrain.comm.serving.partition import Piece
from scaledtrain.comm.serving.server_store import DirectStore
from scaledtrain.errors import PeerLostError, WaitTimeoutError
from scaledtrain.timeline import Timeline

TIMEOUT_SECONDS = 20.0


class World:
    """`size` ranks that share what a real job would send between processes.

    Args:
        size: number of ranks.
        late: a message is received when its sender waits for it, not when it is sent.
    """

    def __init__(self, size: int, late: bool = False) -> None:
        self.size = size
        self.late = late
        self.dead: set[int] = set()
        self.store = dist.HashStore()
        self.links = [WorldLink(self, rank) for rank in range(size)]
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        self._slots: list[Any] = [None] * size

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(link, *args)` in a thread for each rank; returns the values, by rank."""
        values: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def call(rank: int) -> None:
            try:
                values[rank] = function(self.links[rank], *args)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return values

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        self._slots[rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values


class WorldLink(Undivided):
    """One rank's link; also its group."""

    transport = "threads"
    overlaps = False
    device = torch.device("cpu")

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.size = world.size
        self.group = self
        self.clock = HostClock()
        self.timeline = Timeline()
        self.event_log = None
        self.returned = False
        self.bytes_sent = 0

    def pace(self, seed: int) -> None:
        pass

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        start = self.timeline.now()
        mine = [t.detach().clone() for t in tensors]
        all_of = self.world.exchange(self.rank, (mine, weight))
        total = sum(w for _, w in all_of)
        for i, t in enumerate(tensors):
            pieces = torch.stack([values[i] for values, _ in all_of])
            if op == "max":
                result = pieces.amax(0)
            elif op == "sum":
                result = pieces.sum(0)
            else:
                weights = torch.tensor([w / total for _, w in all_of], dtype=pieces.dtype)
                result = torch.tensordot(weights, pieces, dims=1)
            t.detach().copy_(result)
        self.timeline.add("communication", start)
        return Done()

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        mine = [t.detach().clone() for t in tensors]
        for t, value in zip(tensors, self.world.exchange(self.rank, mine)[src], strict=True):
            t.detach().copy_(value)

    def serve(
        self, like: Sequence[Tensor], make_server: MakeServer, options: ServeOptions
    ) -> DirectStore:
        host = None
        if self.rank == 0:
            host = ServerHost(make_server([Piece(i) for i in range(len(like))]), TIMEOUT_SECONDS)
        host = self.world.exchange(self.rank, host)[0]
        return DirectStore(cast(ServerHost, host), self.rank, like, self.timeline, LocalGroup())

    def share(self, like: Sequence[Tensor]) -> list[Tensor]:
        mine = [torch.zeros_like(t, requires_grad=False) for t in like]
        return list(self.world.exchange(self.rank, mine)[0])

    def board(self) -> WorldBoard:
        words = [0] * self.size
        words, changed = self.world.exchange(self.rank, (words, threading.Condition()))[0]
        return WorldBoard(self.world, self.rank, words, changed)

    def notes(self) -> Notes:
        return Notes(self.world.store, self.rank, self.size)

    def meet(self, like: Sequence[Tensor], peer: Peer, answers: bool) -> WorldPeers:
        peers = self.world.exchange(self.rank, (peer, threading.Lock()))
        return WorldPeers(self.world, self.rank, peers)


class WorldBoard:
    """Words in a list; a dead rank's reads -1."""

    def __init__(
        self, world: World, rank: int, words: list[int], changed: threading.Condition
    ) -> None:
        self._world = world
        self._rank = rank
        self._words = words
        self._changed = changed

    def write(self, word: int) -> None:
        with self._changed:
            self._words[self._rank] = word
            self._changed.notify_all()

    def read(self) -> Sequence[int]:
        return [-1 if r in self._world.dead else w for r, w in enumerate(self._words)]

    def wait(self, until: Callable[[Sequence[int]], bool], doing: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: until(self.read()), TIMEOUT_SECONDS):
                raise WaitTimeoutError(f"{doing}: {self.read()}")


class WorldPeers:
    """A message is a call of the other peer, under that rank's lock."""

    def __init__(
        self, world: World, rank: int, peers: Sequence[tuple[Peer, threading.Lock]]
    ) -> None:
        self._world = world
        self._rank = rank
        self._peers = peers

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._peers[self._rank][1]:
            yield

    def call(self, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> Handle:
        assert rank != self._rank
        assert not any(t.requires_grad for t in tensors)
        message = Message(self, rank, tensors, into)
        if not self._world.late:
            message.deliver()
        return message

    def deliver(self, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        if rank in self._world.dead:
            raise PeerLostError(f"rank {rank} died")
        peer, lock = self._peers[rank]
        with lock:
            answer = peer.receive(self._rank, [t.clone() for t in tensors])
            for t, value in zip(into, answer, strict=True):
                t.copy_(value)


class Message:
    """One call; delivered once."""

    def __init__(
        self, peers: WorldPeers, rank: int, tensors: Sequence[Tensor], into: Sequence[Tensor]
    ) -> None:
        self._peers = peers
        self._arguments = (rank, tensors, into)
        self._delivered = False

    def deliver(self) -> None:
        if not self._delivered:
            self._delivered = True
            self._peers.deliver(*self._arguments)

    def wait(self) -> None:
        self.deliver()


class Value(nn.Module):
    """One number w; the loss of x is (w - x)^2 / 2, its gradient w - x."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.w - x) ** 2).sum() / 2


class Worker:
    """A strategy over one `Value`, which begins at 0, stepped by hand with plain SGD."""

    def __init__(self, link: Any, strategy: Strategy, lr: float = 0.5) -> None:
        self.model = Value(0.0)
        self.replica = Replica(self.model, partial(torch.optim.SGD, lr=lr))
        self.strategy = strategy
        strategy.attach(self.replica, link)
        strategy.start(None)

    def step(self, x: float) -> bool:
        """One step towards x; False if the strategy says that the run is over."""
        if not self.compute(x):
            return False
        self.update()
        return True

    def compute(self, x: float) -> bool:
        """The first half of a step: the gradient."""
        if not self.strategy.before_forward():
            return False
        self.replica.zero_grad()
        self.model(torch.tensor([x], dtype=torch.float64)).backward()
        return True

    def update(self) -> None:
        """The second half."""
        self.strategy.reduce_gradients()
        self.strategy.apply_gradients()
        self.strategy.after_step()

    @property
    def w(self) -> float:
        """Of the replica."""
        return self.model.w.item()

    @property
    def agreed(self) -> float:
        """Of what is evaluated."""
        with self.strategy.consensus():
            return self.model.w.item()
