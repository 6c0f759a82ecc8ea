"""A virtual cluster as one value: what its workers are like, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from scaledtrain.sim.compute import ComputeModel, StepPace
from scaledtrain.sim.failures import Failures, Outage
from scaledtrain.sim.network import Network
from scaledtrain.sim.speeds import Speeds
from scaledtrain.sim.topology import Topology

__all__ = ["Cluster"]


@dataclass(frozen=True)
class Cluster:
    """What a run would meet: computing, persistent speeds, the network, and failures.

    It does not say how many workers there are, unless its topology has a number of hosts. Where a
    server lives is up to the strategy, as on real processes: its shards are on the first ranks.

    Args:
        compute: what the steps of a worker take.
        topology: hosts, sites and links.
        speeds: how many times longer each worker takes, all the time; None: all alike.
        failures: which workers die when; None: nobody.

    Example:
        >>> from scaledtrain.sim.compute import Constant
        >>> from scaledtrain.sim.speeds import SlowWorkers
        >>> from scaledtrain.sim.topology import Nic, Wire
        >>> card = Nic(Wire(latency_seconds=1e-5, gigabits_per_second=100.0))
        >>> cluster = Cluster(Constant(0.1), Topology(nic=card), speeds=SlowWorkers({3: 4.0}))
        >>> pace = cluster.pace(worker=3, seed=0)
        >>> pace.begin_step()
        >>> pace.seconds(elapsed=0.0, share=1.0)
        0.4
        >>> len(cluster.network(n_workers=4).path(0, 3)), list(cluster.outages(3, seed=0))
        (2, [])
    """

    compute: ComputeModel
    topology: Topology
    speeds: Speeds | None = None
    failures: Failures | None = None

    def pace(self, worker: int, seed: int) -> StepPace:
        """What computing takes this worker; the draws follow from worker and seed."""
        factor = 1.0 if self.speeds is None else self.speeds.factor(worker, seed)
        return self.compute.pace(worker, seed, factor)

    def network(self, n_workers: int) -> Network:
        """The links between so many workers, with nothing under way.

        Raises:
            ConfigError: the topology has no room for them.
        """
        return Network(self.topology, n_workers)

    def outages(self, worker: int, seed: int) -> Iterator[Outage]:
        """When this worker dies and returns; see `Failures.events`."""
        return iter(()) if self.failures is None else self.failures.events(worker, seed)
