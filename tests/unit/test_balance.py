"""Balance in whole runs: equal to one process, and quick where ranks are unequal; virtual time."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, LocalSGD, ParameterServer, Strategy, Sync, Trainer, simulate
from scaledtrain.balance import Auto, Balance, Even, Fixed
from scaledtrain.balance.agree import OnBoard
from scaledtrain.balance.shares import Cost
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.schedule import Slowdown
from scaledtrain.server import Synchronous
from scaledtrain.sim import Cluster, Constant, SlowWorkers, Topology, Wire
from scaledtrain.strategies import AsyncLocalSGD, DiLoCo
from tests.worlds import World, WorldBoard, WorldLink

HOST = Topology(ranks_per_host=8, hosts=1, port=Wire(0.0, float("inf")))
FAST = Auto(every=4, measured=2)
SGD = partial(torch.optim.SGD, lr=0.1)


def data(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*(torch.randn(n, k, generator=generator) for k in (3, 1)))


class Ran(NamedTuple):
    weight: Tensor
    shares: list[int] | None
    state: dict[str, Any]
    lines: list[str]


def train(
    strategy: Callable[[], Strategy],
    balance: Balance | None,
    link: Link | None = None,
    *,
    local_batch: int = 4,
    max_steps: int = 14,
    state: dict[str, Any] | None = None,
    samples: int = 160,
    callbacks: Any = (),
    **options: Any,
) -> Ran:
    """On steps of 16 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with Trainer(
        model, nn.functional.mse_loss, SGD, strategy=strategy(), balance=balance,
        callbacks=callbacks, console=False, link=link, **options,
    ) as trainer:  # fmt: skip
        lines: list[str] = []
        if trainer.balancer is not None:
            trainer.balancer._say = lines.append
        if state is not None:
            trainer.load_state_dict(state)
        loader = DataLoader(data(samples), batch_size=local_batch, shuffle=True)
        trainer.fit(loader, max_steps=max_steps)
        shares = None if trainer.balancer is None else list(trainer.balancer.shares or [])
        weight = torch.cat([p.detach().flatten() for p in model.parameters()])
        return Ran(weight, shares, trainer.state_dict(), lines)


def cluster(slow: dict[int, float] | None = None) -> Cluster:
    return Cluster(Constant(1.0), HOST, SlowWorkers(slow or {}))


def on_four(
    strategy: Callable[[], Strategy],
    balance: Balance | None,
    slow: dict[int, float] | None = None,
    **options: Any,
) -> tuple[list[Ran], float]:
    def program(link: Link) -> Ran:
        return train(strategy, balance, link, **options)

    ran = simulate(program, cluster(slow), 4)
    return [result for result in ran.results if result is not None], ran.seconds


SERVER = partial(ParameterServer, Synchronous())


@pytest.mark.parametrize("balance", [Fixed([1, 2, 3, 1]), FAST], ids=["fixed", "auto"])
@pytest.mark.parametrize("strategy", [Sync, SERVER, partial(LocalSGD, 1)], ids=str)
def test_the_result_is_that_of_one_process(
    strategy: Callable[[], Strategy], balance: Balance
) -> None:
    """On the same global batches, whatever the split; also where an epoch ends, with 8 of 56."""
    alone = train(Sync, None, local_batch=16, samples=56)
    ran, _ = on_four(strategy, balance, slow={3: 4.0}, samples=56)
    for rank in ran:
        torch.testing.assert_close(rank.weight, alone.weight, rtol=1e-5, atol=1e-6)
        assert rank.shares == ran[0].shares
    assert ran[0].shares == ([2, 5, 7, 2] if isinstance(balance, Fixed) else [5, 5, 5, 1])


def test_accumulation_too() -> None:
    alone = train(Sync, None, local_batch=16)
    options = {"local_batch": 2, "gradient_accumulation_steps": 2}
    ran, _ = on_four(Sync, Fixed([1, 2, 3, 1]), **options)
    torch.testing.assert_close(ran[2].weight, alone.weight, rtol=1e-5, atol=1e-6)


class Grows(Callback):
    """From the sixth step on, two steps are one."""

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step_count == 5:
            trainer.batch_multiple = 2


def test_in_steps_that_grow_too() -> None:
    """5, 5, 5 and 1 of 16 samples are 10, 10, 10 and 2 of 32, in 2.5 s: 10, 10, 9, 3 take 3."""
    options = {"samples": 56, "callbacks": [Grows()]}
    alone = train(Sync, None, local_batch=16, **options)
    ran, _ = on_four(Sync, FAST, slow={3: 4.0}, **options)
    for rank in ran:
        torch.testing.assert_close(rank.weight, alone.weight, rtol=1e-5, atol=1e-6)
        assert rank.shares == [10, 10, 10, 2]
    assert len(ran[0].lines) == 1


