"""What each rank keeps for its strategy: the strategy itself runs, on fake tensors, and is watched.

So nobody has to say how much a strategy keeps, a new one of a user's neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from scaledtrain.comm.ambient import ambient_link
from scaledtrain.comm.local import Undivided
from scaledtrain.comm.protocols import Link, MakeServer, Peer, Peers, ServeOptions, Store
from scaledtrain.precision import Precision
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.replica import MakeOptimizer, Replica, Updater
from scaledtrain.server import Server
from scaledtrain.sim import Cluster, Constant, Topology, Wire, simulate
from scaledtrain.strategies.strategy import Strategy

__all__ = ["RankKept", "bytes_kept_by_ranks"]

_COMPUTING_SECONDS = 1.0  # virtual ones; messages take next to none


@dataclass(frozen=True)
class RankKept:
    """What a rank keeps beside model and gradients while it computes a gradient."""

    optimizer: int
    """State of the optimizer of the replica's parameters, or of a server's copy of them."""
    strategy: int
    """Copies, averages, outer optimizers, what is under way; below 0 where ranks share the memory
    of their parameters, which then counts on one of them."""
    updates: bool
    """It has an optimizer of the model."""
    serves: bool
    """It has a server, which may make an update while the rank computes."""


class _WatchedReplica(Replica):
    """A replica that knows what the optimizers that it makes keep."""

    live: Callable[[], int]
    """Bytes that are alive on its rank; set before it is asked for an optimizer."""
    optimizer_bytes = 0
    makes_updates = False

    def updater(
        self,
        parameters: Sequence[nn.Parameter] | None = None,
        names: Sequence[str] | None = None,
    ) -> Updater:
        """As that of any replica."""
        self.makes_updates = True
        before = self.live()
        made = super().updater(parameters, names)
        self.optimizer_bytes += self.live() - before
        step = made.step

        def counting_step(scale: float = 1.0) -> None:
            before = self.live()
            step(scale)
            self.optimizer_bytes += self.live() - before

        made.step = counting_step  # type: ignore[method-assign]
        return made


def _constant_schedule(optimizer: Optimizer) -> LRScheduler:
    """What a strategy that waits for the learning rate to fall asks for; it takes no memory."""
    return LambdaLR(optimizer, lambda _: 1.0)


def bytes_kept_by_ranks(
    make_model: Callable[[], nn.Module],
    optimizer: MakeOptimizer,
    precision: Precision,
    make_strategy: Callable[[], Strategy],
    workers: int,
) -> list[RankKept]:
    """Let the ranks of a simulated cluster make some steps, gradients of no value, and count.

    Counted is what they have while they compute, when no message is under way but those that the
    strategy lets be under way then. Not counted is what a transport keeps: buffers of shared
    memory, gloo, NCCL.

    Args:
        make_model: called once for each rank; inside of `Fakes`, as all of it.
        optimizer: a factory.
        precision: the model's.
        make_strategy: called once for each rank.
        workers: ranks, on one host.
    """
    rounding = partial(precision.rounding, 0)
    counted = _ByRank()
    found: list[RankKept | None] = [None] * workers

    def program(link: Link) -> None:
        watched, on_rank = _WatchedLink(link, counted), counted.of[link.group.rank]
        replica = _WatchedReplica(make_model(), optimizer, _constant_schedule, rounding)
        replica.live = lambda: on_rank.live
        precision.scaler(replica)  # says in which format gradients are
        own = on_rank.live
        strategy = make_strategy()
        strategy.attach(replica, cast(Link, watched))
        strategy.start(None)
        # As far as behind the second meeting of replicas that seldom meet; what most of their steps
        # change makes no difference.
        period = getattr(strategy, "sync_every", 1)
        most = 0
        for step in range(2 * period + 3):
            if not strategy.before_forward():
                break
            link.clock.sleep_until(link.timeline.now() + _COMPUTING_SECONDS / 2)
            most = max(most, on_rank.live)
            link.clock.sleep_until(link.timeline.now() + _COMPUTING_SECONDS / 2)
            if step % period < 2:
                replica.gradients()
                strategy.reduce_gradients()
                strategy.apply_gradients()
            strategy.after_step()
            replica.zero_grad()
        state = replica.optimizer_bytes
        found[link.group.rank] = RankKept(
            state, most - own - state, replica.makes_updates, watched.serves
        )
        strategy.settle()

    host = Topology(
        hosts=1, ranks_per_host=workers, port=Wire(0.0, gigabits_per_second=float("inf"))
    )
    with counted:
        simulate(
            program, Cluster(Constant(_COMPUTING_SECONDS), host), workers, own_generators=False
        )
    return [kept for kept in found if kept is not None]


class _ByRank(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes by the rank in whose name they were made.

    Attributes:
        of: by rank.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: defaultdict[int, LiveBytes] = defaultdict(LiveBytes)
        self._named: list[int] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        link = ambient_link()
        rank = -1 if link is None else link.group.rank
        rank = self._named[-1] if self._named else rank
        return self.of[rank].__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def in_the_name_of(self, rank: int) -> Any:
        """Inside, whoever runs, it is for this rank."""
        self._named.append(rank)
        try:
            yield
        finally:
            self._named.pop()


class _WatchedLink(Undivided):
    """A link of whose server and peers it is known on which rank they are, whoever calls them.

    Args:
        link: to the other ranks; all else is its.
        counted: is told.

    Attributes:
        serves: a server is on this rank.
    """

    def __init__(self, link: Link, counted: _ByRank) -> None:
        self._link = link
        self._counted = counted
        self.serves = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def serve(
        self, like: Sequence[Tensor], make_server: MakeServer, options: ServeOptions
    ) -> Store:
        """As the link does."""

        def make(pieces: Sequence[Any]) -> Server:
            self.serves = True
            server = make_server(pieces)
            for name in ("pull", "push", "remove"):
                setattr(server, name, self._here(getattr(server, name)))
            return server

        return self._link.serve(like, make, options)

    def meet(self, like: Sequence[Tensor], peer: Peer, answers: bool) -> Peers:
        """As the link does."""
        peer.receive = self._here(peer.receive)  # type: ignore[method-assign]
        return self._link.meet(like, peer, answers)

    def _here(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self._counted.in_the_name_of(self._link.group.rank):
                return call(*args, **kwargs)

        return called
