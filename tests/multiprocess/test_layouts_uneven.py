"""Sharded models of odd shapes, and data that do not divide, against plain replicas."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Mesh, Trainer, connect
from scaledtrain.errors import ConfigError
from scaledtrain.optim import LAMB, LARS
from scaledtrain.parallel import FullyShard
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Odd(nn.Module):
    """7 and 5 rows on 2 ranks, single rows, tied and frozen parameters, buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.Sequential(
            nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 1), nn.Linear(1, 5)
        )
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        logits: Tensor = self.head(self.frozen(h + self.layers(h)) * self.scale)
        return logits


def loader(n: int) -> DataLoader[Any]:
    x, y = torch.randint(7, (2, n), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, y), batch_size=4)


RUNS: list[tuple[int, Any, dict[str, Any]]] = [
    (24, SGD, {"max_grad_norm": 0.1}),
    (4, SGD, {}),  # one batch for two ranks, in training and in evaluation
    (24, SGD, {"precision": "bf16-mixed"}),
    (24, partial(LARS, lr=1.0, trust_coefficient=0.02, weight_decay=0.1), {}),
    (24, partial(LAMB, lr=0.01, max_grad_norm=0.1, eps=1e-3), {}),
    (24, SGD, {"overfit_batches": 3}),
    (24, SGD, {"fast_dev_run": 2}),  # saved as shards, too
]


def sum_of_small_gradients() -> list[Tensor]:
    """Of 64 microbatches: one of 1, the others of 2^-12, for each of two weights."""
    inputs = torch.full((64, 2, 1), 2.0**-12)
    inputs[0] = 1.0
    data = TensorDataset(inputs.view(128, 1), torch.zeros(128))
    with connect(transport="torch", timeout_seconds=60) as link:
        trainer = Trainer(
            nn.Linear(1, 2, bias=False),
            lambda outputs, targets: outputs.sum(1).mean(),
            partial(torch.optim.SGD, lr=0.0),
            mesh=Mesh(shard=2),
            precision="fp16-true",
            gradient_accumulation_steps=64,
            console=False,
            link=link,
        )
        steps = trainer.layout.steps(DataLoader(data, batch_size=1), 0, 1, accumulation=64)
        trainer.schedule.run(next(steps.epoch(0)))
        return [gradient.clone() for gradient in trainer.replica.gradients()]


def test_gradients_of_float16_shards_are_added_up_in_float32() -> None:
    """(1 + 63 x 2^-12) / 64; at 1 float16's gap is 2^-10, so that each of the 63 would be lost."""
    for (gradient,) in run_ranks(sum_of_small_gradients, 2, timeout_seconds=60):
        assert gradient.dtype is torch.float32
        assert gradient.tolist() == [[(1 + 63 * 2.0**-12) / 64]]


def train(shard: int) -> list[Any]:
    found: list[Any] = []
    with connect(transport="torch", timeout_seconds=100) as link:
        for n, optimizer, options in RUNS:
            # The head is the embedding, so that it is gathered with what is in no block.
            engine = FullyShard(block_classes=["Linear"]) if shard > 1 else None
            mesh = Mesh(shard=shard)
            with Trainer(
                Odd(),
                nn.functional.cross_entropy,
                optimizer,
                mesh=mesh,
                engine=engine,
                console=False,
                link=link,
                **options,
            ) as trainer:
                result = trainer.fit(loader(n), max_epochs=2, eval=loader(n))
                predicted = torch.cat(trainer.predict(loader(n)))
                found.append((trainer.full_state_dict(), result.evaluation["loss"], predicted))
        if shard > 1:
            with pytest.raises(ConfigError, match="Muon, which looks at rows"):
                Trainer(
                    nn.Linear(4, 4, bias=False),
                    nn.functional.mse_loss,
                    torch.optim.Muon,
                    mesh=Mesh(shard=shard),
                    console=False,
                    link=link,
                )
    return found


def test_odd_shapes_and_data_are_trained_as_by_plain_replicas() -> None:
    plain = run_ranks(train, 2, 1, timeout_seconds=150)[0]
    first, second = run_ranks(train, 2, 2, timeout_seconds=150)
    tolerances = (1e-5, 1e-5, 2e-2, 1e-5, 1e-5, 1e-5, 1e-5)
    for expected, found, other, atol in zip(plain, first, second, tolerances, strict=True):
        assert list(found[0]) == list(expected[0])
        assert found[0]["head.weight"] is found[0]["embed.weight"]
        for key, value in found[0].items():
            torch.testing.assert_close(value, expected[0][key], atol=atol, rtol=0.0)
        assert found[1] == pytest.approx(expected[1], abs=atol)
        torch.testing.assert_close(found[2], expected[2], atol=10 * atol, rtol=0.0)
        assert other[0] == {}
        assert torch.equal(other[2], found[2])  # all ranks have the same running statistics
