"""Periodic strategies on two replicas, step by step, against arithmetic by hand.

Replica i minimises (x - c_i)^2 / 2 with c = (0, 4) from x = 8. Its gradient is x - c_i, so that one
step of SGD with learning rate 1/2 halves the distance to c_i:

    replica 0:  8 -> 4 -> 2 -> 1 -> 0.5
    replica 1:  8 -> 6 -> 5 -> 4.5 -> 4.25

All numbers are sums of a few powers of two, so that float32 holds them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from scaledtrain import DiLoCo, LocalSGD, Replica, Strategy, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.strategies import SlowMo
from tests.ranks import run_ranks

HALF = partial(torch.optim.SGD, lr=0.5)
MEAN = partial(torch.optim.SGD, lr=1.0)  # outside: theta - (theta - mean)


class Trace(NamedTuple):
    """Parameters of one replica."""

    steps: list[list[float]]
    """After each step."""
    consensus: list[float]
    """What an evaluation after the last step saw."""
    restored: list[float]
    """After that evaluation."""
    final: list[float]
    """When all had settled."""


class Distance(nn.Module):
    """One number, or more, each a tensor of its own."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.x = nn.ParameterList(nn.Parameter(torch.tensor([8.0])) for _ in range(n))


def trace(
    link: Link,
    strategy: Strategy,
    steps: int,
    *,
    n: int = 1,
    scheduler: Callable[..., Any] | None = None,
    weights: Sequence[Sequence[float]] = ((1.0,), (1.0,)),
    skips: Sequence[Collection[int]] = ((), ()),
    tells: bool = True,
) -> Trace:
    """Train.

    Args:
        link: to the other replica.
        strategy: what is tested.
        steps: how many.
        n: parameters, all alike.
        scheduler: of the learning rate.
        weights: of each replica, in its first, second, ... step; the last is that of all others.
        skips: of each replica, the steps without an update, counted from 1.
        tells: the strategy is told of them.
    """
    rank = link.group.rank
    center = 4.0 * rank
    model = Distance(n)
    strategy.attach(Replica(model, HALF, scheduler), link)
    strategy.start(steps)

    def now() -> list[float]:
        return [x.item() for x in model.x]

    seen = []
    for step in range(1, steps + 1):
        assert strategy.before_forward()
        for x in model.x:
            x.grad = x.detach() - center
        strategy.reduce_gradients(weights[rank][min(step, len(weights[rank])) - 1])
        if step not in skips[rank]:
            strategy.apply_gradients()
        elif tells:
            strategy.skip_update()
        strategy.after_step()
        seen.append(now())
    assert not strategy.before_forward()
    with strategy.consensus():
        consensus = now()
    restored = now()
    strategy.settle()
    return Trace(seen, consensus, restored, now())


def drop_after_2(optimizer: torch.optim.Optimizer) -> StepLR:
    """Learning rate 1/2, 1/2, then 1/4."""
    return StepLR(optimizer, step_size=2, gamma=0.5)


def traces() -> dict[str, Trace]:
    outer = partial(torch.optim.SGD, lr=0.5, momentum=0.5)
    with connect(transport="shared_memory", timeout_seconds=30) as link:
        run = partial(trace, link)
        return {
            "local": run(LocalSGD(2), 3),
            "weighted": run(LocalSGD(2), 2, weights=[[1.0], [1.0, 0.5]]),
            "without samples": run(LocalSGD(2), 2, weights=[[1.0], [0.0]]),
            "skipped": run(LocalSGD(2), 2, skips=[[], [2]]),
            "post-local": run(LocalSGD(4, local_after=2), 4),
            "lr drop": run(LocalSGD(4, local_after="lr_drop"), 4, scheduler=drop_after_2),
            "late drop": run(
                LocalSGD(4, local_after="lr_drop"),
                4,
                scheduler=drop_after_2,
                skips=[[], [2]],
                tells=False,
            ),
            "skipped, lr drop": run(LocalSGD(4), 4, scheduler=drop_after_2, skips=[[], [1]]),
            "slow": run(SlowMo(2, slow_momentum=0.5), 5),
            "slow, half": run(SlowMo(2, slow_momentum=0.5, slow_lr=0.5), 4),
            "slow, lr drop": run(SlowMo(2, slow_momentum=0.5), 4, scheduler=drop_after_2),
            "diloco": run(DiLoCo(2, outer), 5),
            "nesterov": run(DiLoCo(2), 2),
            "fragments": run(DiLoCo(4, MEAN, fragments=2), 4, n=2),
            "overlap": run(DiLoCo(4, MEAN, overlap_steps=1, mixing=0.5), 9),
            "overlap, nothing kept": run(DiLoCo(4, MEAN, overlap_steps=1, mixing=0.0), 5),
            "under way": run(DiLoCo(4, MEAN, overlap_steps=1), 4),
        }


