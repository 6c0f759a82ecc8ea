"""Layers on a GPU: what is measured is what the CPU has, and no bit of the run changes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import LayerWatch, Trainer, connect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def trained(device: str, layers: list[LayerWatch]) -> str:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(64, 3)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    with (
        connect(device=device) as link,
        Trainer(model, F.cross_entropy, sgd, callbacks=layers, console=False, link=link) as trainer,
    ):
        trainer.fit(loader, max_steps=4)
        return trainer.replica.sha256()


def test_a_gpu_tells_what_the_cpu_tells() -> None:
    there, here = LayerWatch(every_steps=3), LayerWatch(every_steps=3)
    bits = trained("cuda", [there])
    trained("cpu", [here])
    assert bits == trained("cuda", [])
    assert there.rows.keys() == here.rows.keys()
    for name, row in here.rows.items():
        assert there.rows[name] == pytest.approx(row, rel=1e-3, abs=1e-5), name
