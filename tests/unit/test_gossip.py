"""Gossip: averaging by halves, in an order that is known and in threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from scaledtrain import Trainer, connect
from scaledtrain.comm.local import LocalGroup
from scaledtrain.data.steps import StepBatch
from scaledtrain.strategies import Gossip
from tests.worlds import Value, Worker, World


def workers(world: World, lr: float = 0.5, **options: Any) -> list[Worker]:
    return world.run(lambda link: Worker(link, Gossip(**options), lr))


def set_to(worker: Worker, w: float) -> None:
    state = worker.strategy.state_dict()
    worker.strategy.load_state_dict(
        {**state, "parameters": [torch.tensor([w], dtype=torch.float64)]}
    )


@pytest.mark.parametrize("late", [False, True])
def test_two_replicas_by_hand(late: bool) -> None:
    """lr = 1/2; rank 0 calls, rank 1 is called. x = (0, 4), both computing when 0 sends its 0.

    1 goes to 2 and answers -2, so 0 goes to 2. 0's gradient to 8, taken at 0, is -8: x_0 = 2 + 4.
    1's gradient to -4, taken at 4, is 8: x_1 = 2 - 4 = -2.
    """
    zero, one = workers(World(2, late=late))
    set_to(one, 4.0)
    assert one.compute(-4)
    assert zero.compute(8)
    assert zero.w == 0.0  # what it computes with stays as it was
    zero.update()
    assert one.w == 4.0
    one.update()
    assert (zero.w, one.w) == (6.0, -2.0)


def test_a_step_without_an_update_averages_all_the_same() -> None:
    zero, one = workers(World(2))
    set_to(one, 4.0)
    for worker in (zero, one):
        worker.compute(100.0)
        worker.strategy.reduce_gradients()
        worker.strategy.after_step()
    assert (zero.w, one.w, zero.strategy.step) == (2.0, 2.0, 1)


def test_neighbours_are_a_function_of_seed_rank_and_step() -> None:
    """Rank 0 of 4 calls 1 or 3, in 100 steps each about 50 times (+- 3 sigma: 15)."""

    def called(seed: int) -> list[int]:
        zero, *others = workers(World(4), lr=0.0, seed=seed)
        told = []
        for _ in range(100):
            before = [w.strategy._peer.tensors[0].item() for w in others]
            set_to(zero, 8.0 if before[0] < 4.0 else 0.0)
            zero.step(0.0)
            after = [w.strategy._peer.tensors[0].item() for w in others]
            told.append(next(i + 1 for i in range(3) if before[i] != after[i]))
        return told

    first = called(0)
    assert first == called(0)
    assert first != called(1)
    assert set(first) == {1, 3}
    assert 35 <= first.count(1) <= 65


@pytest.mark.parametrize("late", [False, True])
def test_threads_agree_and_keep_the_sum(late: bool) -> None:
    """lr = 0, x = rank: each of 4 threads steps as it likes; all come near the mean 1.5.

    At the end all have it, but for rounding.
    """

    def train(link: Any) -> tuple[float, float]:
        one = Worker(link, Gossip(seed=3), lr=0.0)
        set_to(one, float(link.rank))
        link.world.exchange(link.rank, None)
        for _ in range(60):
            assert one.step(0.0)
        before = one.w
        one.strategy.settle()
        return before, one.w

    results = World(4, late=late).run(train)
    assert [after for _, after in results] == pytest.approx([1.5] * 4, abs=1e-12)
    assert results[0][1] == results[1][1]


def test_threads_train() -> None:
    """Targets -1, 0, 4 pull the replicas apart; their mean goes to near the targets' mean 1."""

    def train(link: Any) -> float:
        one = Worker(link, Gossip(), lr=0.05)
        one.strategy.start(300)
        while one.step((-1.0, 0.0, 4.0)[link.rank]):
            link.world.exchange(link.rank, None)  # equally fast
        one.strategy.settle()
        return one.w

    results = World(3).run(train)
    assert results == [results[0]] * 3
    assert results[0] == pytest.approx(1.0, abs=0.5)


def test_a_slow_replica_does_not_hold_the_others_up() -> None:
    """Rank 1, which the others call, does not step at all; they make 100 steps all the same."""
    world = World(3)
    zero, one, two = workers(world)
    for _ in range(100):
        assert zero.step(1.0)
        assert two.step(1.0)
    assert (zero.strategy.step, one.strategy.step) == (100, 0)
    assert zero.w == pytest.approx(1.0, abs=0.1)
    assert one.strategy._peer.tensors[0].item() == pytest.approx(1.0, abs=0.1)


