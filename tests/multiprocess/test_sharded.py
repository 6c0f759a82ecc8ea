"""Training on sharded data: the same on any number of ranks, and resumed inside an epoch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import Trainer, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.data import ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.sim import Cluster, Constant, Nic, Topology, Wire, simulate
from tests.ranks import run_ranks

N, GLOBAL_BATCH = 103, 8  # 13 steps an epoch, the last of 7 samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with ShardWriter(folder, shard_samples=20) as writer:
        writer.write_batch({"x": x, "y": x.sum(1, keepdim=True).sin()})
    return folder


def train(link: Link, folder: Path, *steps: int, state: Any = None) -> tuple[Tensor, Any]:
    """Parameters and state after fits to each of these steps."""
    torch.manual_seed(1)
    trainer = Trainer(
        nn.Linear(3, 1).double(),
        nn.functional.mse_loss,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        console=False,
        seed=3,
        link=link,
    )
    if state is not None:
        trainer.load_state_dict(state)
    data = ShardedDataset(folder, ["x", "y"], as_tuple=True)
    local_batch = GLOBAL_BATCH // link.group.size
    for limit in steps:
        loader = ShardedLoader(data, local_batch, block_bytes=300, buffer_bytes=1_200)
        trainer.fit(loader, max_steps=limit)
    parameters = torch.cat([p.detach().reshape(-1) for p in trainer.replica.parameters])
    return parameters, trainer.state_dict()


def on_real_ranks(folder: Path, *steps: int) -> tuple[Tensor, Any]:
    with connect(transport="torch_ordered", timeout_seconds=30) as link:
        return train(link, folder, *steps)


def on_simulated_ranks(ranks: int, folder: Path, *steps: int, state: Any = None) -> Any:
    card = Nic(Wire(latency_seconds=1e-4, gigabits_per_second=1.0))
    cluster = Cluster(Constant(0.01), Topology(nic=card))
    run = simulate(lambda link: train(link, folder, *steps, state=state), cluster, ranks)
    return run.results[0]


def by_hand(folder: Path, steps: int) -> Tensor:
    """A plain loop over the same loader."""
    torch.manual_seed(1)
    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = ShardedDataset(folder, ["x", "y"], as_tuple=True)
    loader = ShardedLoader(data, GLOBAL_BATCH, seed=3, block_bytes=300, buffer_bytes=1_200)
    made = 0
    while True:
        for x, y in loader:
            if made == steps:
                return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            made += 1


def assert_close(one: Tensor, other: Tensor) -> None:
    """A mean of 8 in float64 is summed in another order: 2^-53 for each addition, 30 steps."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_any_number_of_ranks_is_a_plain_loop(folder: Path) -> None:
    expected = by_hand(folder, 30)
    for ranks in (1, 2, 4):
        parameters, _ = on_simulated_ranks(ranks, folder, 30)
        assert_close(parameters, expected)


def test_resumed_inside_an_epoch_also_on_another_number_of_ranks(folder: Path) -> None:
    straight, _ = on_simulated_ranks(2, folder, 30)
    _, state = on_simulated_ranks(2, folder, 5, 20)
    assert (state["epoch"], state["steps_in_epoch"]) == (1, 7)  # 20 steps of 13 an epoch
    resumed, _ = on_simulated_ranks(2, folder, 30, state=state)
    assert torch.equal(resumed, straight)
    for ranks in (1, 4):
        resumed, _ = on_simulated_ranks(ranks, folder, 30, state=state)
        assert_close(resumed, straight)


def test_two_processes(folder: Path) -> None:
    """Stopped in the second epoch and continued, as two simulated ranks that do not stop."""
    expected, _ = on_simulated_ranks(2, folder, 30)
    for parameters, _ in run_ranks(on_real_ranks, 2, folder, 20, 30):
        assert torch.equal(parameters, expected)
