"""Asynchronous pipelines over real processes: by hand, and against gradients that are kept back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain.data.steps import StepBatch
from scaledtrain.parallel.pipeline import (
    PipeDreamSchedule,
)
from tests.pipelines import SGD, batch, join, parts, plain
from tests.ranks import run_ranks


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def by_hand() -> list[float]:
    """The loss is w1 w0 x, x = 1, the learning rate 1/2."""
    join()
    stage = Factor()
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.5)
    schedule = PipeDreamSchedule(
        "PipeDream", stage, 1, lambda y, _: y.mean(), dist.group.WORLD, timeout_seconds=10.0
    )
    values = []
    steps = [StepBatch([(torch.ones(1), torch.ones(1))], [1])] * 3
    for step in steps:
        optimizer.zero_grad()
        schedule.run(step)
        optimizer.step()
        values.append(stage.w.item())
    while schedule.pending:
        optimizer.zero_grad()
        schedule.run(StepBatch([], []))
        optimizer.step()
        values.append(stage.w.item())
    dist.destroy_process_group()
    return values


def test_pipedream_by_hand() -> None:
    first, second = run_ranks(by_hand, 2)
    # Stage 1 is never stale: its gradient is the w0 of the forward pass.
    #   1 - 1/2 x 1 = 0.5, 0.5 - 1/2 x 1 = 0 (w0 is 1 still), 0 - 1/2 x 0.5 = -0.25
    assert second == [0.5, 0.0, -0.25, -0.25]
    # Stage 0 gets, one step late, the w1 of batches 0, 1, 2: 1, 0.5, 0
    #   1, 1 - 1/2 x 1 = 0.5, 0.5 - 1/2 x 0.5 = 0.25, 0.25 - 0
    assert first == [1.0, 0.5, 0.25, 0.25]


def stream(m: int, n_steps: int) -> list[StepBatch]:
    """Steps of 4 m samples; the last but one has fewer, so that it has fewer microbatches."""
    sizes = [4 * m] * n_steps
    sizes[-2] = max(1, m - 1)
    return [batch(size, seed) for seed, size in enumerate(sizes)]


def asynchronous(name: Any, m: int, n_steps: int) -> Any:
    rank, n_ranks = join()
    stage = parts(n_ranks)[rank]
    optimizer = SGD(stage.parameters())
    schedule = PipeDreamSchedule(name, stage, m, F.cross_entropy, dist.group.WORLD)
    losses, weights, versions = [], [], []
    steps = stream(m, n_steps)
    while steps or schedule.pending:
        optimizer.zero_grad()
        computed = schedule.run(steps.pop(0) if steps else StepBatch([], []))
        versions.append(computed.samples)
        if computed.samples:
            losses.append(computed.loss.item())
        optimizer.step()
        weights.append([p.detach().clone() for p in stage.parameters()])
    dist.destroy_process_group()
    return losses, weights, versions, schedule.delay


def sequential(m: int, n_steps: int, late: list[int]) -> tuple[list[float], list[list[Any]]]:
    """One process: all gradients of a step at the weights of its beginning, applied late."""
    stages = parts(len(late))
    model = nn.Sequential(*stages)
    optimizers = [SGD(s.parameters()) for s in stages]
    old: list[list[Any]] = []  # step -> stage -> gradients
    losses, weights = [], []
    for step in [*stream(m, n_steps), *[None] * max(late)]:
        model.zero_grad()
        if step is not None:
            losses.append(plain(model, step, m).item())
        old.append([[p.grad for p in stage.parameters()] for stage in stages])
        for stage, optimizer, d in zip(stages, optimizers, late, strict=True):
            due = len(old) - 1 - d
            for i, p in enumerate(stage.parameters()):
                p.grad = old[due][stages.index(stage)][i] if due >= 0 else None
            optimizer.step()
        weights.append([[p.detach().clone() for p in s.parameters()] for s in stages])
    return losses, weights


@pytest.mark.parametrize(
    ("name", "m", "late"),
    [
        ("PipeDream", 1, [2, 1, 0]),
        ("PipeDream", 2, [1, 1, 0]),
        ("PipeDream-2BW", 3, [1, 1, 1]),
    ],
)
def test_asynchronous_pipelines_are_stale_as_they_say(name: str, m: int, late: list[int]) -> None:
    n_steps = 6
    losses, weights = sequential(m, n_steps, late)
    for rank, (got, stage_weights, samples, delay) in enumerate(
        run_ranks(asynchronous, 3, name, m, n_steps)
    ):
        assert delay == late[rank]
        assert got == losses
        # Nothing for the first `delay` steps, then every batch once.
        sizes = [s.samples for s in stream(m, n_steps)]
        assert samples == [0] * delay + sizes + [0] * (max(late) - delay)
        for of_step, expected in zip(stage_weights, weights, strict=True):
            for mine, theirs in zip(of_step, expected[rank], strict=True):
                assert torch.equal(mine, theirs)
