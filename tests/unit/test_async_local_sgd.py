"""AsyncLocalSGD: pushes without rounds, by hand and in threads; how long a round is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from scaledtrain import Trainer, connect
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.strategies import AsyncLocalSGD
from scaledtrain.strategies.round import Round
from tests.worlds import Value, Worker, World

ADD_UP = partial(torch.optim.SGD, lr=1.0)  # theta <- theta - g = theta - (anchor - local)


def worker(link: Any, lr: float = 0.5, **options: Any) -> Worker:
    return Worker(link, AsyncLocalSGD(**options), lr)


def test_two_replicas_by_hand() -> None:
    """lr = 1/2, two local steps, the server adds up how far each came; all begin at 0.

    0 to 8: 4, then 6. Meanwhile 1 to -4: -2. 0 pushes 0 - 6: theta = 6, which it goes on from.
    1: -3, pushes 0 - (-3) = 3 of version 0, staleness 1: theta = 3, which it goes on from.
    0 to 8 from 6: 7, then 7.5; pushes 6 - 7.5, staleness 1: theta = 3 + 1.5 = 4.5.
    """
    options = {"sync_every": 2, "outer_optimizer": ADD_UP}
    zero, one = World(2).run(partial(worker, **options))
    zero.step(8)
    one.step(-4)
    assert (zero.w, one.w, zero.agreed, zero.strategy.staleness) == (4.0, -2.0, 0.0, None)
    zero.step(8)
    assert (zero.w, one.w, one.agreed, zero.strategy.staleness) == (6.0, -2.0, 6.0, 0)
    one.step(-4)
    assert (one.w, one.strategy.staleness) == (3.0, 1)
    zero.step(8)
    assert (zero.w, zero.agreed) == (7.0, 3.0)
    zero.step(8)
    assert (zero.w, zero.agreed, zero.strategy.staleness) == (4.5, 4.5, 1)
    assert [w.strategy.step for w in (zero, one)] == [4, 2]


def test_the_default_is_delayed_nesterov_of_as_many_as_there_are() -> None:
    """eps 0.7, beta 0.9, N = 2: g = -4: theta = 0.7 * 2 = 1.4.

    Then g = 2 of version 0: m = (-4 + 2)/2 = -1; theta = 1.4 - 0.7 (2/2 + 0.9 * -1) = 1.33.
    """
    zero, one = World(2).run(partial(worker, sync_every=1))
    zero.compute(8)
    one.compute(-4)
    zero.update()
    assert zero.w == pytest.approx(1.4)
    one.update()
    assert one.w == pytest.approx(1.33)


def test_what_is_left_at_the_end_is_pushed() -> None:
    """Rank r makes 3 steps of rounds of 2: the third is pushed at the end; nothing is lost.

    lr = 1 takes each to its target at once: from whatever it pulled to 1 (rank 0) or 5 (rank 1).
    One after the other: 0 pushes 0 - 1: theta 1. 1 pushes 0 - 5: theta = 1 + 5 = 6.
    At the end 0, at 1 from 1, pushes 0; 1, at 5 from 6, pushes 1: theta = 5.
    """
    world = World(2)
    workers = world.run(partial(worker, lr=1.0, sync_every=2, outer_optimizer=ADD_UP))
    for steps in (2, 1):
        for w, target in zip(workers, (1.0, 5.0), strict=True):
            for _ in range(steps):
                w.step(target)
    world.run(lambda link: workers[link.rank].strategy.settle())
    assert [w.w for w in workers] == [5.0, 5.0]
    assert [w.agreed for w in workers] == [5.0, 5.0]


def test_a_stop_reaches_the_others_when_they_pull() -> None:
    zero, one = World(2).run(partial(worker, sync_every=3))
    assert one.strategy.agree_to_stop(True) is True
    assert [zero.step(1.0) for _ in range(4)] == [True, True, True, False]


def test_all_end_with_the_servers_parameters() -> None:
    """Targets -1, 0 and 4, whose mean is 1; each push moves by about a third of what it says."""

    def train(link: Any) -> tuple[float, float]:
        one = worker(link, lr=0.1, sync_every=3)
        one.strategy.start(150)
        while one.step((-1.0, 0.0, 4.0)[link.rank]):
            link.world.exchange(link.rank, None)  # equally fast
        one.strategy.settle()
        return one.w, one.agreed

    results = World(3).run(train)
    assert results == [results[0]] * 3
    assert results[0][0] == results[0][1] == pytest.approx(1.0, abs=0.5)


def test_one_replica_whose_server_adds_up_is_plain_training() -> None:
    """Numbers of few bits, so that anchor - (anchor - local) rounds nothing."""
    with connect() as link:
        one = worker(link, lr=0.5, sync_every=2, outer_optimizer=ADD_UP)
        w = 0.0
        for x in (8.0, 4.0, -2.0, 6.0, 1.0):
            one.step(x)
            w -= 0.5 * (w - x)
            assert one.w == w


def test_saved_in_a_round_and_resumed() -> None:
    """At step 6 of rounds of 4: optimizer, server, anchor and place in the round go on."""
    numbers = [float(i % 5) for i in range(12)]

    def run(save_at: int | None) -> list[float]:
        model = Value(3.0)
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        seen = []
        with connect() as link:
            options: dict[str, Any] = {"console": False, "link": link}
            trainer = Trainer(model, None, sgd, strategy=AsyncLocalSGD(4), **options)
            for i, x in enumerate(numbers):
                if i == save_at:
                    state = trainer.state_dict()
                    trainer = Trainer(Value(0.0), None, sgd, strategy=AsyncLocalSGD(4), **options)
                    trainer.load_state_dict(state)
                batch = StepBatch([torch.tensor([x], dtype=torch.float64)], [1])
                assert trainer.step(batch)
                seen.append(trainer.model.w.item())
        return seen

    assert run(save_at=6) == run(save_at=None)


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_slower_replicas_make_fewer_steps() -> None:
    """Rank 0 needs 1 s for a step, rank 1 4 s: of rounds of 8 steps rank 1 soon makes 8/4 = 2.

    It makes 8 at first, since it knows nothing of itself before the end of a round.
    """
    world, clocks = World(2), [Clock(), Clock()]
    for link, clock in zip(world.links, clocks, strict=True):
        link.timeline.now = clock
    workers = world.run(partial(worker, sync_every=8, proportional_steps=True))
    pushes: list[list[float]] = [[], []]
    while clocks[0].seconds < 64.0:
        rank = 0 if clocks[0].seconds <= clocks[1].seconds else 1
        assert workers[rank].compute(1.0)
        clocks[rank].seconds += (1.0, 4.0)[rank]
        workers[rank].update()
        if workers[rank].strategy.staleness is not None:
            pushes[rank].append(clocks[rank].seconds)
    assert pushes[0] == [8.0, 16.0, 24.0, 32.0, 40.0, 48.0, 56.0, 64.0]
    assert pushes[1] == [32.0, 40.0, 48.0, 56.0, 64.0]


@pytest.mark.parametrize(
    ("seconds", "fastest", "length"),
    [
        (4.0, 1.0, 8),  # 8 steps in 4 s are 2 a second: nobody is faster
        (4.0, 3.0, 5),  # 8 * 2/3 = 5.33
        (4.0, 100.0, 1),  # 0.16
        (4.0, 0.0, 8),  # nobody has told
    ],
)
def test_length_of_a_round(seconds: float, fastest: float, length: int) -> None:
    for proportional in (True, False):
        one = Round(8, proportional)
        for _ in range(8):
            assert not one.complete
            one.begin_step(1000.0)
            one.end_step(1000.0 + seconds / 8)
        assert one.complete
        assert one.speed == 2.0
        one.restart(fastest)
        assert (one.length, one.made) == (length if proportional else 8, 0)


def test_time_between_steps_does_not_count() -> None:
    one = Round(2, True)
    for begin in (0.0, 100.0):
        one.begin_step(begin)
        one.end_step(begin + 1.0)
    assert one.speed == 1.0


def test_outside_its_range() -> None:
    with pytest.raises(ConfigError, match="sync_every is 0; it counts steps"):
        AsyncLocalSGD(sync_every=0)
