"""Stages whose parameters have 16 bits compute what the whole model does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Mesh, Precision, Trainer, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.models import GPT
from scaledtrain.models.gpt import next_token_loss
from scaledtrain.parallel import Pipeline
from tests.ranks import run_ranks

ADAMW = partial(torch.optim.AdamW, lr=0.01)
PRECISIONS = [Precision("bf16-true", "master"), Precision("fp16-true")]  # nothing is random
SCHEDULES = ["GPipe", "1F1B", "ZBVZeroBubble"]


def data() -> TensorDataset:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).float()[:, None])


def fit(cases: Sequence[tuple[Precision, Mesh, dict[str, Any]]], size: int) -> list[Any]:
    """Of each case this rank's parameters after four steps, and the loss of an evaluation."""
    found: list[Any] = []
    with connect(transport="torch", timeout_seconds=60) as link:
        for precision, mesh, options in cases:
            torch.manual_seed(1)
            layers = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())]
            with Trainer(
                nn.Sequential(*layers, nn.Linear(8, 1)),
                F.mse_loss,  # which wants outputs in the format of the targets, float32
                ADAMW,
                mesh=mesh,
                precision=precision,
                max_grad_norm=10.0,
                console=False,
                link=link,
                **options,
            ) as trainer:
                loader = DataLoader(data(), batch_size=size)
                result = trainer.fit(loader, max_epochs=1, eval=DataLoader(data(), batch_size=8))
                assert result.step == 4
                own = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
                found.append((own, result.evaluation["loss"]))
    return found


@pytest.mark.timeout(200)
def test_stages_of_16_bits_train_to_the_bits_of_the_whole_model() -> None:
    """Floats go into the first stage, and float32 comes out of the last, also on one rank (ZBV)."""
    plain = [(p, Mesh(), {"gradient_accumulation_steps": 2}) for p in PRECISIONS]
    (expected,) = run_ranks(fit, 1, plain, 4, timeout_seconds=60)
    example = (data().tensors[0][:8], data().tensors[1][:8])
    cases = [
        (p, Mesh(pipe=2), {"pipeline": Pipeline(schedule, 2, example=example)})
        for p in PRECISIONS
        for schedule in SCHEDULES
    ]
    names: set[str] = set()
    for of_rank in run_ranks(fit, 2, cases, 8, timeout_seconds=120):
        for (precision, _, options), (own, loss) in zip(cases, of_rank, strict=True):
            whole, expected_loss = expected[PRECISIONS.index(precision)]
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            for name, value in own.items():
                assert value.dtype == whole[name].dtype != torch.float32
                assert torch.equal(value, whole[name]), (options, name)
            names |= own.keys()
    assert names == expected[0][0].keys()


def tied_copies() -> list[Tensor]:
    """Of a weight that both stages have, by how it is updated."""
    found = []
    with connect(transport="torch", timeout_seconds=60) as link:
        for update in ("stochastic", "kahan"):
            found.append(tied_copy(link, Precision("bf16-true", update)))
    return found


def tied_copy(link: Link, precision: Precision) -> Tensor:
    tokens = torch.randint(11, (16, 7), generator=torch.Generator().manual_seed(2))
    data = TensorDataset(tokens[:, :-1], tokens[:, 1:])
    torch.manual_seed(1)
    with Trainer(
        GPT(vocab_size=11, sequence_length=6, n_layers=3, n_heads=2, d_model=10),
        next_token_loss,
        ADAMW,
        mesh=Mesh(pipe=2),
        pipeline=Pipeline("1F1B", 2),
        precision=precision,
        console=False,
        link=link,
    ) as trainer:
        trainer.fit(DataLoader(data, batch_size=4), max_epochs=2)
        trainer.evaluate(DataLoader(data, batch_size=4))
        return trainer.model.state_dict()["token_embedding.weight"].clone()


def test_copies_of_a_weight_that_are_rounded_at_random_stay_equal() -> None:
    first, last = run_ranks(tied_copies, 2, timeout_seconds=60)
    assert all(weight.dtype is torch.bfloat16 for weight in first)
    assert all(map(torch.equal, first, last))
