"""Layers of a model in shards or in stages have the values that they have on one rank."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaledtrain import LayerWatch, Mesh, Sync, Trainer, connect
from scaledtrain.parallel import Pipeline
from tests.ranks import run_ranks

Rows = dict[str, dict[str, float | None]]
PARAMETERS = ("grad_norm", "weight_norm", "update_ratio")


def data(batch_size: int) -> Any:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    y = x.sum(1, keepdim=True).sin()
    dataset = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 1))


def overlapping() -> Sync:
    return Sync(overlap=True, bucket_bytes=100)


def trained(link: Any, batch_size: int, layers: list[LayerWatch], **options: Any) -> str:
    """Two steps; the SHA-256 of the parameters of this rank."""
    with Trainer(
        net(),
        nn.functional.mse_loss,
        partial(torch.optim.AdamW, lr=0.01),
        gradient_accumulation_steps=2,
        strategy=overlapping(),
        callbacks=layers,
        console=False,
        link=link,
        **options,
    ) as trainer:
        trainer.fit(data(batch_size), max_steps=2)
        return trainer.replica.sha256()


def rows(link: Any, batch_size: int, **options: Any) -> tuple[Rows, bool]:
    """Of the second step; and whether parameters are those of a run without it."""
    layers = LayerWatch(every_steps=1)
    watched = trained(link, batch_size, [layers], **options)
    options.pop("run_dir", None)
    return layers.rows, watched == trained(link, batch_size, [], **options)


def on_two_ranks(folder: str) -> list[tuple[Rows, bool]]:
    with connect(transport="torch", timeout_seconds=30) as link:
        return [
            rows(link, 4),
            rows(link, 4, mesh=Mesh(shard=2), run_dir=folder),
            rows(link, 4, mesh=Mesh(pipe=2), pipeline=Pipeline("1F1B", 2)),
        ]


def test_layouts_tell_what_one_rank_tells(tmp_path: Path) -> None:
    """Each step of two ranks with different samples has 16, as one with batches of 8 has."""
    first, second = run_ranks(on_two_ranks, 2, str(tmp_path))
    assert all(is_same for _, is_same in [*first, *second])
    with connect() as link:
        whole, _ = rows(link, 8)
        half, _ = rows(link, 4)
    assert_equal(first[0][0], whole, PARAMETERS)
    assert second[0][0] == {}  # of the second replica
    assert_equal(first[1][0], whole, PARAMETERS)
    assert second[1][0] == {}  # of the other shards: one of them tells
    lines = map(json.loads, (tmp_path / "metrics-rank1.jsonl").read_text().splitlines())
    assert not [line for line in lines if line["kind"] == "layers"]
    stages = first[2][0] | second[2][0]
    assert first[2][0].keys().isdisjoint(second[2][0])
    assert_equal(stages, half, (*PARAMETERS, "mean", "std", "zeros"))


def assert_equal(got: Rows, want: Rows, names: tuple[str, ...]) -> None:
    modules = [module for module, row in want.items() if row.keys() & set(names)]
    assert set(modules) <= got.keys()
    for module in modules:
        for name in want[module].keys() & set(names):
            assert got[module][name] == pytest.approx(want[module][name], rel=2e-4), (module, name)
