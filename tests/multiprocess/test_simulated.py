"""What is deterministic has the same bits on simulated ranks and on real processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import DiLoCo, LocalSGD, Strategy, Sync, Trainer, connect
from scaledtrain.comm.compress import PowerSGD, TopK
from scaledtrain.comm.protocols import Link
from scaledtrain.connection import Transport
from scaledtrain.sim import Cluster, Gamma, Nic, Topology, Wire, simulate
from scaledtrain.strategies import SlowMo
from tests.ranks import run_ranks

RANKS = 3  # of which a sum has an order
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)

CASES: dict[str, tuple[Callable[[], Strategy], Any, int]] = {
    "sync": (lambda: Sync(), SGD, 1),
    "sync_accumulation_adamw": (lambda: Sync(), ADAMW, 2),
    "sync_overlap": (lambda: Sync(overlap=True, bucket_bytes=128), SGD, 1),
    "sync_power_sgd": (lambda: Sync(compression=PowerSGD(rank=1)), SGD, 1),
    "sync_top_k": (lambda: Sync(compression=TopK(0.25)), SGD, 1),
    "local_sgd": (lambda: LocalSGD(4), SGD, 1),
    "slow_mo": (lambda: SlowMo(4), SGD, 1),
    "diloco": (lambda: DiLoCo(4), ADAMW, 1),
    "diloco_streaming": (lambda: DiLoCo(4, fragments=2, overlap_steps=1), ADAMW, 1),
}


def everything(link: Link) -> dict[str, Tensor]:
    """70 samples, batches of 4: 18, of which the last has 2; 2 epochs of 6 steps of 3 ranks.

    Dropout draws from each rank's own generator.
    """
    x = torch.randn(70, 3, generator=torch.Generator().manual_seed(2))
    data = TensorDataset(x, (x.sum(1) > 0).long())
    results = {}
    for name, (make_strategy, optimizer, accumulation) in CASES.items():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 2))
        trainer = Trainer(
            model,
            F.cross_entropy,
            optimizer,
            strategy=make_strategy(),
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1.0,
            console=False,
            link=link,
        )
        trainer.fit(DataLoader(data, batch_size=4, shuffle=True), max_epochs=2)
        results[name] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return results


def over(transport: Transport) -> dict[str, Tensor]:
    with connect(transport=transport, timeout_seconds=30) as link:
        return everything(link)


@pytest.fixture(scope="module")
def simulated() -> list[Any]:
    card = Nic(Wire(latency_seconds=1e-4, gigabits_per_second=1.0))
    return simulate(everything, Cluster(Gamma(0.01, 4.0), Topology(nic=card)), RANKS).results


@pytest.mark.parametrize("transport", ["shared_memory", "torch_ordered"])
def test_bit_for_bit(transport: Transport, simulated: list[Any]) -> None:
    for rank, real in enumerate(run_ranks(over, RANKS, transport, timeout_seconds=100)):
        for name, parameters in real.items():
            assert torch.equal(parameters, simulated[rank][name]), name
