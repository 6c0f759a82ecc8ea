"""A small training that is saved, for tests of what is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Checkpointing, Trainer
from scaledtrain.checkpoint.folder import saved_steps

ADAMW = partial(torch.optim.AdamW, lr=0.1)


def data() -> TensorDataset:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, shuffle=True)


def trainer(
    run_dir: Path,
    saved: Checkpointing | None = None,
    first: type[nn.Linear] = nn.Linear,
    **options: Any,
) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(first(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    return Trainer(
        model,
        F.mse_loss,
        ADAMW,
        console=False,
        run_dir=run_dir,
        checkpointing=saved or Checkpointing(every_steps=5),
        **options,
    )


def fit(run_dir: Path, max_steps: int = 12, **options: Any) -> str:
    """Of the parameters at the end."""
    with trainer(run_dir, **options) as one:
        one.fit(loader(), max_steps=max_steps)
        return one.replica.sha256()


def steps(run_dir: Path) -> list[int]:
    return [saved.step for saved in saved_steps(run_dir / "checkpoints")]
