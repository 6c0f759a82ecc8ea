"""Faults happen where they were asked for, and nowhere else."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from scaledtrain import Callback, ParameterServer, Strategy, Trainer
from scaledtrain.errors import ConfigError
from scaledtrain.faults import FaultInjector

BATCHES = [(torch.ones(4, 2), torch.ones(4, 1))] * 2


class Finite(Callback):
    """After which steps all parameters were finite."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, trainer: Trainer) -> None:
        self.seen.append(all(bool(p.isfinite().all()) for p in trainer.model.parameters()))


def trainer(*callbacks: Callback, strategy: Strategy | None = None) -> Trainer:
    return Trainer(
        torch.nn.Linear(2, 1),
        F.mse_loss,
        partial(torch.optim.SGD, lr=0.1),
        strategy=strategy,
        callbacks=callbacks,
        console=False,
    )


def test_an_error_ends_the_run_before_the_update_and_once() -> None:
    t = trainer(FaultInjector().raise_at(0, 3))
    with pytest.raises(RuntimeError, match="fault injected on rank 0 at its step 3"):
        t.fit(BATCHES, max_steps=10)
    assert t.step_count == 2
    assert t.fit(BATCHES, max_steps=10).step == 10
    t = trainer(FaultInjector().raise_at(0, 1, MemoryError("no memory")))
    with pytest.raises(MemoryError, match="no memory"):
        t.fit(BATCHES, max_steps=10)


def test_nan_reaches_the_parameters_in_that_step() -> None:
    finite = Finite()
    trainer(FaultInjector().nan_at(0, 3), finite).fit(BATCHES, max_steps=3)
    assert finite.seen == [True, True, False]


def test_a_server_refuses_nan() -> None:
    finite = Finite()
    t = trainer(FaultInjector().nan_at(0, 3), finite, strategy=ParameterServer())
    assert t.fit(BATCHES, max_steps=4).step == 4
    assert finite.seen == [True] * 5  # one step more: the third made no update


def test_stalls_are_slept_in_the_order_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    faults = FaultInjector().stall_at(0, 2, seconds=30.0).stall_at(0, 2, seconds=5.0)
    t = trainer(faults.raise_at(0, 2))
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(RuntimeError, match="at its step 2"):
        t.fit(BATCHES, max_steps=3)
    assert slept == [30.0, 5.0]


def test_faults_that_would_never_happen_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank 0 at step 0 would never happen"):
        FaultInjector().fail_at(0, 0)
    with pytest.raises(ConfigError, match="rank -1"):
        FaultInjector().nan_at(-1, 1)
    with pytest.raises(ConfigError, match="seconds is > 0"):
        FaultInjector().stall_at(0, 1, seconds=0.0)
    with pytest.raises(ConfigError, match=r"the job has 1 rank, from 0 to 0"):
        trainer(FaultInjector().fail_at(1, 5)).fit(BATCHES, max_steps=1)
