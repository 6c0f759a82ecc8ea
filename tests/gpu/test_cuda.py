"""On a GPU: the same numbers as on the CPU, up to the rounding of other kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import DiLoCo, LocalSGD, ParameterServer, Strategy, Sync, Trainer, connect
from scaledtrain.comm.compress import BF16, PowerSGD
from scaledtrain.server import AdaptiveDelayCompensated
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, PushSum, SlowMo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(device: str, strategy: Strategy) -> Tensor:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 3)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True)
    with connect(device=device) as link:
        trainer = Trainer(
            model,
            F.cross_entropy,
            partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            strategy=strategy,
            max_grad_norm=1.0,
            trace=True,
            console=False,
            link=link,
        )
        result = trainer.fit(loader, max_epochs=3, eval=loader)
        assert next(model.parameters()).device.type == device
        assert result.evaluation["loss"] > 0
    return torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    "strategy",
    [
        Sync,
        partial(Sync, compression=PowerSGD(rank=1)),
        ParameterServer,
        partial(ParameterServer, overlap=True),  # over a wire, from and to memory of the CPU
        partial(ParameterServer, correction=AdaptiveDelayCompensated(), compression=BF16()),
        partial(LocalSGD, 4),
        partial(SlowMo, 4),
        partial(DiLoCo, 4),
        partial(AsyncLocalSGD, 4),
        partial(EASGD, 4),
        Gossip,
        PushSum,
    ],
)
def test_cuda_equals_cpu(strategy: Callable[[], Strategy]) -> None:
    """24 steps in float32; TF32 is off by default, so only the order of sums differs."""
    torch.testing.assert_close(
        train("cuda", strategy()), train("cpu", strategy()), rtol=1e-4, atol=1e-5
    )
