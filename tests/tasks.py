"""What fresh processes learn, without the import of scikit-learn: that takes 2 s of a core."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from scaledtrain.tasks import Task, accuracy


def signs() -> Task:
    """The signs of the sums of eight numbers."""
    x = torch.randn(1800, 8, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    train, test = (TensorDataset(x[part], y[part]) for part in (slice(1440), slice(1440, None)))
    sizes = {"in_features": 8, "n_classes": 2, "out_features": 2}
    return Task(train, test, metrics={"accuracy": accuracy}, sizes=sizes, gathers=True)


def signs_by_one_logit() -> Task:
    """The same, of a model whose one output is the logit of a positive sum."""
    return replace(
        signs(),
        loss_fn=_of_one_logit,
        metrics={},
        sizes={"in_features": 8, "out_features": 1},
    )


def _of_one_logit(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())
