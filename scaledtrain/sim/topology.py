"""Hosts, sites and the links between them: what a network is made of, and where ranks are in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

from scaledtrain.errors import ConfigError

__all__ = ["Algorithm", "Nic", "Placement", "Topology", "Wire"]

Algorithm = Literal["ring", "tree", "auto"]

_BYTES_PER_GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Wire:
    """One direction of a link.

    Args:
        latency_seconds: from the moment a byte is sent until it is at the other side.
        gigabits_per_second: bandwidth, as of networks (10^9 bits); infinite: size costs nothing.
        bytes_per_second: bandwidth, as of memory; instead of the other one.

    Raises:
        ConfigError: a negative latency, a bandwidth that is not positive, none or two of them.

    Example:
        >>> Wire(latency_seconds=0.0, gigabits_per_second=100.0).bandwidth
        12500000000.0
    """

    latency_seconds: float
    gigabits_per_second: float | None = None
    bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.latency_seconds < math.inf:
            raise ConfigError(
                f"latency_seconds of a link is {self.latency_seconds}; it must be >= 0 and finite"
            )
        if (self.gigabits_per_second is None) == (self.bytes_per_second is None):
            raise ConfigError(
                f"a link has gigabits_per_second {self.gigabits_per_second} and bytes_per_second "
                f"{self.bytes_per_second}; give one of them, and only one"
            )
        if not self.bandwidth > 0:
            raise ConfigError(
                f"the bandwidth of a link is {self.bandwidth} bytes/s; it must be positive "
                "(infinite: .inf)"
            )

    @property
    def bandwidth(self) -> float:
        """In bytes per second."""
        if self.bytes_per_second is not None:
            return self.bytes_per_second
        assert self.gigabits_per_second is not None
        return self.gigabits_per_second * _BYTES_PER_GIGABIT

    @cached_property
    def without_latency(self) -> Wire:
        """For the second half of a way whose latency is counted in the first."""
        return replace(self, latency_seconds=0.0)


@dataclass(frozen=True)
class Nic:
    """The network card of a host: all its ranks share it.

    Args:
        egress: what the host sends.
        ingress: what it receives; None: as much, without more latency, so that the latency between
            two hosts is that of ``egress``.
    """

    egress: Wire
    ingress: Wire | None = None

    @property
    def into(self) -> Wire:
        """What the host receives."""
        return self.ingress or self.egress.without_latency


@dataclass(frozen=True)
class Topology:
    """Ranks fill hosts, hosts fill sites, in the order of their numbers.

    Each of n ranks' sites is ``rank * sites // n``: equal parts of consecutive ranks. In each site
    ranks fill hosts one after another, and there are as many hosts as that needs. The number of
    hosts counts through all sites.

    Args:
        ranks_per_host: that a host has room for.
        port: of each rank to the others of its host, one direction: NVLink, or copying through
            shared memory. A message takes the sender's way out and the receiver's way in, with the
            latency once. Needed if a host has several ranks.
        nic: of every host. Needed unless there is one host.
        nics: host -> its own network card, instead of ``nic``.
        sites: parts of the network whose ways to the others are shared.
        uplink: of each site to the others, each direction; it is oversubscribed if its bandwidth is
            less than that of the site's hosts together. A message between sites takes both sites'
            uplinks, with the latency once, beside that of the network cards. Needed if there are
            several sites.
        hosts: that there are, all sites together; None: as many as the ranks need.
        algorithm: of collectives; ``"auto"``: the cheaper one for each.

    Raises:
        ConfigError: a number below 1, hosts that do not divide by the sites, or a link that is
            needed and missing.

    Example:
        >>> wire = Wire(latency_seconds=1e-5, gigabits_per_second=100.0)
        >>> placement = Topology(nic=Nic(wire), sites=2, uplink=wire).placement(n_ranks=4)
        >>> [placement.of(rank) for rank in range(4)]  # (host, site)
        [(0, 0), (1, 0), (2, 1), (3, 1)]
    """

    ranks_per_host: int = 1
    port: Wire | None = None
    nic: Nic | None = None
    nics: Mapping[int, Nic] = field(default_factory=dict)
    sites: int = 1
    uplink: Wire | None = None
    hosts: int | None = None
    algorithm: Algorithm = "auto"

    def __post_init__(self) -> None:
        counts = {"ranks_per_host": self.ranks_per_host, "sites": self.sites, "hosts": self.hosts}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"{name} of a topology is {count}; it must be >= 1")
        if self.hosts is not None and self.hosts % self.sites:
            raise ConfigError(
                f"{self.hosts} hosts cannot be shared equally among {self.sites} sites; take "
                f"{math.ceil(self.hosts / self.sites) * self.sites} hosts, or None for as many as "
                "the ranks need"
            )
        needed = {
            "port": (self.ranks_per_host > 1, self.port, "a host has several ranks"),
            "nic": (self.hosts != 1, self.nic, "there may be several hosts"),
            "uplink": (self.sites > 1, self.uplink, "there are several sites"),
        }
        for name, (is_needed, given, why) in needed.items():
            if is_needed and given is None:
                raise ConfigError(f"the topology has no {name}, but {why}; say what it can do")

    def placement(self, n_ranks: int) -> Placement:
        """Where so many ranks are.

        Raises:
            ConfigError: there is no room for so many.
        """
        if self.hosts is not None and n_ranks > self.hosts * self.ranks_per_host:
            raise ConfigError(
                f"{n_ranks} workers do not fit on {self.hosts} host"
                f"{'s' if self.hosts > 1 else ''} x {self.ranks_per_host} ranks; take at most "
                f"{self.hosts * self.ranks_per_host}, or set hosts of the topology to null for as "
                "many as they need"
            )
        return Placement(n_ranks, self.sites, self.ranks_per_host)


class Placement:
    """Which host and site each rank is on; see `Topology`.

    Args:
        n_ranks: of the job.
        sites: among which they are divided evenly, in their order.
        ranks_per_host: at most.
    """

    def __init__(self, n_ranks: int, sites: int, ranks_per_host: int) -> None:
        self._n_ranks = n_ranks
        self._sites = sites
        self._ranks_per_host = ranks_per_host
        # First rank of each site, rounded up: rank * sites // n_ranks is the site from there on.
        self._first_rank = [-(-site * n_ranks // sites) for site in range(sites + 1)]
        self._first_host = [0]
        for first, end in pairwise(self._first_rank):
            self._first_host.append(self._first_host[-1] - (first - end) // ranks_per_host)

    @property
    def n_hosts(self) -> int:
        """Hosts with at least one rank."""
        return self._first_host[-1]

    def of(self, rank: int) -> tuple[int, int]:
        """The rank's host and site."""
        assert 0 <= rank < self._n_ranks
        site = rank * self._sites // self._n_ranks
        inside = (rank - self._first_rank[site]) // self._ranks_per_host
        return self._first_host[site] + inside, site
