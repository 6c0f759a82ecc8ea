"""A strategy with a single replica is plain training."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.contract.cases import CASES, Case
from tests.contract.training import ADAMW, SGD, SaveAt, batches, data, flat, plain_training, trainer

every_strategy = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def plain(optimizer: Any, accumulation: int, clip: float | None) -> Tensor:
    return plain_training(batches(16), optimizer, epochs=8, accumulation=accumulation, clip=clip)


@every_strategy
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_is_plain_training(case: Case, optimizer: Any) -> None:
    """With 4 batches the factors are 1/4: powers of two, so no rounding differs."""
    loader = batches(16)
    for accumulation, clip in [(1, None), (1, 0.1), (4, None)]:
        t = trainer(
            optimizer=optimizer,
            strategy=case.make(1),
            gradient_accumulation_steps=accumulation,
            max_grad_norm=clip,
        )
        assert t.fit(loader, max_epochs=8).step == 32 // accumulation
        expected = plain(optimizer, accumulation, clip)
        if case.tolerance is None:
            assert not torch.allclose(flat(t.model), expected, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(
                flat(t.model), expected, rtol=case.tolerance, atol=case.tolerance
            )


@every_strategy
def test_schedule_advances_once_per_update(case: Case) -> None:
    """20 samples in 5 batches, accumulation 2: 3 updates an epoch; lr 1 -> 0.5^3."""
    t = trainer(
        strategy=case.make(1),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        gradient_accumulation_steps=2,
    )
    t.fit(batches(20), max_epochs=1)
    assert t.step_count == 3
    assert t.strategy.learning_rate == 0.125


@every_strategy
def test_saved_inside_a_run_and_resumed_is_not_stopping(case: Case) -> None:
    """The run goes on after saving, which must not change what was saved."""
    save = SaveAt(7)  # 5 steps are an epoch: in the middle of the second
    straight = trainer(strategy=case.make(1), optimizer=ADAMW, callbacks=[save])
    resumed = trainer(strategy=case.make(1), optimizer=ADAMW)
    loader = DataLoader(data(20), batch_size=4, shuffle=True)
    straight.fit(loader, max_epochs=4)
    resumed.load_state_dict(save.state)
    assert resumed.fit(loader, max_epochs=4).step == 20
    assert torch.equal(flat(resumed.model), flat(straight.model))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.tolerance == 0.0], ids=lambda case: case.name
)
def test_saved_between_fits_and_resumed_is_not_stopping(case: Case) -> None:
    """Where the end of a fit changes nothing on one replica."""
    straight, first, resumed = (trainer(strategy=case.make(1), optimizer=ADAMW) for _ in range(3))
    loader = DataLoader(data(20), batch_size=4, shuffle=True)
    straight.fit(loader, max_epochs=4)
    first.fit(loader, max_steps=7)
    state = first.state_dict()
    first.fit(loader, max_steps=9)
    resumed.load_state_dict(state)
    assert resumed.step_count == 7
    assert resumed.fit(loader, max_epochs=4).step == 20
    assert torch.equal(flat(resumed.model), flat(straight.model))
