"""Hogwild: one model in the memory of all ranks; theirs again when the run is over."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from scaledtrain import Callback, Trainer, connect
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.strategies import Hogwild
from tests.worlds import Value, Worker, World


def workers(world: World, lr: float = 0.5) -> list[Worker]:
    return world.run(lambda link: Worker(link, Hogwild(), lr))


def test_all_write_to_the_same_number() -> None:
    """lr = 1/2. Both compute at 0: gradients -8 and 4. w = 0 + 4 = 4, then 4 - 2 = 2.

    The second update is of a gradient that missed one: staleness 1. Then 0 computes at 2.
    """
    zero, one = workers(World(2))
    zero.compute(8)
    one.compute(-4)
    zero.update()
    assert (zero.w, one.w, zero.strategy.staleness, zero.strategy.step) == (4.0, 4.0, 0, 1)
    one.update()
    assert (zero.w, one.w, one.strategy.staleness, one.strategy.step) == (2.0, 2.0, 1, 2)
    zero.compute(4)
    assert zero.strategy.step == 2
    zero.update()
    assert (one.w, zero.strategy.staleness, zero.strategy.step) == (3.0, 0, 3)


def test_a_step_without_an_update_counts_and_has_no_staleness() -> None:
    zero, _ = workers(World(2))
    zero.step(8)
    zero.compute(8)
    zero.strategy.reduce_gradients()
    zero.strategy.after_step()
    assert (zero.w, zero.strategy.step, zero.strategy.staleness) == (4.0, 2, None)


def test_max_steps_are_of_all_ranks_together() -> None:
    """Limit 5: both compute their third before either is counted, so that there are 6."""
    world = World(2)
    zero, one = workers(world)
    world.run(lambda link: (zero, one)[link.rank].strategy.start(5))
    for _ in range(3):
        assert zero.compute(1.0)
        assert one.compute(1.0)
        zero.update()
        one.update()
    assert not zero.compute(1.0)
    assert not one.compute(1.0)
    assert zero.strategy.step == one.strategy.step == 6


def test_a_stop_is_heard_before_the_next_step() -> None:
    zero, one = workers(World(2))
    assert one.strategy.agree_to_stop(False) is False
    assert zero.step(1.0)
    assert one.strategy.agree_to_stop(True) is True
    assert not zero.step(1.0)


def test_several_runs_and_memory_of_ones_own_between_them() -> None:
    """After the first run, at 4, rank 1's model is changed, but the next begins with rank 0's."""
    world = World(2)
    zero, one = workers(world)
    zero.step(8)
    world.run(lambda link: (zero, one)[link.rank].strategy.settle())
    assert (zero.w, one.w) == (4.0, 4.0)
    one.model.w.data.fill_(-1.0)
    assert zero.w == 4.0
    with pytest.raises(ConfigError, match=r"each rank would train alone; call start\(\) first"):
        zero.compute(8)
    world.run(lambda link: (zero, one)[link.rank].strategy.start(None))
    assert (zero.w, one.w, zero.strategy.step) == (4.0, 4.0, 1)
    one.step(8)
    assert (zero.w, one.w, one.strategy.step) == (6.0, 6.0, 2)


def test_threads_train_one_model() -> None:
    """Gradients of -1, 0, 4 in turn: w goes to near their mean 1, to the same number everywhere."""

    def train(link: Any) -> tuple[float, int]:
        one = Worker(link, Hogwild(), lr=0.02)
        one.strategy.start(1200)
        while one.step((-1.0, 0.0, 4.0)[link.rank]):
            link.world.exchange(link.rank, None)  # equally fast
        one.strategy.settle()
        return one.w, one.strategy.step

    results = World(3).run(train)
    assert results == [results[0]] * 3
    assert results[0][0] == pytest.approx(1.0, abs=0.2)
    assert 1200 <= results[0][1] <= 1202


def test_no_views_of_shared_memory_are_left() -> None:
    with connect() as link:
        one = Worker(link, Hogwild())
        shared = one.model.w.data_ptr()
        one.step(8)
        one.strategy.settle()
        assert one.model.w.data_ptr() != shared
    assert one.w == 4.0


def test_saved_and_resumed() -> None:
    numbers = [float(i % 5) for i in range(8)]
    adam = partial(torch.optim.Adam, lr=0.1)

    def run(save_at: int | None) -> tuple[list[float], int]:
        seen = []
        with connect() as link:
            options: dict[str, Any] = {"console": False, "link": link}
            trainer = Trainer(Value(3.0), None, adam, strategy=Hogwild(), **options)
            trainer.strategy.start(None)
            for i, x in enumerate(numbers):
                if i == save_at:
                    state = trainer.state_dict()
                    model = Value(0.0)
                    trainer = Trainer(
                        model, None, adam, strategy=Hogwild(), console=False, link=link
                    )
                    trainer.load_state_dict(state)
                    trainer.strategy.start(None)
                batch = StepBatch([torch.tensor([x], dtype=torch.float64)], [1])
                assert trainer.step(batch)
                seen.append(trainer.model.w.item())
            return seen, trainer.step_count

    assert run(save_at=5) == run(save_at=None)
    assert run(save_at=5)[1] == 8


def test_staleness_reaches_the_metrics() -> None:
    """One rank misses nothing: every update but the last, which no later step tells of."""

    class Log(Callback):
        def __init__(self) -> None:
            self.seen: list[int | None] = []

        def on_step_end(self, trainer: Trainer) -> None:
            self.seen.append(trainer.strategy.staleness)

    log = Log()
    data = [torch.tensor([1.0], dtype=torch.float64)] * 3
    sgd = partial(torch.optim.SGD, lr=0.1)
    with Trainer(Value(0.0), None, sgd, strategy=Hogwild(), callbacks=[log], console=False) as t:
        t.fit(data, max_epochs=1)
    assert log.seen == [0, 0, 0]


def test_only_memory_of_the_cpu_can_be_shared() -> None:
    with connect() as link, pytest.raises(ConfigError, match="the parameters are on meta"):
        link.share([torch.empty(3, device="meta")])
