"""LARS and LAMB where ranks have parts of tensors: on servers, stages and shards."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import ParameterServer, Trainer
from scaledtrain.comm.serving.partition import Piece
from scaledtrain.errors import ConfigError
from scaledtrain.optim import LAMB, LARS
from scaledtrain.parallel.whole_tensors import check_elementwise, for_shards, for_stages
from scaledtrain.sim import Cluster, Constant, Topology, Wire, simulate

PORT = Wire(0.0, gigabits_per_second=float("inf"))
CLUSTER = Cluster(Constant(1.0), Topology(ranks_per_host=2, hosts=1, port=PORT))
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
LOADER: DataLoader[Any] = DataLoader(TensorDataset(X, X[:, :1]), batch_size=4)


def train(make: Any, workers: int, **options: Any) -> list[torch.Tensor]:
    def program(link: Any) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = Trainer(
            nn.Linear(6, 1),
            nn.functional.mse_loss,
            make,
            strategy=ParameterServer(**options),
            console=False,
            link=link,
        )
        with trainer:
            trainer.fit(LOADER, max_steps=6)
            return trainer.model.weight.detach().clone()

    return [value for value in simulate(program, CLUSTER, workers).results if value is not None]


@pytest.mark.parametrize(
    "make", [partial(LARS, lr=10.0), partial(LAMB, lr=0.05, max_grad_norm=1.0)]
)
def test_a_server_with_one_worker_is_plain_training(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = make(model.parameters())
    for x, y in list(LOADER)[:6]:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    (got,) = train(make, 1)
    torch.testing.assert_close(got, model.weight.detach(), rtol=1e-6, atol=1e-7)


def test_server_shards_that_cut_tensors_or_see_a_part_of_a_norm_are_refused() -> None:
    first, second = train(LARS, 2, shards=2, cut_tensors=False)
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="LARS looks at whole tensors, but some are cut"):
        # The simulator has whole tensors on one server; this is what a real shard's would be.
        rows = [Piece(0, (0, 3))]
        ParameterServer(shards=2)._check_pieces(LARS([nn.Parameter(torch.ones(3, 6))]), rows)
    with pytest.raises(ConfigError, match="LAMB's max_grad_norm .* 2 server shards"):
        train(partial(LAMB, max_grad_norm=1.0), 2, shards=2, cut_tensors=False)


def test_parts_that_ranks_update_by_themselves() -> None:
    own, copy = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    make = for_shards(LARS, lambda squares: None, [own])
    assert make([("w", own)]).is_sharded  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="LARS needs norms of whole tensors"):
        make([("w", copy)])
    with pytest.raises(ConfigError, match="Muon, which looks at rows"):
        for_shards(torch.optim.Muon, lambda squares: None, [own])([("w", own)])
    with pytest.raises(ConfigError, match="LAMB, which looks at rows"):
        check_elementwise(LAMB([own]))
    check_elementwise(torch.optim.AdamW([own]))
    with pytest.raises(ConfigError, match="set the training's max_grad_norm"):
        for_stages(partial(LAMB, max_grad_norm=1.0))([("w", own)])
