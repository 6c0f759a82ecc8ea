"""Shares of a step: exact against brute force, and what holds for any costs."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledtrain.balance import Auto, Even, Fixed
from scaledtrain.balance.shares import Cost, apportion, even, quickest, step_seconds
from scaledtrain.errors import ConfigError

COSTS = st.lists(
    st.builds(Cost, st.floats(0.0, 10.0), st.floats(0.01, 10.0)), min_size=1, max_size=8
)


def divisions(replicas: int, total: int, least: int) -> list[tuple[int, ...]]:
    choices = itertools.product(range(least, total + 1), repeat=replicas)
    return [shares for shares in choices if sum(shares) == total]


def test_by_hand() -> None:
    # 9 samples in 4 : 2 : 1 are 5.14, 2.57 and 1.29; the second has the largest remainder.
    assert apportion([4, 2, 1], total=9) == [5, 3, 1]
    # By proportion the third would have 0.2; it gets 1, and the others 4.5 each of the other 9.
    assert apportion([5, 5, 0.2], total=10) == [5, 4, 1]
    assert apportion([0.0, 1.0], total=4, least=0) == [0, 4]
    assert apportion([1, 1, 1], total=2) == [1, 1, 0]  # there are not enough
    # Rates 1, 1/2 and 1/4: 14 samples take 8 s, where even shares (5, 5, 4) take 16.
    costs = [Cost(0, 1), Cost(0, 2), Cost(0, 4)]
    assert quickest(costs, total=14) == [8, 4, 2]
    assert step_seconds(costs, even(3, 14)) == 16.0


@settings(deadline=None)
@given(COSTS, st.integers(0, 2), st.integers(1, 9))
def test_it_is_as_quick_as_the_best_of_all_divisions(
    costs: list[Cost], least: int, total: int
) -> None:
    costs = costs[:3]
    least = min(least, total // len(costs))
    shares = quickest(costs, total, least)
    best = min(step_seconds(costs, d) for d in divisions(len(costs), total, least))
    assert sum(shares) == total
    assert min(shares) >= least
    assert step_seconds(costs, shares) == pytest.approx(best, rel=1e-12)


@settings(deadline=None)
@given(COSTS, st.integers(0, 1000), st.data())
def test_a_decision_keeps_the_sum_and_never_loses(
    costs: list[Cost], extra: int, data: st.DataObject
) -> None:
    n = len(costs)
    total = n + extra
    weights = data.draw(st.lists(st.floats(0.01, 100.0), min_size=n, max_size=n))
    auto = Auto(damping=data.draw(st.floats(0.01, 1.0)), min_gain=data.draw(st.floats(0.0, 0.5)))
    shares = apportion(weights, total)
    assert sum(shares) == total
    assert min(shares) >= 1
    following = auto.next(shares, costs)
    assert sum(following) == total
    assert min(following) >= 1
    now, then = step_seconds(costs, shares), step_seconds(costs, following)
    assert then <= now
    if following != shares:  # else what there is to win is not worth it
        assert then <= step_seconds(costs, even(n, total))
        assert step_seconds(costs, quickest(costs, total)) < (1.0 - auto.min_gain) * now
    assert auto.next(shares, costs) == following


@settings(deadline=None)
@given(
    st.lists(st.floats(0.2, 5.0), min_size=2, max_size=6),
    st.floats(0.0, 20.0),
    st.integers(0, 10_000),
)
def test_decisions_converge_though_times_are_noisy_and_not_in_proportion(
    speeds: list[float], overhead: float, seed: int
) -> None:
    """Passes take (overhead + n) / speed, of which a decision knows only the time per sample."""
    noise = random.Random(seed)
    total = 200 * len(speeds)
    truth = [Cost(overhead / speed, 1.0 / speed) for speed in speeds]
    shares = even(len(speeds), total)
    for _ in range(20):
        seen = [
            Cost(0.0, cost.seconds(n) / n * noise.uniform(0.99, 1.01))
            for cost, n in zip(truth, shares, strict=True)
        ]
        shares = Auto().next(shares, seen)
    assert step_seconds(truth, shares) <= 1.06 * step_seconds(truth, quickest(truth, total))


def test_a_gain_that_is_too_small_changes_nothing() -> None:
    costs = [Cost(0.0, 1.0), Cost(0.0, 1.02)]  # 51 s, as (51, 49) would take
    assert Auto().next([50, 50], costs) == [50, 50]
    # 67 s instead of 100 are worth it; damping goes half the way to (67, 33).
    halfway = Auto(damping=0.5).next([50, 50], [Cost(0.0, 1.0), Cost(0.0, 2.0)])
    assert halfway == [59, 41]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Fixed([]), r"a number > 0 for each replica"),
        (lambda: Fixed([1.0, 0.0]), r"\[1.0, 0.0\]; it has a number > 0"),
        (lambda: Fixed([1.0, float("nan")]), "a number > 0"),
        (lambda: Fixed([1, 2, 3]).first(2, 8), "3 numbers .* but there are 2 replicas"),
        (lambda: Fixed([1], max_local_batch_size=0), "max_local_batch_size is 0"),
        (lambda: Auto(every=0), "every is 0"),
        (lambda: Auto(every=5), "measured is 10, but there are only 5 steps"),
        (lambda: Auto(damping=0.0), r"damping is 0.0; it is in \(0, 1\]"),
        (lambda: Auto(min_gain=1.0), "min_gain is 1.0"),
        (lambda: Auto(least=-1), "least is -1"),
    ],
)
def test_what_cannot_be_is_refused(make: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make()  # type: ignore[operator]


def test_even_and_fixed_never_change() -> None:
    costs = [Cost(0.0, 1.0), Cost(0.0, 4.0)]
    for balance in (Even(), Fixed([3, 1])):
        shares = balance.first(2, 8)
        assert balance.next(shares, costs) == shares
