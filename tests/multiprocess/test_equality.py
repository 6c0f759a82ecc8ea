"""Real processes compute what one process computes.

What holds for every strategy is in tests/contract.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, ParameterServer, StopAtTarget, Sync, Trainer, connect
from scaledtrain.connection import Transport
from scaledtrain.schedule import Slowdown
from scaledtrain.server import Synchronous
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
TRANSPORTS: list[Transport] = ["shared_memory", "torch"]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))


def data(n: int) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).long())


def flat(t: Trainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in t.model.parameters()])


def train_sync(link: Any, local_batch: int, accumulation: int, n: int = 70) -> tuple[int, Tensor]:
    loader = DataLoader(data(n), batch_size=local_batch, shuffle=True)
    t = Trainer(
        net(),
        F.cross_entropy,
        SGD,
        strategy=Sync(),
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        console=False,
        link=link,
    )
    result = t.fit(loader, max_epochs=3)
    return result.step, flat(t)


def one_process() -> Tensor:
    """70 samples in batches of 32: 32 + 32 + 6, three epochs."""
    model = net()
    optimizer = SGD(model.parameters())
    loader = DataLoader(data(70), batch_size=32, shuffle=True)
    for epoch in range(3):
        order: Any = loader.sampler
        order.generator = torch.Generator().manual_seed(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def sync_rank(transport: Transport) -> list[tuple[int, Tensor]]:
    with connect(transport=transport, timeout_seconds=30) as link:
        assert link.transport == transport
        n = link.group.size
        return [
            train_sync(link, local_batch=32 // n, accumulation=1),
            train_sync(link, local_batch=32 // n // 2, accumulation=2),
        ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_sync_equals_one_process_on_the_same_global_batch(ranks: int, transport: Transport) -> None:
    """With and without accumulation, clipped, momentum, an uneven last batch of 6.

    Tolerance: a mean of 32 losses in float32 is summed in another order, 2^-24 relative for each of
    about 5 additions; 9 steps with momentum add those up to well under 1e-5 for values of order 1.
    """
    expected = one_process()
    for per_rank in run_ranks(sync_rank, ranks, transport):
        for steps, parameters in per_rank:
            assert steps == 9
            torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-5)


class HalfUsed(nn.Module):
    """One parameter that every replica uses, one that only rank 1 does, one that none does."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.used, self.sometimes, self.unused = (nn.Parameter(torch.ones(1)) for _ in range(3))
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        return self.used.sum() + (self.sometimes.sum() if self.rank == 1 else 0.0)


def sync_everything_rank(transport: Transport) -> dict[str, Any]:
    """Replicas that start differently, share an evaluation, and stop together."""
    with connect(transport=transport, timeout_seconds=30) as link:
        torch.manual_seed(link.group.rank)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        t = Trainer(model, F.cross_entropy, SGD, console=False, link=link)
        started = flat(t)
        evaluation = t.evaluate(DataLoader(data(10), batch_size=3))
        alone = F.cross_entropy(model.eval()(data(10).tensors[0]), data(10).tensors[1]).item()

        class StopOnRankOne(Callback):
            def on_step_end(self, trainer: Trainer) -> None:
                if link.group.rank == 1 and trainer.step_count == 5:
                    trainer.stop()

        loader = DataLoader(data(40), batch_size=4)
        u = Trainer(
            net(), F.cross_entropy, SGD, callbacks=[StopOnRankOne()], log_every=4, console=False,
            link=link,
        )  # fmt: skip
        stopped = u.fit(loader, max_steps=1000)
        timed = u.fit(loader, max_seconds=0.2 if link.group.rank == 0 else 1000.0)
        v = Trainer(
            net(), F.cross_entropy, SGD, callbacks=[StopAtTarget("loss", at_most=0.4)],
            console=False, link=link,
        )  # fmt: skip
        target = v.fit(loader, max_steps=1000, eval=loader, eval_every=5)
        # A policy that waits for all, where one worker has more batches than the other (3 and 2).
        w = Trainer(
            net(), F.cross_entropy, SGD, strategy=ParameterServer(Synchronous()), console=False,
            link=link,
        )  # fmt: skip
        uneven = w.fit(DataLoader(data(20), batch_size=4), max_epochs=6)
        x = Trainer(
            HalfUsed(link.group.rank), None, partial(torch.optim.SGD, lr=0.1, weight_decay=1.0),
            callbacks=[Callback()] if link.group.rank == 0 else [], log_every=1, console=False,
            link=link,
        )  # fmt: skip
        x.fit([torch.zeros(1)] * 4, max_steps=1)
        t.fit(loader, max_steps=3)
        return {
            "uneven": uneven.step,
            "half_used": flat(x).tolist(),
            "buffers": t.model[1].running_mean.tolist(),
            "started": started,
            "evaluation": evaluation["loss"],
            "alone": alone,
            "stopped": (stopped.step, stopped.stopped_by),
            "timed": (timed.step, timed.stopped_by),
            "target": (target.step, target.evaluation["loss"]),
        }


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_replicas_start_evaluate_and_stop_together(transport: Transport) -> None:
    zero, one = run_ranks(sync_everything_rank, 2, transport)
    assert torch.equal(zero["started"], one["started"])
    # 10 samples in batches of 3, 3, 3, 1 on two ranks: the mean over samples, not over batches.
    assert zero["evaluation"] == one["evaluation"] == pytest.approx(zero["alone"], rel=1e-5)
    # Rank 1 asks at step 5; they agree at the next multiple of log_every.
    assert zero["stopped"] == (8, "another replica")
    assert one["stopped"] == (8, "callback")
    assert zero["timed"][0] == one["timed"][0] > 8
    assert (zero["timed"][1], one["timed"][1]) == ("max_seconds", "another replica")
    assert zero["target"] == one["target"]
    # 5 batches an epoch, 30 in six, which the two take in turns; the server waits for both.
    assert zero["uneven"] == one["uneven"] == 15
    # w - 0.1 (g + 1.0 w) with g the mean over ranks: 1 and 0.5; without any gradient w stays.
    assert zero["half_used"] == one["half_used"] == pytest.approx([0.8, 0.85, 1.0])
    assert zero["buffers"] == one["buffers"]
    assert zero["target"][1] <= 0.4
    assert zero["target"][0] % 5 == 0


