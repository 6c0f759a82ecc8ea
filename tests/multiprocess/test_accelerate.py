"""A loop written for Accelerate computes under a strategy what our Trainer does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import DiLoCo, LocalSGD, ParameterServer, Sync, Trainer, connect
from scaledtrain.errors import ConfigError
from scaledtrain.server import Synchronous
from scaledtrain.strategies import Strategy
from tests.ranks import free_port, run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="Accelerate is not installed"
)

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "sync": lambda: Sync(overlap=True),  # which asks how many backward passes there will be
    "local_sgd": lambda: LocalSGD(sync_every=3),
    "diloco": lambda: DiLoCo(sync_every=3),
    "server": lambda: ParameterServer(Synchronous()),
}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))


def data() -> TensorDataset:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).long())


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def accelerate_loop(strategy: Strategy) -> tuple[Tensor, int]:
    """A loop as Accelerate's documentation has it, but for the first two lines."""
    from scaledtrain.accelerate import Accelerator

    accelerator = Accelerator(strategy=strategy, cpu=True, gradient_accumulation_steps=2)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(data(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert type(model) is nn.Sequential
    for _ in range(2):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.end_training()
    return flat(model), strategy.step


def our_loops() -> dict[str, tuple[Tensor, int]]:
    told = {}
    with connect(transport="torch") as link:
        for name, make in STRATEGIES.items():
            trainer = Trainer(
                net(),
                F.cross_entropy,
                partial(torch.optim.SGD, lr=0.1, momentum=0.9),
                strategy=make(),
                gradient_accumulation_steps=2,
                max_grad_norm=0.5,
                console=False,
                link=link,
            )
            with trainer:
                result = trainer.fit(DataLoader(data(), batch_size=4), max_epochs=2)
                told[name] = (flat(trainer.model), result.step)
    return told


def both_rank() -> dict[str, Any]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    told = {}
    port = int(os.environ["MASTER_PORT"])
    ours = our_loops()
    for i, (name, make) in enumerate(STRATEGIES.items()):
        os.environ["MASTER_PORT"] = str(port + 1 + i)  # the last one may not be free again at once
        told[name] = (ours[name], accelerate_loop(make()))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    os.environ["MASTER_PORT"] = str(port)
    return told


def test_a_loop_with_accelerate_equals_the_trainer() -> None:
    """Two processes; accumulation over two batches; clipped where the gradient is a mean."""
    for told in run_ranks(both_rank, 2, timeout_seconds=110):
        for (expected, step), (found, steps) in told.values():
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)
            assert steps == step == 8  # 64 samples / (4 x 2 accumulated x 2 processes) x 2 epochs


def test_what_cannot_be_kept_by_a_strategy_is_refused() -> None:
    from scaledtrain.accelerate import Accelerator

    accelerator = Accelerator(strategy=Sync(), cpu=True)
    try:
        accelerator.prepare(net())
        with pytest.raises(ConfigError, match="a second model"):
            accelerator.prepare(net())
        optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
        accelerator.prepare(optimizer)
        with pytest.raises(ConfigError, match="a second optimizer"):
            accelerator.prepare(torch.optim.SGD(net().parameters(), lr=0.1))
    finally:
        accelerator.end_training()


def test_accelerate_launch_starts_the_training_command(tmp_path: Path) -> None:
    """Two processes on CPUs, by Accelerate's own launcher, in the precision that it says."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--main_process_port", str(free_port())),
        *("--mixed_precision", "bf16", "--dynamo_backend", "no", "-m", "scaledtrain.train"),
        *("data=tests.tasks.signs", "data.local_batch_size=32", "max_steps=5", "device=cpu"),
        *("console=false", f"run_dir={tmp_path}/run"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["result"]["step"] == 5
    assert (tmp_path / "run" / "metrics-rank1.jsonl").exists()
    assert "bf16-mixed" in (tmp_path / "run" / "config.yaml").read_text()
