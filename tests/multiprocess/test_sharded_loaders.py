"""Training on mixtures, endless streams and batches of similar length: the same on any ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scaledtrain import Trainer, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.data import Column, Mixture, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.errors import ConfigError
from scaledtrain.sim import Cluster, Constant, Nic, Topology, Wire, simulate
from tests.ranks import run_ranks

N = 61
BATCHES = 6  # of all ranks in a step
SMALL: dict[str, Any] = {"block_bytes": 400, "buffer_bytes": 3_000}
LOADERS: Mapping[str, Mapping[str, Any]] = {
    "buckets": {"bucket_by": "x"},
    "max_tokens": {"bucket_by": "x", "max_tokens": 30},
    "infinite": {"infinite": True},
    "mixture": {},
}


class Weighted(nn.Module):
    """The sum of a sample, times a parameter: padding with zeros does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight * x.sum(1)
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ragged")
    random = np.random.default_rng(0)
    with ShardWriter(folder, {"x": Column("float64", ragged=True)}, shard_samples=20) as writer:
        for _ in range(N):
            x = random.standard_normal(random.integers(0, 12))
            writer.write({"x": x, "y": np.sin(x.sum())})
    return folder


def make_loader(folder: Path, kind: str, **options: Any) -> ShardedLoader:
    data: Any = ShardedDataset(folder, ["x", "y"], as_tuple=True)
    if kind == "mixture":
        data = Mixture([(data, 2), (ShardedDataset(folder, ["x", "y"], as_tuple=True), 1)], 50)
    return ShardedLoader(data, 4, pad={"x": 0}, **SMALL, **LOADERS[kind], **options)


def train(link: Link, folder: Path, kind: str, *fits: Any, state: Any = None) -> tuple[float, Any]:
    """The parameter and the state after these fits."""
    trainer = Trainer(
        Weighted(),
        nn.functional.mse_loss,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        gradient_accumulation_steps=BATCHES // link.group.size,
        console=False,
        seed=3,
        link=link,
    )
    if state is not None:
        trainer.load_state_dict(state)
    for limits in fits:
        trainer.fit(make_loader(folder, kind), **limits)
    return trainer.model.weight.item(), trainer.state_dict()  # type: ignore[union-attr]


def simulated(ranks: int, folder: Path, kind: str, *fits: Any, state: Any = None) -> Any:
    card = Nic(Wire(latency_seconds=1e-4, gigabits_per_second=1.0))
    cluster = Cluster(Constant(0.01), Topology(nic=card))
    run = simulate(lambda link: train(link, folder, kind, *fits, state=state), cluster, ranks)
    assert len({weight for weight, _ in run.results}) == 1
    assert len({(s["epoch"], s["steps_in_epoch"]) for _, s in run.results}) == 1
    return run.results[0]


def real(folder: Path, kind: str, *fits: Any) -> tuple[float, Any]:
    with connect(transport="torch_ordered", timeout_seconds=30) as link:
        return train(link, folder, kind, *fits)


def by_hand(folder: Path, kind: str, steps: int) -> float:
    """A plain loop: a step is the mean over the samples of 6 batches, or what an epoch has left."""
    model = Weighted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader, made = make_loader(folder, kind, seed=3), 0
    while made < steps:
        batches = iter(loader)
        while made < steps:
            step = [batch for _, batch in zip(range(BATCHES), batches, strict=False)]
            if not step:
                break
            optimizer.zero_grad()
            errors = [(model(x) - y) ** 2 for x, y in step]
            torch.cat(errors).mean().backward()
            optimizer.step()
            made += 1
    return model.weight.item()


@pytest.mark.parametrize("kind", LOADERS)
def test_any_number_of_ranks_is_a_plain_loop(folder: Path, kind: str) -> None:
    """12 steps: 3 to 4 epochs, each of which ends unevenly; sums are in another order."""
    expected = by_hand(folder, kind, 12)
    for ranks in (1, 2, 3):
        weight, state = simulated(ranks, folder, kind, {"max_steps": 12})
        assert weight == pytest.approx(expected, rel=1e-12)
        assert (state["epoch"] == 0) == (kind == "infinite")


@pytest.mark.parametrize("kind", LOADERS)
def test_resumed_on_another_number_of_ranks(folder: Path, kind: str) -> None:
    straight, _ = simulated(2, folder, kind, {"max_steps": 12})
    _, state = simulated(2, folder, kind, {"max_steps": 2}, {"max_steps": 7})
    for ranks in (2, 3):
        resumed, _ = simulated(ranks, folder, kind, {"max_steps": 12}, state=state)
        assert resumed == pytest.approx(straight, rel=1e-12)


def test_two_processes_end_an_uneven_epoch_together(folder: Path) -> None:
    fits = {"max_epochs": 2}, {"max_steps": 9}
    expected, _ = simulated(2, folder, "max_tokens", *fits)
    for weight, _ in run_ranks(real, 2, folder, "max_tokens", *fits):
        assert weight == expected


def test_what_would_never_end_is_told(folder: Path) -> None:
    endless = make_loader(folder, "infinite")
    trainer = Trainer(
        Weighted(), nn.functional.mse_loss, partial(torch.optim.SGD, lr=0.1), console=False
    )
    for call in (
        lambda: trainer.fit(endless, max_epochs=1),
        lambda: trainer.fit(make_loader(folder, "buckets"), max_steps=1, eval=endless),
        lambda: trainer.evaluate(endless),
        lambda: trainer.predict(endless),
    ):
        with pytest.raises(ConfigError, match="would never end with a loader that is infinite"):
            call()
    assert trainer.step_count == 0
