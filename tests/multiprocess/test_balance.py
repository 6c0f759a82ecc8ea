"""Uneven shares on real ranks: sharded replicas, a server and a group do what one process does."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Mesh, ParameterServer, Strategy, Sync, Trainer, connect
from scaledtrain.balance import Auto, Balance, Fixed
from scaledtrain.comm.protocols import Link
from scaledtrain.server import Synchronous
from tests.ranks import run_ranks


def train(
    strategy: Strategy, balance: Balance | None, link: Link | None, local: int, shard: int = 1
) -> tuple[list[float], list[int]]:
    """On steps of 16 samples, and one of 8 at the end of an epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    samples = TensorDataset(*(torch.randn(56, n) for n in (3, 1)))
    with Trainer(
        model,
        nn.functional.mse_loss,
        partial(torch.optim.SGD, lr=0.1),
        strategy=strategy,
        balance=balance,
        mesh=Mesh(shard=shard),
        console=False,
        link=link,
    ) as trainer:
        trainer.fit(DataLoader(samples, batch_size=local, shuffle=True), max_steps=9)
        shares = [] if trainer.balancer is None else list(trainer.balancer.shares or [])
        whole = trainer.full_state_dict()
        return [x for p in whole.values() for x in p.flatten().tolist()], shares


def on_ranks() -> list[tuple[list[float], list[int]]]:
    auto = Auto(every=3, measured=2)
    with connect() as link:
        return [
            train(Sync(), Fixed([1, 3]), link, 4, shard=2),
            train(Sync(), auto, link, 4, shard=2),
            train(ParameterServer(Synchronous()), Fixed([1, 3]), link, 4, shard=2),
            train(ParameterServer(Synchronous()), auto, link, 4),
            train(Sync(), auto, link, 4),
        ]


def test_layouts_and_strategies_on_four_ranks() -> None:
    expected = torch.tensor(train(Sync(), None, None, 16)[0])
    ran = run_ranks(on_ranks, 4)
    for case in range(5):
        weights, shares = ran[0][case]
        torch.testing.assert_close(torch.tensor(weights), expected, rtol=1e-5, atol=1e-6)
        assert all(of_rank[case][1] == shares for of_rank in ran)
        assert sum(shares) == 16
    assert ran[0][0][1] == [4, 12]