class Both(NamedTuple):
    """The traces of both replicas."""

    zero: Trace
    one: Trace

    def ends(self, value: float) -> bool:
        """Whether both saw this value in an evaluation, took their own back, and ended with it."""
        return all(
            t.consensus == t.final == [value] * len(t.final) and t.restored == t.steps[-1]
            for t in self
        )

    @property
    def values(self) -> list[tuple[float, float]]:
        """The first parameter of both, after each step."""
        return [(a[0], b[0]) for a, b in zip(self.zero.steps, self.one.steps, strict=True)]


@pytest.fixture(scope="module")
def both() -> dict[str, Both]:
    zero, one = run_ranks(traces, 2)
    return {name: Both(zero[name], one[name]) for name in zero}


def test_local_sgd_takes_the_mean_every_second_step(both: dict[str, Both]) -> None:
    # (2 + 5) / 2 = 3.5, from where one more step leads to 1.75 and 4 - 0.5 / 2.
    assert both["local"].values == [(4, 6), (3.5, 3.5), (1.75, 3.75)]
    assert both["local"].ends(2.75)  # (1.75 + 3.75) / 2


def test_the_mean_is_weighted_by_the_samples_of_the_period(both: dict[str, Both]) -> None:
    # Weights 1 and (1 + 0.5) / 2: (1 x 2 + 0.75 x 5) / 1.75 = 5.75 / 1.75
    assert both["weighted"].values[1] == pytest.approx((5.75 / 1.75, 5.75 / 1.75))
    assert both["without samples"].values[1] == (2, 2)  # replica 0's alone


def test_a_skipped_update_is_a_step_of_no_distance(both: dict[str, Both]) -> None:
    assert both["skipped"].values == [(4, 6), (4, 4)]  # (2 + 6) / 2


def test_post_local_sgd_averages_every_step_at_first(both: dict[str, Both]) -> None:
    # (4 + 6) / 2; (2.5 + 4.5) / 2; alone; alone to 0.875 and 3.875, whose mean is 2.375.
    expected = [(5, 5), (3.5, 3.5), (1.75, 3.75), (2.375, 2.375)]
    assert both["post-local"].values == expected


def test_post_local_sgd_goes_local_when_the_learning_rate_drops(both: dict[str, Both]) -> None:
    """After the second update the rate is 1/4: x - (x - c) / 4."""
    # From 3.5: 3/4 of it, and 4 - 3/4 of 0.5; then 1.96875 and 3.71875, whose mean is 2.84375.
    expected = [(5, 5), (3.5, 3.5), (2.625, 3.625), (2.84375, 2.84375)]
    assert both["lr drop"].values == expected


def test_replicas_agree_on_the_drop_though_one_skipped_an_update(both: dict[str, Both]) -> None:
    """Replica 1's rate is still 1/2 after step 2: its loop left an update out and told nobody."""
    # (2.5 + 5) / 2 = 3.75; alone: 3/4 of it, and (3.75 + 4) / 2, its last step of 1/2; then 3/4 of
    # 2.8125 = 2.109375, and 4 - 3/4 of 0.125 = 3.90625, whose mean is 3.0078125.
    expected = [(5, 5), (3.75, 3.75), (2.8125, 3.875), (3.0078125, 3.0078125)]
    assert both["late drop"].values == expected


def test_the_schedule_of_a_replica_that_skips_alone_is_not_behind(both: dict[str, Both]) -> None:
    """The first of the two steps of 1/2 is left out; the other two are of 1/4, as replica 0's."""
    # Alone: 4, 2, 1.5, 1.125; and 8, 6, 5.5, 5.125: the mean is 3.125.
    assert both["skipped, lr drop"].values == [(4, 8), (2, 6), (1.5, 5.5), (3.125, 3.125)]


def test_slow_momentum(both: dict[str, Both]) -> None:
    # u = (8 - 3.5) / 0.5 = 9;  x = 8 - 0.5 x 9 = 3.5
    # mean (0.875 + 3.875) / 2 = 2.375;  u = 0.5 x 9 + (3.5 - 2.375) / 0.5 = 6.75
    # x = 3.5 - 0.5 x 6.75 = 0.125;  then alone: 0.0625 and (0.125 + 4) / 2
    expected = [(4, 6), (3.5, 3.5), (1.75, 3.75), (0.125, 0.125), (0.0625, 2.0625)]
    assert both["slow"].values == expected
    assert both["slow"].ends(1.0625)  # the mean: no momentum in an unfinished period


