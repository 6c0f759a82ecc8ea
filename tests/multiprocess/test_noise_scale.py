"""The noise scale of gradients that are sent during backward, sharded, or made by stages."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import Mesh, NoiseScale, Sync, Trainer, connect
from scaledtrain.batch_growth import BatchGrowth
from scaledtrain.errors import ConfigError
from scaledtrain.parallel import Pipeline
from tests.ranks import run_ranks


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    return x, x.sum(1, keepdim=True).sin()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def noise_of(link: Any, **options: Any) -> tuple[float, float, str]:
    """|G|^2 and S of one step of all 16 samples, in batches of 4; and why there are none."""
    noise = NoiseScale(every=1, grow=options.pop("grow", None))
    x, y = data()
    with Trainer(
        net(),
        nn.functional.mse_loss,
        partial(torch.optim.SGD, lr=0.1),
        gradient_accumulation_steps=2,
        callbacks=[noise],
        console=False,
        link=link,
        **options,
    ) as trainer:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
        trainer.fit(loader, max_steps=1)
    return noise.noise.squared_norm, noise.noise.variance, noise.noise.undefined


def by_hand(groups: list[list[int]]) -> tuple[float, float]:
    """From the gradient of each group of samples, in plain torch."""
    x, y = data()
    model = net()

    def gradient(rows: list[int]) -> Tensor:
        model.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    everything = [row for group in groups for row in group]
    whole = gradient(everything)
    between = sum(len(g) * float((gradient(g) - whole).square().sum()) for g in groups)
    variance = between / (len(groups) - 1)
    return float(whole.square().sum()) - variance / len(everything), variance


def on_two_ranks() -> list[Any]:
    with connect(transport="torch", timeout_seconds=30) as link:
        found: list[Any] = [
            noise_of(link, strategy=Sync(overlap=True, bucket_bytes=100)),
            noise_of(link, mesh=Mesh(shard=2)),
            noise_of(link, mesh=Mesh(pipe=2), pipeline=Pipeline("1F1B", 2)),
        ]
        for options in (
            {"mesh": Mesh(shard=2), "grow": BatchGrowth(16, min_batch_size=16)},
            {
                "mesh": Mesh(pipe=2),
                "pipeline": Pipeline("1F1B", 2),
                "grow": BatchGrowth(64),
            },
        ):
            try:
                found.append(noise_of(link, **options))
            except ConfigError as error:
                found.append(str(error))
        return found


def test_layouts_and_overlap() -> None:
    rows = [list(range(4 * i, 4 * i + 4)) for i in range(4)]  # batch i goes to rank i modulo 2
    zero, one = run_ranks(on_two_ranks, 2)
    assert repr(zero) == repr(one)  # nan is not equal to itself
    overlapped, sharded, piped, cannot_grow, cannot_pipe = zero
    # Two replicas: what each has of the step. One in two shards: its microbatches, of both ranks.
    expected = by_hand([rows[0] + rows[2], rows[1] + rows[3]])
    assert overlapped[:2] == pytest.approx(expected, rel=1e-4)
    assert sharded[:2] == pytest.approx(by_hand([rows[0] + rows[1], rows[2] + rows[3]]), rel=1e-4)
    assert "no gradients of single microbatches" in piped[2]
    assert "a step has 16 samples already" in cannot_grow
    assert "make every step of the same number of microbatches" in cannot_pipe
