"""What the strategies without rounds have in common, through the Trainer on one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import Callback, Strategy, Trainer
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, Hogwild, PushSum

ALL: list[Callable[[], Strategy]] = [
    EASGD,
    AsyncLocalSGD,
    Hogwild,
    Gossip,
    PushSum,
    partial(PushSum, overlap=True),
]
PLAIN_ALONE = ALL[2:]  # those that are plain training on one replica
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def batches() -> list[Any]:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
    return list(zip(x.split(4), (x.sum(1) > 0).long().split(4), strict=True))


def trainer(strategy: Strategy, model: nn.Module | None = None, **options: Any) -> Trainer:
    options = {"optimizer": SGD, "loss_fn": F.cross_entropy, "console": False, **options}
    return Trainer(model or net(), strategy=strategy, **options)


def parameters(t: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in t.model.parameters()]


@pytest.mark.parametrize("strategy", PLAIN_ALONE)
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_one_replica_is_plain_training_bit_for_bit(
    strategy: Callable[[], Strategy], optimizer: Any
) -> None:
    t = trainer(strategy(), optimizer=optimizer, max_grad_norm=0.5)
    assert t.fit(batches(), max_epochs=2).step == 10
    model = net()
    plain = optimizer(model.parameters())
    for x, y in batches() * 2:
        plain.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        plain.step()
    for got, want in zip(t.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("strategy", ALL)
def test_saved_by_the_trainer_and_resumed(strategy: Callable[[], Strategy]) -> None:
    """In the middle of an epoch, by a callback: the state of a run that goes on meanwhile."""

    class Save(Callback):
        state: Any = None

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step_count == 7:
                # The step that just ended is not yet counted as one of the epoch.
                self.state = {**trainer.state_dict(), "steps_in_epoch": 2}

    save = Save()
    whole = trainer(strategy(), callbacks=[save], optimizer=ADAMW)
    whole.fit(batches(), max_steps=12)
    resumed = trainer(strategy(), optimizer=ADAMW)
    resumed.load_state_dict(save.state)
    assert resumed.step_count == 7
    assert resumed.fit(batches(), max_steps=12).step == 12
    for got, want in zip(parameters(resumed), parameters(whole), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("strategy", ALL)
def test_limits_and_schedule(strategy: Callable[[], Strategy]) -> None:
    """5 batches are an epoch; lr 1 -> 0.5^5 after it, one advance for each step."""
    t = trainer(
        strategy(),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    )
    assert t.fit(batches(), max_epochs=1).stopped_by == "max_epochs"
    assert (t.step_count, t.strategy.learning_rate) == (5, 0.5**5)
    result = t.fit(batches(), max_steps=7)
    assert (result.step, result.stopped_by) == (7, "max_steps")
    assert t.fit(batches(), max_seconds=0.02).stopped_by == "max_seconds"


@pytest.mark.parametrize("strategy", ALL)
def test_a_skipped_update_is_a_step(strategy: Callable[[], Strategy]) -> None:
    """As after an overflow: no update of the parameters, but every clock goes on."""
    t = trainer(strategy())
    t.strategy.start(3)
    before = parameters(t)
    for _ in range(3):
        assert t.strategy.before_forward()
        t.replica.zero_grad()
        x, y = batches()[0]
        F.cross_entropy(t.model(x), y).backward()
        t.strategy.reduce_gradients()
        t.strategy.after_step()
    assert not t.strategy.before_forward()
    t.strategy.settle()
    assert t.strategy.step == 3
    for got, want in zip(parameters(t), before, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strategy", ALL)
def test_buffers_and_unused_parameters(strategy: Callable[[], Strategy]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.unused = nn.Parameter(torch.ones(2))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.frozen

    t = trainer(strategy(), Net())
    t.fit(batches(), max_epochs=2, eval=batches())
    assert torch.equal(t.model.unused, torch.ones(2))  # no gradient: no weight decay either
    assert torch.equal(t.model.frozen, torch.ones(2))
    assert t.model.body[1].num_batches_tracked.item() == 10
