"""A run on a virtual cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from scaledtrain.comm.ambient import under
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.seeding import one_thread
from scaledtrain.sim.cluster import Cluster
from scaledtrain.sim.failures import Outage
from scaledtrain.sim.link import Machines, VirtualLink
from scaledtrain.sim.world import Rank

__all__ = ["Simulation", "simulate"]

T = TypeVar("T")


@dataclass(frozen=True)
class Simulation(Generic[T]):
    """What a simulated run came to."""

    results: list[T | None]
    """By rank, what its program returned; None: it died and did not come back in time."""
    seconds: float
    """Virtual time until the last rank ended."""


def simulate(
    program: Callable[[Link], T],
    cluster: Cluster,
    workers: int,
    *,
    seed: int = 0,
    own_generators: bool = True,
) -> Simulation[T]:
    """Run a program on every rank of a virtual cluster, with real tensors, in virtual time.

    The program is what each process would run, given its link: it makes a `Trainer`, or attaches a
    strategy, with this link (a `Trainer` that is given none takes it), and trains. The same objects
    do on it what they do on real processes; only what computing and communication cost is the
    cluster's. One rank runs at a time, the one whose clock is earliest, of several the lowest; so a
    run is a function of program, cluster and seed, bit for bit, however loaded the host is (on CPUs
    of the same type: another one may round sums differently).

    A rank that ``cluster.failures`` lets die is stopped where it is; one that comes back runs the
    program anew, with ``link.returned``. All ranks are in this process and one thread, which
    computes with one core. So the program has to make model, strategy and Trainer itself, for each
    rank its own; a data set may be shared. Random generators are each rank's own, and begin on all
    of them as they are when this is called.

    Left out: the time that reading data, metrics, an evaluation, the optimizer and the server's own
    arithmetic take; put what matters into ``cluster.compute``. A wait has no timeout: where nobody
    can go on, it is an error at once.

    Args:
        program: called once for each rank.
        cluster: what everything costs.
        workers: how many ranks.
        seed: of all times that are drawn.
        own_generators: give each rank random generators of its own; False saves time for programs
            that draw nothing.

    Returns:
        What the program returned on each rank, and the virtual seconds.

    Raises:
        ConfigError: the cluster has no room for so many workers.
        DeadlockError: ranks wait for each other, and nothing will ever end it.
        Exception: whatever a rank's program raised first, on which rank, the log says.

    Example:
        Four workers, one of them four times slower, and no costs of communication: the three fast
        ones make 8 steps each while the slow one makes 2.

        >>> from functools import partial
        >>> import torch
        >>> from scaledtrain import ParameterServer, Trainer
        >>> from scaledtrain.sim import Cluster, Constant, SlowWorkers, Topology, Wire
        >>> port = Wire(latency_seconds=0.0, gigabits_per_second=float("inf"))
        >>> one_host = Topology(ranks_per_host=4, hosts=1, port=port)
        >>> batches = [(torch.randn(8, 2), torch.randn(8, 1)) for _ in range(16)]
        >>> def program(link):
        ...     trainer = Trainer(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss,
        ...                       partial(torch.optim.SGD, lr=0.1), strategy=ParameterServer(),
        ...                       console=False, link=link)
        ...     return trainer.fit(batches, max_steps=26).step
        >>> run = simulate(program, Cluster(Constant(1.0), one_host, SlowWorkers({3: 4.0})), 4)
        >>> run.results[0], run.seconds  # 3 * 8 + 2 gradients in 8 s; the last steps end after 9
        (26, 9.0)
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; a cluster has at least one")
    machines = Machines(cluster, workers, seed, own_generators)
    results: list[T | None] = [None] * workers

    def start(rank: Rank) -> None:
        def run() -> None:
            link = VirtualLink(machines, rank)
            with under(link):
                results[rank.number] = program(link)
            link.close()

        rank.start(run)

    world = machines.world
    for rank in world.ranks:
        start(rank)
        _Outages(machines, cluster.outages(rank.number, seed), rank.number, start).next()
    with one_thread():
        try:
            world.run()
        finally:
            machines.close()
    return Simulation(results, world.now)


class _Outages:
    """Lets one worker die and come back."""

    def __init__(
        self,
        machines: Machines,
        outages: Iterator[Outage],
        worker: int,
        start: Callable[[Rank], None],
    ) -> None:
        self._machines = machines
        self._outages = outages
        self._worker = worker
        self._start = start

    def next(self) -> None:
        outage = next(self._outages, None)
        if outage is not None:
            self._machines.world.at(outage.dies_at, self._worker, lambda: self._die(outage))

    def _die(self, outage: Outage) -> None:
        world = self._machines.world
        if not world.ranks[self._worker].alive:  # it has ended
            return
        world.ranks[self._worker].kill()
        self._machines.lose(self._worker)
        if outage.returns_at is not None:
            world.at(outage.returns_at, self._worker, self._return)

    def _return(self) -> None:
        machines, world = self._machines, self._machines.world
        if not world.ranks[0].alive:  # nobody is there any more to whom it could return
            return
        machines.attempts[self._worker] += 1
        world.ranks[self._worker] = Rank(world, self._worker)
        self._start(world.ranks[self._worker])
        self.next()
