"""The admission policies: from fully asynchronous to synchronous, and what lies between."""

from __future__ import annotations

from dataclasses import dataclass

from scaledtrain.errors import ConfigError
from scaledtrain.server.admission import Admission, ServerView

__all__ = [
    "Asynchronous",
    "BackupWorkers",
    "Rennala",
    "Ringmaster",
    "SoftSync",
    "StaleSynchronous",
    "Synchronous",
]


@dataclass(frozen=True)
class Asynchronous(Admission):
    r"""Asynchronous SGD: every gradient is an update at once, and nobody waits.

    x_{k+1} = x_k - eta g(x_{k - tau}). Among n workers the mean staleness tau is n - 1, whatever
    their speeds: between two pushes of one worker lie all pushes of the others.

    Sent: one gradient and one set of parameters per step and worker. Waits: never. A crashed worker
    loses the gradient it was computing and delays nobody.

    References:
        Dean et al. 2012, Large Scale Distributed Deep Networks (Downpour SGD).
    """


@dataclass(frozen=True)
class Synchronous(Admission):
    r"""Synchronous SGD on a server: one gradient of every worker makes one update.

    x_{k+1} = x_k - eta (1/n) sum_i g_i(x_k). Nothing is ever stale. A gradient that the server
    found unusable does not count as that worker's, which goes on and tries again with its next
    batch.

    Sent: one gradient and one set of parameters per step and worker. Waits: from its push to the
    update. A crashed worker loses its gradient; the others wait until it is removed, and then make
    the update without it.

    References:
        Chen et al. 2016, Revisiting Distributed Synchronous SGD (arXiv 1604.00981), without
        backups.
    """

    waits_for_all = True

    def accepts(self, worker: int, staleness: int, server: ServerView) -> bool:
        """Of the current version, once per worker."""
        return staleness == 0 and worker not in server.pending

    def gradients_per_update(self, n_members: int) -> int:
        """One per worker."""
        return n_members

    def completes(self, server: ServerView) -> bool:
        """When every worker that still takes part has given its gradient.

        Not a count: a worker that died after its push must not stand in for one that computes.
        """
        return server.pending.keys() >= server.members

    def releases(self, worker: int, server: ServerView) -> bool:
        """After the update that its gradient went into."""
        return worker not in server.pending


@dataclass(frozen=True)
class BackupWorkers(Admission):
    r"""Synchronous SGD with backup workers: the first k gradients make the update.

    x_{k+1} = x_k - eta (1/k) sum of the first k gradients at x_k; those that come later are
    dropped. With n workers, n - k are backups. With T_(k:n) the time of the k-th fastest, the best
    k maximises k / E[T_(k:n)].

    Sent: one gradient and one set of parameters per step and worker, the dropped ones too. Waits:
    from an accepted push to the update; a worker that came late goes on at once. A crashed worker
    loses its gradient and, like any straggler, delays nobody while k others remain; once it is
    removed and fewer than k remain, all of these make an update.

    Args:
        k: gradients in an update, >= 1; with fewer workers than that, one of each.

    References:
        Chen et al. 2016, Revisiting Distributed Synchronous SGD (arXiv 1604.00981).
    """

    k: int

    def __post_init__(self) -> None:
        _at_least(1, "BackupWorkers", "k", self.k, "the gradients that make an update")

    def accepts(self, worker: int, staleness: int, server: ServerView) -> bool:
        """Of the current version, once per worker."""
        return staleness == 0 and worker not in server.pending

    def gradients_per_update(self, n_members: int) -> int:
        """k, as long as there are so many workers."""
        return min(self.k, n_members)

    def releases(self, worker: int, server: ServerView) -> bool:
        """After the update that its gradient went into."""
        return worker not in server.pending


@dataclass(frozen=True)
class SoftSync(Admission):
    r"""Softsync: every c gradients, of whatever version and whomever, make one update.

    x_{k+1} = x_k - eta (1/c) sum_{j=1..c} g_j(x_{k - tau_j}). Among n workers the mean staleness is
    about n/c; the paper's "s-softsync" is c = n/s.

    Sent: one gradient and one set of parameters per step and worker. Waits: never. A crashed worker
    loses the gradient it was computing; those it had given are used.

    Args:
        c: gradients in an update, >= 1. `SoftSync(1)` is `Asynchronous`.

    References:
        Zhang et al. 2016, Staleness-aware Async-SGD for Distributed Deep Learning (arXiv
        1511.05950).
    """

    c: int

    def __post_init__(self) -> None:
        _at_least(1, "SoftSync", "c", self.c, "the gradients that make an update")

    def gradients_per_update(self, n_members: int) -> int:
        """Always c."""
        return self.c