class Pushes(Callback):
    """Collects the staleness of each of this worker's pushes."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.strategy.staleness is not None:
            self.seen.append(trainer.strategy.staleness)


def async_rank(transport: Transport) -> dict[str, Any]:
    with connect(transport=transport, timeout_seconds=30) as link:
        torch.manual_seed(link.group.rank)
        pushes = Pushes()
        t = Trainer(
            net(), F.cross_entropy, partial(torch.optim.SGD, lr=0.05),
            strategy=ParameterServer(), callbacks=[pushes], console=False, link=link,
        )  # fmt: skip
        loader = DataLoader(data(64), batch_size=4, shuffle=True)
        limited = t.fit(loader, max_steps=400)
        parameters = flat(t)
        loss = F.cross_entropy(t.model(data(64).tensors[0]), data(64).tensors[1]).item()
        u = Trainer(
            net(), F.cross_entropy, SGD, strategy=ParameterServer(), console=False, link=link
        )
        epochs = u.fit(DataLoader(data(70), batch_size=4), max_epochs=2)
        final = flat(u)

        class StopOnLast(Callback):
            def on_step_end(self, trainer: Trainer) -> None:
                if link.group.rank == link.group.size - 1:
                    trainer.stop()

        t.callbacks = [StopOnLast()]
        stopped = t.fit(loader, max_seconds=60)
        return {
            "limited": limited.step,
            "parameters": parameters,
            "loss": loss,
            "epochs": epochs.step,
            "final": final,
            "staleness": pushes.seen,
            "stopped": stopped.stopped_by,
        }


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_async_on_four_processes(transport: Transport) -> None:
    results = run_ranks(async_rank, 4, transport)
    for r in results:
        assert r["limited"] == 400  # exactly, though three more gradients were on their way
        assert torch.equal(r["parameters"], results[0]["parameters"])
        assert r["loss"] < 0.3  # ln 2 = 0.69 at the start
        # 70 samples are 18 batches, each used once an epoch, each an update: 2 * 18.
        assert r["epochs"] == 36
        assert torch.equal(r["final"], results[0]["final"])
    assert [r["stopped"] for r in results] == ["another replica"] * 3 + ["callback"]


def staleness_rank(updates: int) -> list[int]:
    with connect(timeout_seconds=30) as link:
        log = Pushes()
        t = Trainer(
            net(), F.cross_entropy, SGD, strategy=ParameterServer(), callbacks=[log],
            slowdown=Slowdown({}, min_compute_seconds=0.01), console=False, link=link,
        )  # fmt: skip
        t.fit(DataLoader(data(64), batch_size=4), max_steps=updates)
        return log.seen


@pytest.mark.alone
def test_mean_staleness_among_n_equal_workers_is_n_minus_1() -> None:
    """Measured when a push arrives: updates since the pull of the parameters it was computed with.

    An update of one worker lies inside at most one gradient computation of each other worker, so
    the mean over all pushes is at most n - 1, exactly. It is less only for updates that fall
    between a worker's push and its next pull (here small beside computing 10 ms) and at the two
    ends (the first gradients have staleness 0, 1, .. n - 1; the last are not looked at again).
    """
    n, updates = 4, 400
    seen = run_ranks(staleness_rank, n, updates)
    values = [s for one in seen for s in one]
    assert len(values) >= updates - n
    assert 0.85 * (n - 1) <= sum(values) / len(values) <= n - 1


def threads_after_closing() -> list[str]:
    link = connect(transport="torch", timeout_seconds=30)
    trainer = Trainer(net(), F.cross_entropy, SGD, console=False, link=link)
    trainer.fit(DataLoader(data(16), batch_size=4), max_steps=2)
    link.close()
    names = [task / "comm" for task in Path("/proc/self/task").iterdir()]
    return [name for file in names if "gloo" in (name := file.read_text().strip())]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_thread_of_gloo_outlives_the_connection() -> None:
    """One that frees a tensor while Python ends aborts the process; the trainer is still there."""
    assert run_ranks(threads_after_closing, 2) == [[], []]
