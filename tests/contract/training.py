"""The small problem on which strategies are compared, and plain training on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, Trainer

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)

Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(1)
    # No bias before the normalisation: its gradient is rounding, which Adam would make large.
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def data(n: int) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).long())


def batches(n: int, size: int = 4) -> list[Batch]:
    """``n`` samples in batches of ``size``; the last one may be smaller."""
    return [(x, y) for x, y in DataLoader(data(n), batch_size=size)]


def trainer(**options: Any) -> Trainer:
    return Trainer(net(), F.cross_entropy, **{"optimizer": SGD, "console": False, **options})


def flat(model: nn.Module) -> Tensor:
    """All parameters and buffers as one vector."""
    return torch.cat([t.detach().double().reshape(-1) for t in model.state_dict().values()])


def plain_training(
    batches: Sequence[Batch],
    make_optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    *,
    epochs: int = 1,
    accumulation: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """What a user would write; accumulation divides each loss by the number of batches."""
    model = net()
    optimizer = make_optimizer(model.parameters())
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss / accumulation).backward()
            if (i + 1) % accumulation == 0:
                scaler.unscale_(optimizer)
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return flat(model)


class SaveAt(Callback):
    """Takes the Trainer's state after one of its own steps, while the run goes on."""

    def __init__(self, step: int) -> None:
        self._left = step
        self.state: dict[str, Any] = {}

    def on_step_end(self, trainer: Trainer) -> None:
        self._left -= 1
        if self._left == 0:
            self.state = trainer.state_dict()
