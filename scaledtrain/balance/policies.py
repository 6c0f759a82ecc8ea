"""Which replica trains on how many samples of a step: the choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from scaledtrain.balance.shares import Cost, apportion, even, quickest, step_seconds
from scaledtrain.errors import ConfigError

__all__ = ["Auto", "Balance", "Even", "Fixed"]


class Balance(Protocol):
    """Shares the samples of a step out among the replicas."""

    @property
    def is_even(self) -> bool:
        """Whether every replica simply takes batches of the loader."""

    @property
    def max_local_batch_size(self) -> int | None:
        """The most samples that a replica's rank computes at once; None: the loader's batch."""

    @property
    def every(self) -> int | None:
        """Steps from one decision to the next; None: there is none after the first."""

    @property
    def measured(self) -> int:
        """Steps before each decision whose times are taken."""

    def first(self, replicas: int, total: int) -> list[int]:
        """Shares to begin with.

        Args:
            replicas: how many there are.
            total: samples of a step of all replicas together.

        Raises:
            ConfigError: they cannot be.
        """

    def next(self, shares: Sequence[int], costs: Sequence[Cost]) -> list[int]:
        """Shares from now on, with the same sum.

        Args:
            shares: until now.
            costs: of the replicas, as measured with them.
        """


class _Settled:
    """What does not change."""

    every = None
    measured = 0

    def next(self, shares: Sequence[int], costs: Sequence[Cost]) -> list[int]:
        """The same."""
        return list(shares)


@dataclass(frozen=True)
class Even(_Settled):
    """Every replica takes equally many samples: whole batches of the loader.

    In a synchronous step all wait for the slowest replica, so with one that is four times slower
    than the others the job has the rate of as many replicas of its kind.
    """

    is_even = True
    max_local_batch_size = None

    def first(self, replicas: int, total: int) -> list[int]:
        """Equal ones."""
        return even(replicas, total)


@dataclass(frozen=True)
class Fixed(_Settled):
    """Replicas take samples in these proportions.

    Where replicas go their own way (`ParameterServer`, `Gossip`, ...) a replica's gradient is
    multiplied by its samples over the mean of all: there it counts by them, too.

    Args:
        shares: of each replica, > 0: samples, or any other numbers of which only the ratios matter.
            ``[1, 1, 0.25]``: the third computes four times slower.
        max_local_batch_size: the most samples that a rank computes at once: a larger share is cut
            into more microbatches. None: as many as the loader's batch has, so that no rank needs
            more memory than with even shares.

    Raises:
        ConfigError: a share that is not positive and finite; (in ``fit``) not one for each replica.

    Example:
        >>> Fixed([1, 1, 1, 0.25]).first(replicas=4, total=128)
        [40, 39, 39, 10]
    """

    shares: Sequence[float]
    max_local_batch_size: int | None = None

    is_even = False

    def __post_init__(self) -> None:
        if not self.shares or not all(0.0 < share < math.inf for share in self.shares):
            raise ConfigError(
                f"balance.shares is {list(self.shares)}; it has a number > 0 for each replica, in "
                "the proportions of their speeds, such as [1, 1, 0.25]"
            )
        _check_at_least(1, max_local_batch_size=self.max_local_batch_size)

    def first(self, replicas: int, total: int) -> list[int]:
        """In these proportions, at least one sample each."""
        if len(self.shares) != replicas:
            raise ConfigError(
                f"balance.shares has {len(self.shares)} numbers ({list(self.shares)}), but there "
                f"are {replicas} replicas; give one for each"
            )
        return apportion(self.shares, total)


@dataclass(frozen=True)
class Auto:
    r"""Replicas take samples in proportion to measured speeds, so that none is waited for.

    Every ``every`` steps the replicas tell each other what the last ``measured`` ones took them:
    a_i, the seconds of a step that do not depend on its samples (the optimizer, logging, callbacks,
    whatever else the rank does between its steps), and b_i, those of forward and backward passes
    per sample, both as medians over the steps. Waiting, communication and evaluations are in
    neither; a rank that does something beside training, as serving parameters, has a larger b_i
    for it. Then::

        n* = argmin max_i (a_i + b_i n_i)  with  sum_i n_i the same as always,  n_i >= least
        n <- n + damping (n* - n)   if n* is quicker by more than min_gain,  else  n

    rounded to whole samples. If the cost of a sample falls with their number (a fixed cost of every
    kernel, say), n_i moves in several decisions to where all finish at the same time.

    It is for replicas that are slow all the time; see the table in benchmarks/README.md for others.
    Strategies whose replicas do not all make the same steps refuse it: a fast replica makes more
    steps there.

    Args:
        every: steps between decisions.
        measured: of these, the last ones, whose times are taken. On CUDA the host waits for the
            device in each of them.
        damping: how far to go towards n*, in (0, 1].
        min_gain: the part of a step's time that must be won, in [0, 1).
        least: samples that a replica has in any case.
        max_local_batch_size: as in `Fixed`.

    Raises:
        ConfigError: a number out of its range.

    Example:
        The second replica takes 4 s for a sample, the first one 1 s: 8 + 2 samples take 8 s.

        >>> Auto(damping=1.0).next([5, 5], [Cost(0.0, 1.0), Cost(0.0, 4.0)])
        [8, 2]
    """

    every: int = 50
    measured: int = 10
    damping: float = 0.75
    min_gain: float = 0.02
    least: int = 1
    max_local_batch_size: int | None = None

    is_even = False

    def __post_init__(self) -> None:
        _check_at_least(
            1,
            every=self.every,
            measured=self.measured,
            max_local_batch_size=self.max_local_batch_size,
        )
        _check_at_least(0, least=self.least)
        if self.measured > self.every:
            raise ConfigError(
                f"balance.measured is {self.measured}, but there are only {self.every} steps "
                "between decisions (balance.every); give at most as many"
            )
        if not 0.0 < self.damping <= 1.0:
            raise ConfigError(f"balance.damping is {self.damping}; it is in (0, 1]")
        if not 0.0 <= self.min_gain < 1.0:
            raise ConfigError(f"balance.min_gain is {self.min_gain}; it is in [0, 1)")

    def first(self, replicas: int, total: int) -> list[int]:
        """Equal ones: nothing is known yet."""
        return even(replicas, total)

    def next(self, shares: Sequence[int], costs: Sequence[Cost]) -> list[int]:
        """Towards the quickest, if that pays; never worse than even ones, by these costs."""
        total = sum(shares)
        best = quickest(costs, total, self.least)
        if step_seconds(costs, best) >= (1.0 - self.min_gain) * step_seconds(costs, shares):
            return list(shares)
        towards = [n + self.damping * (b - n) for n, b in zip(shares, best, strict=True)]
        moved = apportion(towards, total, self.least)
        bound = min(step_seconds(costs, shares), step_seconds(costs, even(len(shares), total)))
        return moved if step_seconds(costs, moved) <= bound else best


def _check_at_least(bound: int, /, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < bound:
            raise ConfigError(f"balance.{name} is {value}; it is a whole number >= {bound}")
