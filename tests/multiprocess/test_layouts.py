"""A replica laid out over ranks computes what a replica on one rank does.

Every layout is run under every strategy, recomputation and precision, on 2 x 2 ranks, against two
plain ranks with the same data. Sums over shards have another order, so that float32 agrees to
rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import DiLoCo, LocalSGD, Mesh, ParameterServer, Sync, Trainer, connect
from scaledtrain.models import GPT
from scaledtrain.models.gpt import next_token_loss
from scaledtrain.parallel import FullyShard
from scaledtrain.recompute import CheckpointEvery
from scaledtrain.server import Synchronous
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STRATEGIES = {
    "sync": Sync,
    "local_sgd": lambda: LocalSGD(sync_every=2),
    "diloco": lambda: DiLoCo(sync_every=2),
    "server": lambda: ParameterServer(Synchronous()),
}


def net() -> nn.Module:
    torch.manual_seed(1)
    return GPT(vocab_size=11, sequence_length=6, n_layers=3, n_heads=2, d_model=10)


def data(n: int) -> TensorDataset:
    tokens = torch.randint(11, (n, 7), generator=torch.Generator().manual_seed(2))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def whole(model: nn.Module) -> Tensor:
    values = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return torch.cat([v.detach().reshape(-1) for v in values])


def train(
    strategy: str, mesh: Mesh, local: int, accumulation: int, n: int, options: dict[str, Any]
) -> tuple[Tensor, dict[str, float], int, float]:
    with connect(transport="torch", timeout_seconds=40) as link:
        trainer = Trainer(
            net(),
            next_token_loss,
            SGD,
            strategy=STRATEGIES[strategy](),
            mesh=mesh,
            gradient_accumulation_steps=accumulation,
            console=False,
            log_every=1,
            link=link,
            **options,
        )
        loader = DataLoader(data(n), batch_size=local, shuffle=True)
        result = trainer.fit(loader, max_epochs=2, eval=DataLoader(data(9), batch_size=2))
        norm = float(trainer.replica.gradient_norm())
        return whole(trainer.model), dict(result.evaluation), result.step, norm


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5},
        {"precision": "bf16-mixed"},
        {"precision": "fp16-mixed"},
        {
            "activation_checkpointing": CheckpointEvery(1),
            "engine": FullyShard(reshard_after_forward=False),
        },
    ],
    ids=["fp32", "clipped", "bf16", "fp16", "recompute"],
)
def test_sharded_replicas_compute_what_plain_ones_do(
    strategy: str, options: dict[str, Any]
) -> None:
    plain = {key: value for key, value in options.items() if key != "engine"}
    if strategy == "server":  # a replica that is in step with no other takes every other batch
        local, accumulation, n = 2, 2, 24
    else:  # 22 samples: steps of 8, 8 and 6, in the last of which one of four ranks has none
        local, accumulation, n = 4, 1, 22
    expected = run_ranks(train, 2, strategy, Mesh(), local, accumulation, n, plain)
    found = run_ranks(train, 4, strategy, Mesh(shard=2), 2, 1, n, options)
    tolerance = 2e-2 if "precision" in options else 1e-5
    for rank, (parameters, evaluation, step, norm) in enumerate(found):
        of_replica = expected[rank // 2]
        torch.testing.assert_close(parameters, of_replica[0], atol=tolerance, rtol=0.0)
        assert step == of_replica[2]
        assert norm == pytest.approx(of_replica[3], rel=10 * tolerance)
        if evaluation:
            assert evaluation["loss"] == pytest.approx(expected[0][1]["loss"], abs=tolerance)
