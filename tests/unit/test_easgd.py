"""EASGD: the spring between replicas and centre, by hand, in threads, and through the Trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from scaledtrain import Trainer, connect
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.strategies import EASGD, AsyncLocalSGD
from tests.worlds import Value, Worker, World


def worker(link: Any, lr: float, **options: Any) -> Worker:
    return Worker(link, EASGD(**options), lr)


def test_two_replicas_by_hand() -> None:
    """lr = 1/2, alpha = 1/4, a move after every second step; x_0, x_1 and c begin at 0.

    0 to 8: x_0 = 4, then 6; d = (6 - 0)/4 = 1.5: x_0 = 4.5, c = 1.5
    1 to -4: x_1 = -2, then -3; d = (-3 - 1.5)/4 = -1.125: x_1 = -1.875, c = 0.375
    0 to 8: x_0 = 6.25, 7.125; d = (7.125 - 0.375)/4 = 1.6875: x_0 = 5.4375, c = 2.0625
    """
    zero, one = World(2).run(lambda link: worker(link, lr=0.5, sync_every=2, alpha=0.25))
    zero.step(8), zero.step(8)
    assert (zero.w, zero.agreed) == (4.5, 1.5)
    one.step(-4), one.step(-4)
    assert (one.w, one.agreed, zero.agreed) == (-1.875, 0.375, 0.375)
    zero.step(8)
    assert (zero.w, zero.agreed) == (6.25, 0.375)
    zero.step(8)
    assert (zero.w, zero.agreed) == (5.4375, 2.0625)
    assert [w.strategy.step for w in (zero, one)] == [4, 2]


def test_a_spring_keeps_the_sum() -> None:
    """Without gradients (lr = 0) x_0 + x_1 + x_2 + c stays 0 + 3 + 6 + 0 = 9, and all tend to 9/4.

    Exactly at first: eighths of whole numbers, three times.
    """
    workers = World(3).run(lambda link: worker(link, lr=0.0, sync_every=1, alpha=0.125))
    for i, one in enumerate(workers):
        one.model.w.data.fill_(3.0 * i)
    for turn in range(400):
        one = workers[turn % 3]
        one.step(0.0)
        total = sum(w.w for w in workers) + one.agreed
        assert total == pytest.approx(9.0, abs=0.0 if turn < 3 else 1e-12)
    assert [w.w for w in workers] == pytest.approx([2.25] * 3, abs=1e-6)


@pytest.mark.parametrize("strategy", [EASGD(sync_every=1000), AsyncLocalSGD(sync_every=1000)])
def test_a_long_round_shows_that_it_lives(
    strategy: EASGD | AsyncLocalSGD, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step each 0.4 s: at 1.2 and 2.4 s a second has passed since the server last heard of it."""
    (worker,) = World(1).run(lambda link: Worker(link, strategy))
    told: list[float] = []
    seconds = begin = strategy._timeline.now()
    monkeypatch.setattr(strategy._timeline, "now", lambda: seconds)
    monkeypatch.setattr(strategy._centre, "_last_beat", begin)
    monkeypatch.setattr(strategy._centre._store, "skip", lambda: told.append(seconds - begin))
    for _ in range(6):
        seconds += 0.4
        worker.step(0.0)
    assert told == pytest.approx([1.2, 2.4])


def test_staleness_is_told_once() -> None:
    """Between 0's fetching and its push nothing happens here: staleness 0, told at the next move.

    In the steps between there is none to tell.
    """
    zero, one = World(2).run(lambda link: worker(link, lr=0.5, sync_every=2))
    seen = []
    for _ in range(6):
        zero.step(1.0)
        seen.append(zero.strategy.staleness)
        one.step(1.0)
    assert seen == [None, None, None, 0, None, 0]


def test_a_stop_reaches_the_others_when_they_move() -> None:
    zero, one = World(2).run(lambda link: worker(link, lr=0.5, sync_every=3))
    assert one.strategy.agree_to_stop(False) is False
    assert one.strategy.agree_to_stop(True) is True
    assert [zero.step(1.0) for _ in range(4)] == [True, True, True, False]


def test_all_end_with_the_centre() -> None:
    """Each replica alone goes to its own target, -1, 0 or 4; the centre to near their mean, 1."""

    def train(link: Any) -> tuple[float, float, int]:
        one = worker(link, lr=0.1, sync_every=2)
        one.strategy.start(200)
        while one.step((-1.0, 0.0, 4.0)[link.rank]):
            link.world.exchange(link.rank, None)  # equally fast
        one.strategy.settle()
        return one.w, one.agreed, one.strategy.step

    results = World(3).run(train)
    assert results == [results[0]] * 3
    w, agreed, steps = results[0]
    assert w == agreed == pytest.approx(1.0, abs=0.3)
    assert steps == 200


def test_the_default_strength_is_the_papers() -> None:
    """0.9 / 3 = 0.3 of the way."""
    zero, *_ = World(3).run(lambda link: worker(link, lr=1.0, sync_every=1))
    zero.step(10.0)
    assert zero.w == pytest.approx(7.0)
    assert zero.agreed == pytest.approx(3.0)


def test_saved_between_two_moves_and_resumed() -> None:
    """At step 6, half way between two moves; the optimizer's momentum, x and c go on."""
    numbers = [float(i % 5) for i in range(12)]

    def run(save_at: int | None) -> list[float]:
        model = Value(3.0)
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        seen = []
        with connect() as link:
            trainer = Trainer(model, None, sgd, strategy=EASGD(4), console=False, link=link)
            for i, x in enumerate(numbers):
                if i == save_at:
                    state = trainer.state_dict()
                    other = Value(0.0)
                    trainer = Trainer(other, None, sgd, strategy=EASGD(4), console=False, link=link)
                    trainer.load_state_dict(state)
                batch = StepBatch([torch.tensor([x], dtype=torch.float64)], [1])
                assert trainer.step(batch)
                seen.append(trainer.model.w.item())
        return seen

    assert run(save_at=6) == run(save_at=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sync_every": 0}, "sync_every is 0"), ({"alpha": 1.5}, "alpha is 1.5; it is in")],
)
def test_outside_its_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EASGD(**options)
