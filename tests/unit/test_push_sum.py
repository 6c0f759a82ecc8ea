"""PushSum: shares on their way, in an order that is known and in threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from scaledtrain import Trainer, connect
from scaledtrain.data.steps import StepBatch
from scaledtrain.strategies import PushSum
from tests.worlds import Value, Worker, World

SENDING = [(False, False), (False, True), (True, True)]  # (overlap, late)


def workers(world: World, lr: float = 0.5, overlap: bool = False) -> list[Worker]:
    return world.run(lambda link: Worker(link, PushSum(overlap), lr))


def set_to(worker: Worker, z: float) -> None:
    share = [torch.tensor([x], dtype=torch.float64) for x in (z, 1.0)]
    worker.strategy.load_state_dict({**worker.strategy.state_dict(), "share": share})


def share(worker: Worker) -> tuple[float, float]:
    x, w = worker.strategy._peer.share
    return x.item(), w.item()


@pytest.mark.parametrize("late", [False, True])
def test_two_replicas_by_hand(late: bool) -> None:
    """lr = 1/2, both at (0, 1); both compute before either goes on.

    0 to 8: z = 4; gives (2, 1/2), keeps (2, 1/2). 1 has (2, 3/2), z = 4/3; its gradient to -4,
    taken at 0, is 4: z = 4/3 - 2 = -2/3, x = 3/2 * -2/3 = -1; gives (-1/2, 3/4), keeps as much.
    0 has (2 - 1/2, 1/2 + 3/4) = (3/2, 5/4), z = 6/5. Sums: 3/2 - 1/2 = 1, 5/4 + 3/4 = 2.
    """
    zero, one = workers(World(2, late=late))
    zero.compute(8)
    one.compute(-4)
    zero.update()
    assert (zero.w, share(zero), share(one)) == (4.0, (2.0, 0.5), (2.0, 1.5))
    one.update()
    assert one.w == pytest.approx(-2 / 3)
    assert share(one) == pytest.approx((-0.5, 0.75))
    assert share(zero) == pytest.approx((1.5, 1.25))
    zero.strategy.after_step()  # a step without an update mixes all the same
    assert zero.w == pytest.approx(6 / 5)


def test_overlap_is_one_step_later() -> None:
    """As above, but 0's share is on its way until its next step ends: 1 computes without it."""
    zero, one = workers(World(2, late=True), overlap=True)
    zero.step(8)
    assert (share(zero), share(one)) == ((2.0, 0.5), (0.0, 1.0))
    one.step(0)
    assert share(one) == (0.0, 0.5)
    zero.compute(8)
    zero.update()
    # z: 4 to 6, x = 3, w = 1/2; the first share has arrived, the second, (3/2, 1/4), is on its way
    assert share(zero) == (1.5, 0.25)
    assert share(one) == (2.0, 1.0)


@pytest.mark.parametrize(("overlap", "late"), SENDING)
def test_threads_agree_and_keep_the_sums(overlap: bool, late: bool) -> None:
    """lr = 0, z = rank, four threads: all come near 1.5, and at the end have it."""

    def train(link: Any) -> tuple[float, float, tuple[float, float]]:
        one = Worker(link, PushSum(overlap), lr=0.0)
        set_to(one, float(link.rank))
        link.world.exchange(link.rank, None)
        for _ in range(60):
            assert one.step(0.0)
            link.world.exchange(link.rank, None)  # equally fast
        before = one.w
        one.strategy.settle()
        return before, one.w, share(one)

    results = World(4, late=late).run(train)
    assert [before for before, _, _ in results] == pytest.approx([1.5] * 4, abs=1e-3)
    assert [after for _, after, _ in results] == pytest.approx([1.5] * 4, abs=1e-12)
    assert [s for _, _, s in results] == [(results[0][1], 1.0)] * 4


@pytest.mark.parametrize("overlap", [False, True])
def test_threads_train(overlap: bool) -> None:
    """Targets -1, 0, 4 pull the replicas apart; at the end all are near the targets' mean 1."""

    def train(link: Any) -> float:
        one = Worker(link, PushSum(overlap), lr=0.05)
        one.strategy.start(300)
        while one.step((-1.0, 0.0, 4.0)[link.rank]):
            link.world.exchange(link.rank, None)  # equally fast
        one.strategy.settle()
        return one.w

    results = World(3).run(train)
    assert results == [results[0]] * 3
    assert results[0] == pytest.approx(1.0, abs=0.5)


def test_a_slow_replica_holds_nobody_up_and_does_not_take_all() -> None:
    """Rank 1 makes no step. Rank 0 gives 1/2, then 1/4 of what it began with, and keeps 1/4."""
    zero, one = workers(World(2))
    for _ in range(50):
        assert zero.step(1.0)
    assert (zero.strategy.step, one.strategy.step) == (50, 0)
    assert (share(zero)[1], share(one)[1]) == (0.25, 1.75)
    assert zero.w == pytest.approx(1.0, abs=1e-6)


def test_a_stop_is_heard_before_the_next_step() -> None:
    zero, one = workers(World(2))
    assert one.strategy.agree_to_stop(False) is False
    assert zero.step(1.0)
    assert one.strategy.agree_to_stop(True) is True
    assert not zero.step(1.0)


@pytest.mark.parametrize(("overlap", "late"), SENDING)
def test_a_dead_replica_stops_nobody(overlap: bool, late: bool) -> None:
    """Rank 1 dies holding what it has; 0 and 2 go on with weights that begin anew, and end."""
    world = World(3, late=late)
    zero, one, two = workers(world, lr=0.0, overlap=overlap)
    for z, worker in zip((1.0, 1e6, 4.0), (zero, one, two), strict=True):
        set_to(worker, z)
    world.dead.add(1)
    for _ in range(60):
        assert zero.step(0.0)
        assert two.step(0.0)
    assert zero.w == pytest.approx(two.w, abs=1e-6)
    assert 1.0 < zero.w < 4.0

    def settle(link: Any) -> bool:
        if link.rank != 1:
            [zero, one, two][link.rank].strategy.settle()
        return True

    assert all(world.run(settle))
    assert zero.w == pytest.approx(two.w, abs=1e-6)


def test_a_share_that_could_not_be_given_comes_back() -> None:
    """The board does not know yet that rank 1 died when 0's message to it fails."""
    world = World(2, late=True)
    zero, _ = workers(world, lr=0.0, overlap=True)
    set_to(zero, 3.0)
    zero.step(0.0)
    assert share(zero) == (1.5, 0.5)
    world.dead.add(1)
    zero.step(0.0)
    assert share(zero) == (3.0, 1.0)
    assert zero.w == 3.0


def test_saved_and_resumed() -> None:
    numbers = [float(i % 5) for i in range(8)]
    adam = partial(torch.optim.Adam, lr=0.1)

    def run(save_at: int | None) -> list[float]:
        seen = []
        with connect() as link:
            options: dict[str, Any] = {"console": False, "link": link}
            trainer = Trainer(Value(3.0), None, adam, strategy=PushSum(), **options)
            for i, x in enumerate(numbers):
                if i == save_at:
                    state = trainer.state_dict()
                    trainer = Trainer(Value(0.0), None, adam, strategy=PushSum(), **options)
                    trainer.load_state_dict(state)
                assert trainer.step(StepBatch([torch.tensor([x], dtype=torch.float64)], [1]))
                seen.append(trainer.model.w.item())
        return seen

    assert run(save_at=5) == run(save_at=None)