def test_a_stop_is_heard_before_the_next_step() -> None:
    zero, one = workers(World(2))
    assert one.strategy.agree_to_stop(False) is False
    assert zero.step(1.0)
    assert one.strategy.agree_to_stop(True) is True
    assert not zero.step(1.0)


def test_who_left_is_not_called() -> None:
    """Ranks 1 and 3 are called; 3 leaves, so that all of rank 0's calls go to 1."""
    world = World(4)
    zero, one, _, three = workers(world, lr=0.0)
    roster = three.strategy._roster
    roster._state = 1  # it waits at the end for the others
    roster._write()
    set_to(three, 64.0)
    for _ in range(20):
        set_to(zero, 8.0)
        zero.step(0.0)
    assert three.strategy._peer.tensors[0].item() == 64.0
    assert one.strategy._peer.tensors[0].item() == pytest.approx(8.0, abs=0.01)


@pytest.mark.parametrize("late", [False, True])
def test_a_dead_replica_stops_nobody(late: bool) -> None:
    """Rank 1 dies in the middle of an exchange; the others go on, with 3, and end by themselves."""
    world = World(4, late=late)
    zero, one, two, three = alive = workers(world, lr=0.0)
    set_to(one, 1e6)
    world.dead.add(1)
    alive.remove(one)
    set_to(three, 3.0)
    for _ in range(30):
        for worker in alive:
            assert worker.step(0.0)
    assert max(abs(w.w) for w in alive) <= 3.0
    # 0 + 0 + 3, of which nothing went to rank 1
    assert sum(w.w for w in alive) == pytest.approx(3.0)

    def settle(link: Any) -> float | None:
        if link.rank == 1:
            return None
        worker = [zero, one, two, three][link.rank]
        worker.strategy.settle()
        return worker.w

    ended = world.run(settle)
    assert ended[1] is None
    assert [w for w in ended if w is not None] == pytest.approx([1.0] * 3, abs=0.01)


def test_saved_and_resumed() -> None:
    numbers = [float(i % 5) for i in range(8)]
    adam = partial(torch.optim.Adam, lr=0.1)

    def run(save_at: int | None) -> list[float]:
        seen = []
        with connect() as link:
            options: dict[str, Any] = {"console": False, "link": link}
            trainer = Trainer(Value(3.0), None, adam, strategy=Gossip(), **options)
            for i, x in enumerate(numbers):
                if i == save_at:
                    state = trainer.state_dict()
                    trainer = Trainer(Value(0.0), None, adam, strategy=Gossip(), **options)
                    trainer.load_state_dict(state)
                assert trainer.step(StepBatch([torch.tensor([x], dtype=torch.float64)], [1]))
                seen.append(trainer.model.w.item())
        return seen

    assert run(save_at=5) == run(save_at=None)


def test_a_second_run_goes_on_from_the_mean() -> None:
    """0 goes to 8 half way: 4; at the end both have (4 + 0)/2 = 2.

    Then 1 is set to 6: 0, at 2, meets it at 4; its gradient to 2 was 2 - 2 = 0.
    """
    world = World(2)
    pair = zero, one = workers(world)
    zero.step(8)
    world.run(lambda link: pair[link.rank].strategy.settle())
    assert (zero.w, one.w) == (2.0, 2.0)
    set_to(one, 6.0)
    zero.step(2)
    assert zero.w == 4.0


class FirstPiece(LocalGroup):
    """The group of a replica's pieces, of which the first one has said something already."""

    size = 2

    def __init__(self, going: bool, neighbour: int) -> None:
        self.said = torch.tensor([int(going), neighbour])

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        tensors[0].copy_(self.said)


def test_the_first_piece_of_a_replica_decides_for_all() -> None:
    """Rank 0 of 4 may call 1 or 3; whatever it draws, it calls 3, and ends when it is told."""
    world = World(4)
    world.links[0].pieces = FirstPiece(True, 3)  # type: ignore[assignment]
    zero, one, _, three = workers(world, lr=0.0)
    for worker in (one, three):
        set_to(worker, 4.0)
    for step in range(4):  # 3 and 0 come nearer: 2, then they are equal; 1 is never called
        assert zero.compute(0.0), step
        zero.update()
    assert (zero.w, one.w) == (2.0, 4.0)
    zero.strategy._pieces.said[0] = 0  # type: ignore[attr-defined]
    assert not zero.compute(0.0)
