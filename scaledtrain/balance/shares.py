"""How the samples of a step are shared out: pure arithmetic, the same on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Cost", "apportion", "even", "quickest", "step_seconds"]

_HALVINGS = 100  # of an interval of floats, until it has none inside


class Cost(NamedTuple):
    """What a step takes one replica: ``fixed + per_sample * n`` seconds for n samples."""

    fixed: float
    per_sample: float

    def seconds(self, samples: float) -> float:
        """Of a step with so many."""
        return self.fixed + self.per_sample * samples


def even(replicas: int, total: int) -> list[int]:
    """Equal shares, the first ones larger by one where it does not divide.

    Example:
        >>> even(3, 8)
        [3, 3, 2]
    """
    return apportion([1.0] * replicas, total)


def apportion(weights: Sequence[float], total: int, least: int = 1) -> list[int]:
    """Whole numbers in proportion to weights, by largest remainders (of equal ones, the first).

    Args:
        weights: >= 0, at least one above 0.
        total: what the numbers add up to.
        least: that each has; less where there are not so many.

    Example:
        >>> apportion([1, 1, 1, 0.25], total=128)  # 39.4 each, and 9.8
        [40, 39, 39, 10]
    """
    n = len(weights)
    least = min(least, total // n)
    scale = sum(weights)
    quotas = [total * weight / scale for weight in weights]
    raised = {i for i, quota in enumerate(quotas) if quota < least}
    while raised:  # the others share what is left; that may bring one of them below, too
        left, scale = total - least * len(raised), sum(weights) - sum(weights[i] for i in raised)
        if len(raised) == n or scale <= 0.0:
            return apportion([1.0] * n, total, 0)
        quotas = [
            float(least) if i in raised else left * weight / scale
            for i, weight in enumerate(weights)
        ]
        further = {i for i, quota in enumerate(quotas) if quota < least} - raised
        if not further:
            break
        raised |= further
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(n), key=lambda i: (shares[i] - quotas[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def step_seconds(costs: Sequence[Cost], shares: Sequence[int]) -> float:
    """Until the slowest replica has finished."""
    return max(cost.seconds(n) for cost, n in zip(costs, shares, strict=True))


def quickest(costs: Sequence[Cost], total: int, least: int = 1) -> list[int]:
    r"""The shares with which the slowest replica finishes first.

    minimise over n:  max_i (a_i + b_i n_i)   with   sum_i n_i = total,  n_i >= least

    It is exact: to as many samples as every replica has in the best division into fractions, single
    ones are added, each where it is finished first.

    Args:
        costs: of the replicas, ``per_sample`` above 0.
        total: samples of a step.
        least: that each replica has; less where there are not so many.

    Example:
        >>> quickest([Cost(0, 1), Cost(0, 1), Cost(0, 4)], total=18)  # 8 s
        [8, 8, 2]
        >>> quickest([Cost(4, 1), Cost(0, 1)], total=10)  # the first has 4 s of other work: 7 s
        [3, 7]
    """
    least = min(least, total // len(costs))

    def finished(seconds: float) -> list[int]:
        return [max(least, math.floor((seconds - a) / b)) for a, b in costs]

    low, high = 0.0, max(cost.seconds(total) for cost in costs)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(finished(middle)) <= total else (low, middle)
    shares = finished(low)
    following = [(cost.seconds(shares[i] + 1), i) for i, cost in enumerate(costs)]
    heapq.heapify(following)
    for _ in range(total - sum(shares)):
        _, i = following[0]
        shares[i] += 1
        heapq.heapreplace(following, (costs[i].seconds(shares[i] + 1), i))
    return shares
