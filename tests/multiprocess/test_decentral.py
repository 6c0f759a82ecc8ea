"""Strategies without rounds among real processes: they train, end equal, and wait for nobody."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, Strategy, Trainer, connect
from scaledtrain.connection import Transport
from scaledtrain.schedule import Slowdown
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, Hogwild, PushSum
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.05)


def strategies() -> dict[str, Strategy]:
    return {
        "easgd": EASGD(sync_every=4),
        "async_local_sgd": AsyncLocalSGD(sync_every=4, proportional_steps=True),
        "hogwild": Hogwild(),
        "gossip": Gossip(),
        "push_sum": PushSum(),
        "push_sum_overlap": PushSum(overlap=True),
    }


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))


def data(n: int = 64) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).long())


def flat(t: Trainer) -> Tensor:
    state = [*t.model.parameters(), *t.model.buffers()]
    return torch.cat([s.detach().double().reshape(-1) for s in state])


class StopOnLast(Callback):
    """The last rank asks for the end after so many steps of its own."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_step_end(self, trainer: Trainer) -> None:
        self.left -= 1
        group = trainer.link.group
        if self.left == 0 and group.rank == group.size - 1:
            trainer.stop()


class Count(Callback):
    """Steps of this rank."""

    steps = 0

    def on_step_end(self, trainer: Trainer) -> None:
        self.steps += 1


def everything_rank(transport: Transport) -> dict[str, dict[str, Any]]:
    results = {}
    loader = DataLoader(data(), batch_size=4, shuffle=True)
    with connect(transport=transport, timeout_seconds=30) as link:
        for name, strategy in strategies().items():
            torch.manual_seed(link.group.rank)  # rank 0's values are everybody's
            options: dict[str, Any] = {"console": False, "link": link}
            t = Trainer(net(), F.cross_entropy, SGD, strategy=strategy, **options)
            everything = DataLoader(data(), batch_size=64)
            epochs = t.fit(loader, max_epochs=10, eval=everything)
            first = flat(t)
            again = t.evaluate(everything)["loss"]
            steps = t.fit(loader, max_steps=epochs.step + 20)
            second = flat(t)
            t.callbacks = [StopOnLast(after=10)]
            stopped = t.fit(loader, max_seconds=60)
            slowed = Trainer(
                net(), F.cross_entropy, SGD, strategy=strategies()[name], callbacks=[Count()],
                slowdown=Slowdown({1: 4.0}, min_compute_seconds=0.02), **options,
            )  # fmt: skip
            slowed.fit(loader, max_seconds=0.5)
            results[name] = {
                "loss": epochs.evaluation.get("loss"),
                "loss_at_the_end": again,
                "steps": (epochs.step, steps.step),
                "ended_by": (epochs.stopped_by, steps.stopped_by, stopped.stopped_by),
                "parameters": (first, second, flat(t)),
                "with_a_straggler": slowed.callbacks[0].steps,
            }
    return results


@pytest.mark.parametrize("transport", ["shared_memory", "torch"])
def test_all_train_end_equal_and_do_not_wait(transport: Transport) -> None:
    """64 samples are 16 batches, 160 in ten epochs: 54 steps of rank 0, 53 of the others.

    A rank counts its own steps, under Hogwild those of all: 160, and 180 or at most 2 more.

    Rank 1, where it is slowed, needs 80 ms for a step and the others 20. In lockstep all would make
    the same number of them; here it is nearly 4 times as many. At least 2 leaves room for a machine
    that does other things, too.
    """
    ranks = run_ranks(everything_rank, 3, transport, timeout_seconds=110)
    for name in strategies():
        results = [rank[name] for rank in ranks]
        assert results[0]["loss"] < 0.45, name  # ln 2 = 0.69 at the start
        assert results[0]["loss"] == results[0]["loss_at_the_end"], name
        for rank, r in enumerate(results):
            for got, want in zip(r["parameters"], results[0]["parameters"], strict=True):
                assert torch.equal(got, want), name
            if name == "hogwild":
                assert r["steps"][0] == 160
                assert 180 <= r["steps"][1] <= 182
            else:
                assert r["steps"] == ((54, 74) if rank == 0 else (53, 73)), name
        ended_by = [r["ended_by"] for r in results]
        mine, others = ("max_epochs", "max_steps", "callback"), "another replica"
        assert ended_by == [(*mine[:2], others), (*mine[:2], others), mine], name
        zero, one, two = (r["with_a_straggler"] for r in results)
        assert min(zero, two) >= 2 * one, (name, zero, one, two)


class Die(Callback):
    """Rank 1 is killed after so many steps."""

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.link.group.rank == 1 and trainer.step_count >= 30:
            os.kill(os.getpid(), signal.SIGKILL)


def dying_rank(name: str) -> tuple[str, bool]:
    link = connect(timeout_seconds=30)
    strategy = strategies()[name]
    t = Trainer(
        net(), F.cross_entropy, SGD, strategy=strategy, console=False, link=link, callbacks=[Die()]
    )
    result = t.fit(DataLoader(data(), batch_size=4), max_seconds=1.0)
    finite = bool(flat(t).isfinite().all())
    link.abandon()
    return result.stopped_by, finite


@pytest.mark.parametrize("name", ["hogwild", "gossip", "push_sum_overlap"])
def test_the_others_go_on_when_one_is_killed(name: str) -> None:
    """They end a second after they began: the first to see it says so to the other."""
    zero, one, two = run_ranks(dying_rank, 3, name, killed=[1])
    assert one is None
    for ended_by, finite in (zero, two):
        assert ended_by in ("max_seconds", "another replica")
        assert finite