@dataclass(frozen=True)
class StaleSynchronous(Admission):
    r"""Stale synchronous parallel: no worker runs more than a bound ahead of the slowest.

    Every gradient is an update at once. A worker at clock c, the steps it has finished, may begin
    its next one iff c - min_j c_j <= staleness_bound, j over the workers taking part. This lead is
    measured when the worker asks to go on, that is before it pulls: while a worker computes its
    lead is at most the bound, and between its push and its next pull, while it waits, at most one
    more. What it pulls has in it the first c - staleness_bound steps of every worker.

    The bound is on clocks, not on versions: n workers within it may push a gradient with a
    staleness of up to (n - 1)(2 bound + 1). Bound 0 has the pace of synchronous SGD, not its
    arithmetic: each gradient is its own update; for one update by all see `Synchronous`.

    Sent: one gradient and one set of parameters per step and worker. Waits: at the bound. A crashed
    worker loses the gradient it was computing; the others run into the bound, and go on as soon as
    it is removed. One that comes back begins level with the slowest.

    Args:
        staleness_bound: steps that a worker may be ahead when it begins one, >= 0.

    References:
        Ho et al. 2013, More Effective Distributed ML via a Stale Synchronous Parallel Parameter
        Server.
    """

    staleness_bound: int

    def __post_init__(self) -> None:
        what = "the steps that a worker may be ahead"
        _at_least(0, "StaleSynchronous", "staleness_bound", self.staleness_bound, what)

    def releases(self, worker: int, server: ServerView) -> bool:
        """Within the bound."""
        return server.clocks[worker] - server.slowest <= self.staleness_bound


@dataclass(frozen=True)
class Rennala(Admission):
    r"""Rennala SGD: a batch of gradients of one version, from whoever is fast, makes the update.

    x_{k+1} = x_k - eta (1/S) sum of the first S gradients at x_k. Synchronous mathematics without
    waiting: a fast worker gives many of them, and work begun at an older version is dropped when it
    arrives. The time to a given quality is optimal, up to a constant, for fixed unequal speeds.

    Sent: one gradient and one set of parameters per step and worker, the dropped ones too. Waits:
    never. A crashed worker loses the gradient it was computing; those it had given are used.

    Args:
        batch: gradients in an update (S), >= 1.

    References:
        Tyurin, Richtarik 2023, Optimal Time Complexities of Parallel Stochastic Optimization
        Methods Under a Fixed Computation Model (arXiv 2305.12387).
    """

    batch: int

    def __post_init__(self) -> None:
        _at_least(1, "Rennala", "batch", self.batch, "the gradients that make an update")

    def accepts(self, worker: int, staleness: int, server: ServerView) -> bool:
        """Of the current version."""
        return staleness == 0

    def gradients_per_update(self, n_members: int) -> int:
        """The batch."""
        return self.batch


@dataclass(frozen=True)
class Ringmaster(Admission):
    r"""Ringmaster ASGD: asynchronous SGD that has no use for gradients older than a threshold.

    x_{k+1} = x_k - eta g(x_{k - tau}) if tau < R; otherwise the gradient is ignored. With ``stop``
    a worker need not finish one that is sure to be ignored: as soon as R updates have been made
    since its pull it gives up, pulls, and begins anew. With R of the order of the
    noise-to-precision ratio sigma^2 / eps (at least 1) the time to a given quality is optimal
    whatever the workers' speeds are.

    Sent: one gradient and one set of parameters per step and worker; with ``stop`` fewer gradients,
    and a notice to who should give up (``Server.to_abandon``). Waits: never. A crashed worker loses
    the gradient it was computing and delays nobody.

    Args:
        delay_threshold: the least staleness that is refused (R), >= 1.
        stop: give up work that has become too old, instead of ignoring its result.

    References:
        Maranjyan, Tyurin, Richtarik 2025, Ringmaster ASGD: The First Asynchronous SGD with Optimal
        Time Complexity (arXiv 2501.16168); without ``stop`` its algorithm 4, with it algorithm 5.
    """

    delay_threshold: int
    stop: bool = False

    def __post_init__(self) -> None:
        what = "the least staleness that is refused"
        _at_least(1, "Ringmaster", "delay_threshold", self.delay_threshold, what)

    def accepts(self, worker: int, staleness: int, server: ServerView) -> bool:
        """Below the threshold."""
        return staleness < self.delay_threshold

    def abandons(self, staleness: int) -> bool:
        """At the threshold, if it is to stop."""
        return self.stop and staleness >= self.delay_threshold


def _at_least(least: int, policy: str, option: str, value: int, what: str) -> None:
    if value < least:
        raise ConfigError(f"{policy}: {option} is {value}; it is {what}, at least {least}")