def test_slow_learning_rate(both: dict[str, Both]) -> None:
    # u = 9;  x = 8 - 0.5 x 0.5 x 9 = 5.75
    # from there 1.4375 and 4.4375, mean 2.9375;  u = 4.5 + (5.75 - 2.9375) / 0.5 = 10.125
    # x = 5.75 - 0.5 x 0.5 x 10.125 = 3.21875
    expected = [(4, 6), (5.75, 5.75), (2.875, 4.875), (3.21875, 3.21875)]
    assert both["slow, half"].values == expected


def test_slow_momentum_is_scaled_with_the_learning_rate(both: dict[str, Both]) -> None:
    # u = 9, x = 3.5; then with rate 1/4 to 1.96875 and 3.71875, mean 2.84375
    # u = 4.5 + (3.5 - 2.84375) / 0.25 = 7.125;  x = 3.5 - 0.25 x 7.125 = 1.71875
    expected = [(4, 6), (3.5, 3.5), (2.625, 3.625), (1.71875, 1.71875)]
    assert both["slow, lr drop"].values == expected


def test_diloco_with_outer_momentum(both: dict[str, Both]) -> None:
    # delta = 8 - 3.5 = 4.5, momentum 4.5;  theta = 8 - 0.5 x 4.5 = 5.75
    # from there 1.4375 and 4.4375, mean 2.9375; delta = 2.8125; momentum 0.5 x 4.5 + 2.8125
    # = 5.0625;  theta = 5.75 - 0.5 x 5.0625 = 3.21875: SlowMo's numbers, as it is the same rule
    expected = [(4, 6), (5.75, 5.75), (2.875, 4.875), (3.21875, 3.21875)]
    assert both["diloco"].values[:4] == expected
    # One step of the third period: 1.609375 and 3.609375.
    assert both["diloco"].ends(2.609375)


def test_diloco_as_published(both: dict[str, Both]) -> None:
    # delta = momentum = 4.5; Nesterov looks ahead: 4.5 + 0.9 x 4.5 = 8.55; 8 - 0.7 x 8.55 = 2.015
    assert both["nesterov"].values[1] == pytest.approx((2.015, 2.015), rel=1e-6)


def test_fragments_synchronise_in_turn(both: dict[str, Both]) -> None:
    """With H = 4 the first of two is due after steps 2, 6, ..., the second after 4, 8, ..."""
    fragments = both["fragments"]
    # First: mean 3.5 after two steps, then alone. Second: alone to 0.5 and 4.25, mean 2.375.
    assert fragments.zero.steps == [[4, 4], [3.5, 2], [1.75, 1], [0.875, 2.375]]
    assert fragments.one.steps == [[6, 6], [3.5, 5], [3.75, 4.5], [3.875, 2.375]]
    assert fragments.ends(2.375)  # (0.875 + 3.875) / 2, and the second as it is


def test_a_reduction_under_way_is_mixed_in_when_it_is_there(both: dict[str, Both]) -> None:
    # After step 4: 0.5 and 4.25; theta = (0.5 + 4.25) / 2 = 2.375, used after step 5:
    # 0.5 x 0.25 + 0.5 x 2.375 = 1.3125, 0.5 x 4.125 + 0.5 x 2.375 = 3.25
    overlap = both["overlap"].values
    assert overlap[3:5] == [(0.5, 4.25), (1.3125, 3.25)]
    # Three steps on, 1.3125 / 8 and 4 - 0.75 / 8, mean 2.03515625: theta, used after step 9, where
    # the replicas are at 0.08203125 and 3.953125.
    assert overlap[7] == (0.1640625, 3.90625)
    assert overlap[8] == ((0.08203125 + 2.03515625) / 2, (3.953125 + 2.03515625) / 2)
    assert both["overlap"].ends((1.05859375 + 2.994140625) / 2)


def test_nothing_of_their_own_may_be_kept(both: dict[str, Both]) -> None:
    assert both["overlap, nothing kept"].values[3:] == [(0.5, 4.25), (2.375, 2.375)]


def test_a_run_that_ends_with_a_reduction_under_way_ends_with_the_mean(
    both: dict[str, Both],
) -> None:
    assert both["under way"].values[3] == (0.5, 4.25)
    assert both["under way"].ends(2.375)