def test_elastic_runs_balance_too() -> None:
    """3 batches of 4 samples in a step, on 4 replicas, on 2, and on one."""
    options = {"batches_per_step": 3, "samples": 60}
    alone = train(Sync, None, **options)

    def program(link: Link, **more: Any) -> Ran:
        return train(Sync, FAST, link, **options, **more)

    four = simulate(partial(program, max_steps=7), cluster({3: 4.0}), 4).results[0]
    assert four is not None
    assert four.shares == [4, 4, 3, 1]
    two = simulate(partial(program, state=four.state), cluster({1: 2.0}), 2).results
    for rank in two:
        assert rank is not None
        assert rank.shares == [8, 4]  # rates 2 : 1
        torch.testing.assert_close(rank.weight, alone.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", [partial(LocalSGD, 3), partial(DiLoCo, 3)], ids=["l", "d"])
def test_periods_count_by_their_samples(strategy: Callable[[], Strategy]) -> None:
    """Three local steps of each replica on its own parts, then the mean, weighted 2:5:7:2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    begin = [p.detach().clone() for p in model.parameters()]
    order = list(DataLoader(data(160), batch_size=16, sampler=order_of_epoch(0)))
    mean = [torch.zeros_like(p) for p in begin]
    bounds = [0, 2, 7, 14, 16]
    for low, high in pairwise(bounds):
        mine = copy.deepcopy(model)
        for x, y in order[:3]:
            loss = nn.functional.mse_loss(mine(x[low:high]), y[low:high])
            grads = torch.autograd.grad(loss, list(mine.parameters()))
            with torch.no_grad():
                for p, g in zip(mine.parameters(), grads, strict=True):
                    p -= 0.1 * g
        for m, p in zip(mean, mine.parameters(), strict=True):
            m += p.detach() * (high - low) / 16
    if strategy.func is DiLoCo:  # type: ignore[attr-defined]
        # SGD with learning rate 0.7 and Nesterov momentum 0.9, of the first step: 0.7 * 1.9.
        mean = [b + 0.7 * 1.9 * (m - b) for b, m in zip(begin, mean, strict=True)]
    ran, _ = on_four(strategy, Fixed([1, 2, 3, 1]), max_steps=3)
    expected = torch.cat([m.flatten() for m in mean])
    torch.testing.assert_close(ran[0].weight, expected, rtol=1e-5, atol=1e-6)


def order_of_epoch(epoch: int) -> list[int]:
    from scaledtrain.data.map_style import SamplerOrder

    loader = DataLoader(data(160), batch_size=16, shuffle=True)
    return [i for batch in SamplerOrder.of(loader, seed=0).epoch(epoch) for i in batch]


def test_an_asynchronous_push_counts_by_its_samples() -> None:
    """With 2 and 6 samples of 8: pushes count 1/2 and 3/2, so both together are the sum."""
    pushed: list[tuple[int, float]] = []

    class Watch(Callback):
        def on_gradients(self, trainer: Trainer) -> None:
            gradient = trainer.replica.parameters[0].grad
            assert gradient is not None
            pushed.append((trainer.link.group.rank, gradient.item()))

    def program(link: Link) -> None:
        model = nn.Linear(1, 1, bias=False)
        loader = DataLoader(TensorDataset(torch.ones(32, 1), torch.ones(32, 1)), batch_size=4)
        trainer = Trainer(
            model, lambda out, y: (out * y).mean(), SGD, strategy=ParameterServer(),
            balance=Fixed([1, 3]), callbacks=[Watch()], console=False, link=link,
        )  # fmt: skip
        trainer.fit(loader, max_steps=4)

    simulate(program, cluster(), 2)
    assert set(pushed) == {(0, 0.5), (1, 1.5)}  # the gradient of a mean is 1


def test_auto_is_as_quick_as_the_ranks_are_together() -> None:
    """Ranks of 4, 4, 4 and 1 samples a second: 64 samples take 64 / 13 = 4.92 s, in whole ones 5.

    Even shares, of 16, take the slow one 16 s.
    """

    def took(balance: Balance | None, steps: int) -> float:
        def program(link: Link) -> None:
            model = nn.Linear(3, 1)
            many = DataLoader(data(640), batch_size=16, shuffle=True)
            with Trainer(
                model, nn.functional.mse_loss, SGD, balance=balance, console=False, link=link
            ) as trainer:
                trainer.fit(many, max_steps=steps)

        return simulate(program, Cluster(Constant(4.0), HOST, SlowWorkers({3: 4.0})), 4).seconds

    assert took(Even(), 10) == 160.0
    assert took(Fixed([1, 1, 1, 0.25]), 10) == pytest.approx(50.0)
    assert took(FAST, 24) - took(FAST, 14) == pytest.approx(10 * 5.0)


class Reports(Callback):
    """Something that rank 0 does after every step, for three quarters of a second."""

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.link.group.rank == 0:
            trainer.link.clock.sleep_until(trainer.link.clock.now() + 0.75)


@pytest.mark.parametrize("strategy", [Sync, SERVER, partial(LocalSGD, 1)], ids=str)
def test_a_rank_with_other_work_gets_relief_without_being_told(
    strategy: Callable[[], Strategy],
) -> None:
    """A sample takes 1/4 s; 16 take 1.25 s if the first has 2 (0.5 + 0.75 s) and another one 5."""
    ran, _ = on_four(strategy, FAST, callbacks=[Reports()])
    assert ran[0].shares == [2, 5, 5, 4]


def test_a_rank_slowed_while_it_serves_gets_less() -> None:
    """Serving takes a third of rank 0's time, so that it computes at 2/3 of the others' speed."""
    ran, _ = on_four(SERVER, FAST, slow={0: 1.5})
    assert ran[0].shares == [3, 5, 4, 4]


def test_decisions_are_rare_told_and_repeat_exactly() -> None:
    first, seconds = on_four(Sync, FAST, slow={3: 4.0})
    again, seconds_again = on_four(Sync, FAST, slow={3: 4.0})
    assert seconds == seconds_again
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(first, again, strict=True))
    # Rates 4, 4, 4, 1: best is (5, 5, 5, 1), at 1.25 s; of the 0.75 of the way that are gone,
    # (4.75, 4.75, 4.75, 1.75), the first three are rounded up. Nothing more is to be won then.
    assert first[0].lines == [
        "step 4: samples of the replicas are now 5, 5, 5, 1; a step takes 1.25 s instead of 4 s by "
        "what was measured"
    ]


@pytest.mark.parametrize("stopped_at", [3, 4, 7])
def test_resumed_it_is_as_if_it_had_not_stopped(stopped_at: int) -> None:
    """Also inside the steps that are measured, and where a decision has just been made."""
    whole, _ = on_four(Sync, FAST, slow={3: 4.0})
    half, _ = on_four(Sync, FAST, slow={3: 4.0}, max_steps=stopped_at)

    def program(link: Link) -> Ran:
        return train(Sync, FAST, link, state=half[link.group.rank].state)

    resumed = simulate(program, cluster({3: 4.0}), 4).results
    for a, b in zip(whole, resumed, strict=True):
        assert b is not None
        assert torch.equal(a.weight, b.weight)
        assert a.shares == b.shares
        assert a.state["balance"] == b.state["balance"]


def test_on_another_number_of_replicas_shares_begin_even() -> None:
    state = on_four(Sync, FAST, slow={3: 4.0})[0][0].state

    def program(link: Link) -> Ran:
        return train(Sync, FAST, link, state=state, max_steps=15, local_batch=8)

    ran = simulate(program, cluster(), 2).results[0]
    assert ran is not None
    assert ran.shares == [8, 8]


def test_a_replica_that_ends_or_dies_is_not_waited_for() -> None:
    """On a server, where replicas end one by one: the others keep their shares."""

    class Stop(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.link.group.rank == 1 and trainer.step_count == 3:
                trainer.stop()

    ran, _ = on_four(SERVER, FAST, slow={3: 4.0}, callbacks=[Stop()])
    assert ran[0].shares == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("strategy", "balance", "why"),
    [
        (ParameterServer, Auto(), "do not wait for each other: a fast one makes more steps"),
        (partial(AsyncLocalSGD, 4), Auto(), "do not wait for each other"),
        (Sync, Fixed([1, 2]), "2 numbers .* but there are 4 replicas"),
    ],
)
def test_what_cannot_be_is_refused(
    strategy: Callable[[], Strategy], balance: Balance, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        on_four(strategy, balance)


def test_one_process_needs_no_balance() -> None:
    plain, balanced = train(Sync, None), train(Sync, Auto())
    assert torch.equal(plain.weight, balanced.weight)
    with pytest.raises(ConfigError, match="but there are 1 replicas"):
        train(Sync, Fixed([1, 2]))


def test_a_handicap_is_in_proportion_to_the_samples() -> None:
    """min_compute_seconds is of an even share, 4 samples: 1 s on a rank with 2, 3 s with 6."""

    def program(link: Link) -> float:
        train(
            Sync, Fixed([2, 6, 4, 4]), link, max_steps=3,
            slowdown=Slowdown({}, min_compute_seconds=2.0),
        )  # fmt: skip
        return link.clock.now()

    tiny = Cluster(Constant(1e-9), HOST)
    assert simulate(program, tiny, 4).seconds == pytest.approx(3 * 3.0)


@pytest.mark.parametrize("balance", [Even(), Fixed([1, 2, 3, 1])], ids=["even", "fixed"])
def test_masked_tokens_count_one_by_one(balance: Balance) -> None:
    """Sequences with 1 to 5 targets each, the loss the mean over them: as one process has it."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(48, 5, 3, generator=generator)
    targets = torch.randint(4, (48, 5), generator=generator)
    for i in range(48):
        targets[i, 1 + i % 5 :] = -100

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def run(link: Link | None, local: int, **options: Any) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        with Trainer(
            model, loss, SGD, loss_weight=lambda batch: (batch[1] != -100).sum().item(),
            console=False, link=link, **options,
        ) as trainer:  # fmt: skip
            loader = DataLoader(TensorDataset(inputs, targets), batch_size=local, shuffle=True)
            trainer.fit(loader, max_steps=5)
            return model.weight.detach(), trainer.evaluate(loader)["loss"]

    expected, loss_then = run(None, 16)
    ran = simulate(lambda link: run(link, 4, balance=balance), cluster(), 4).results[2]
    assert ran is not None
    torch.testing.assert_close(ran[0], expected, rtol=1e-5, atol=1e-6)
    assert ran[1] == pytest.approx(loss_then, rel=1e-5)


def test_the_rate_is_that_of_all_replicas(tmp_path: Path) -> None:
    """Shares of 2, 2, 4 and 8 of 16 take 0.5, 0.5, 1 and 2 s."""
    on_four(Sync, Fixed([1, 1, 2, 4]), run_dir=tmp_path, log_every=100)
    for rank, share in enumerate([2, 2, 4, 8]):
        lines = (tmp_path / f"metrics-rank{rank}.jsonl").read_text("utf-8").splitlines()
        record = json.loads(lines[-1])
        assert record["samples_per_second"] == pytest.approx(16 / 2.0)
        assert record["samples"] == 14 * share


def test_a_board_carries_costs_and_says_who_has_left() -> None:
    """In words of 53 bits, to 0.01 %: the same numbers for both; a rank that is gone ends it."""
    world = World(2)

    def ask(link: WorldLink) -> list[Any]:
        board = link.board()
        agree = OnBoard(board)
        agree.start()
        mine = [Cost(0.0, 1e-6), Cost(123.0, 0.25)][link.rank]
        first = agree(1, mine)
        world.exchange(link.rank, None)  # as in a run, where a step of all lies between
        nothing = agree(2, mine if link.rank == 0 else None)  # the other measured nothing
        world.exchange(link.rank, None)
        if link.rank == 1:
            agree.end()
            return [first, nothing]
        return [first, nothing, agree(3, mine)]

    there, gone = world.run(ask)
    assert there[0] == gone[0]
    costs = [x for cost in there[0] for x in cost]
    assert costs == pytest.approx([0.0, 1e-6, 123.0, 0.25], rel=1e-4)
    assert there[1:] == [None, None]
    assert gone[1] is None
    world.dead.add(1)
    agree = OnBoard(WorldBoard(world, 0, [0, 0], threading.Condition()))
    assert agree(4, Cost(0.0, 1.0)) is None


class Words:
    """A board on which others act while its rank waits."""

    def __init__(self, rank: int, words: list[int], meanwhile: Callable[[], object]) -> None:
        self._rank = rank
        self._words = words
        self._meanwhile = meanwhile

    def write(self, word: int) -> None:
        assert 0 <= word < 2**53
        self._words[self._rank] = word

    def read(self) -> Sequence[int]:
        return self._words

    def wait(self, until: Callable[[Sequence[int]], bool], doing: str) -> None:
        self._meanwhile()
        assert until(self._words)

    def close(self) -> None:
        pass


def test_who_leaves_after_a_decision_has_made_it_with_all() -> None:
    """Rank 0 decides and has made its last step before rank 1 looks: both have the same costs."""
    words, told = [0, 0], []

    def decide_and_end() -> None:
        if not told:
            told.append(first(2**16 - 1, Cost(0.5, 0.25)))
            first.end()

    first = OnBoard(Words(0, words, lambda: None))
    second = OnBoard(Words(1, words, decide_and_end))
    for each in (first, second):
        each.start()
    costs = second(2**16 - 1, Cost(0.125, 1.0))
    assert costs == told[0] == [Cost(0.5, 0.25), Cost(0.125, 1.0)]  # powers of 2 are exact
    assert second(2**16, Cost(0.125, 1.0)) is None
