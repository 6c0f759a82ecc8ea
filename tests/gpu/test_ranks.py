"""Two ranks that share a GPU compute what two ranks on CPUs do: gloo carries what NCCL refuses to.

And one rank's collectives over NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import DiLoCo, LocalSGD, Mesh, ParameterServer, Strategy, Sync, Trainer, connect
from scaledtrain.comm.compress import PowerSGD
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import NoScaler
from scaledtrain.models import GPT, next_token_loss
from scaledtrain.parallel import FullyShard, Pipeline
from scaledtrain.parallel.engine import DividedSchedule, Recipe
from scaledtrain.precision import Precision
from scaledtrain.schedule import MicrobatchLoop
from scaledtrain.server import Synchronous
from scaledtrain.strategies import EASGD, PushSum
from tests.ranks import free_port, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def train(device: str, strategy: Callable[[], Strategy], options: Mapping[str, Any]) -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 11, "sequence_length": 6, "n_layers": 4, "n_heads": 2, "d_model": 16}
    tokens = torch.randint(11, (32, 7), generator=torch.Generator().manual_seed(2))
    data = TensorDataset(tokens[:, :-1], tokens[:, 1:])
    with (
        connect(device=device, timeout_seconds=60) as link,
        Trainer(
            GPT(**sizes, tied_embedding=False),
            next_token_loss,
            SGD,
            strategy=strategy(),
            max_grad_norm=0.5,
            console=False,
            link=link,
            **options,
        ) as trainer,
    ):
        result = trainer.fit(DataLoader(data, batch_size=4), max_epochs=3, eval=data_loader())
        state = trainer.model.state_dict()
        # Of shards and stages each rank has its own.
        whole = {k: getattr(v, "full_tensor", lambda v=v: v)().cpu() for k, v in state.items()}
        return whole, result.evaluation.get("loss"), result.step


def data_loader() -> DataLoader[Any]:
    tokens = torch.randint(11, (8, 7), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (Sync, {}),
        (partial(Sync, overlap=True), {}),
        (partial(Sync, compression=PowerSGD(rank=1)), {}),
        (Sync, {"precision": "bf16-mixed"}),
        (partial(LocalSGD, 2), {}),
        (partial(DiLoCo, 2, fragments=2, overlap_steps=1), {}),
        (partial(ParameterServer, Synchronous()), {}),
        (Sync, {"mesh": Mesh(pipe=2), "pipeline": Pipeline("1F1B", n_microbatches=2)}),
        (Sync, {"mesh": Mesh(pipe=2), "pipeline": Pipeline("ZBVZeroBubble", n_microbatches=4)}),
    ],
)
def test_two_ranks_on_one_gpu(strategy: Callable[[], Strategy], options: Any) -> None:
    found = run_ranks(train, 2, DEVICE, strategy, options, timeout_seconds=100, fresh=True)
    expected = run_ranks(train, 2, "cpu", strategy, options, timeout_seconds=100, fresh=True)
    wide = options.get("precision") is None
    for (whole, loss, steps), (whole_there, loss_there, steps_there) in zip(
        found, expected, strict=True
    ):
        assert steps == steps_there
        assert whole.keys() == whole_there.keys()
        for name, value in whole.items():
            torch.testing.assert_close(
                value, whole_there[name], rtol=0.0, atol=1e-4 if wide else 2e-2, msg=name
            )
        if loss_there is not None:
            assert loss == pytest.approx(loss_there, abs=1e-4 if wide else 2e-2)


@pytest.mark.parametrize(
    "strategy",
    [ParameterServer, partial(ParameterServer, overlap=True), partial(EASGD, 2), PushSum],
)
def test_two_asynchronous_ranks_share_a_gpu(strategy: Callable[[], Strategy]) -> None:
    """Tokens are drawn from 11, so that of other ones the loss is about log 11 = 2.40."""
    for _, loss, steps in run_ranks(
        train, 2, DEVICE, strategy, {"seed": 1}, timeout_seconds=100, fresh=True
    ):
        assert steps >= 6
        assert loss is None or loss == pytest.approx(2.4, abs=0.4)


def test_shards_on_one_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="meet over gloo, which cannot gather"):
        run_ranks(train, 2, DEVICE, Sync, {"mesh": Mesh(shard=2)}, timeout_seconds=100, fresh=True)


def over_nccl(overlap: bool) -> tuple[Tensor, str]:
    """A group of one rank, as NCCL does it; `connect` takes one that is there."""
    store = dist.TCPStore("127.0.0.1", free_port(), 1, True)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 3)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True)
    with connect(device=DEVICE) as link:
        link.group.broadcast([torch.ones(3, device=DEVICE)])
        gathered = link.group.all_gather([torch.arange(3, device=DEVICE)])
        assert gathered[0][0].tolist() == [0, 1, 2]
        with Trainer(
            model, F.cross_entropy, SGD, strategy=Sync(overlap=overlap), console=False, link=link
        ) as trainer:
            trainer.fit(loader, max_epochs=2)
        transport = link.transport
    found = torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()])
    dist.destroy_process_group()
    return found, transport


def alone() -> Tensor:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 3)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True)
    with (
        connect(device=DEVICE) as link,
        Trainer(model, F.cross_entropy, SGD, console=False, link=link) as trainer,
    ):
        trainer.fit(loader, max_epochs=2)
    return torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("overlap", [False, True])
def test_one_rank_over_nccl_is_one_rank_alone(overlap: bool) -> None:
    ((found, transport),) = run_ranks(over_nccl, 1, overlap, timeout_seconds=100, fresh=True)
    assert transport == "torch"
    assert torch.equal(found, alone())


def offloaded() -> tuple[list[str], Tensor, Tensor]:
    """Gradients of shards in the host's memory, by a group of one rank, and of a plain model."""
    store = dist.TCPStore("127.0.0.1", free_port(), 1, True)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).to(DEVICE)
    x = torch.randn(64, 3, device=DEVICE)
    y = (x.sum(1) > 0).long()
    with torch.autocast(DEVICE, torch.bfloat16):
        F.cross_entropy(model(x), y).backward()
    expected = torch.cat([p.grad.cpu().reshape(-1) for p in model.parameters()])
    model.zero_grad()
    precision = Precision("bf16-mixed")
    shards = FullyShard(offload=True).apply([model], dist.group.WORLD, Recipe(precision, SGD, True))
    parameters = [p for _, p in shards.named_parameters]
    loop = MicrobatchLoop(
        shards.called, F.cross_entropy, precision, parameters, device=torch.device(DEVICE)
    )
    DividedSchedule(loop, shards, NoScaler()).run(StepBatch([(x, y)], [64]))
    devices = [p.device.type for p in parameters]
    found = torch.cat([p.grad.reshape(-1) for p in parameters])
    dist.destroy_process_group()
    return devices, found, expected


def test_shards_in_the_hosts_memory_compute_under_the_gpus_autocast() -> None:
    """Parameters are gathered in bfloat16, so that without it float32 inputs would not fit them."""
    ((devices, found, expected),) = run_ranks(offloaded, 1, timeout_seconds=100, fresh=True)
    assert devices == ["cpu"] * 4
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_one_rank_offloads(precision: str) -> None:
    found = []
    for engine in (None, FullyShard(offload=True)):
        options = {"engine": engine, "precision": precision}
        found.append(run_ranks(train, 1, DEVICE, Sync, options, timeout_seconds=100, fresh=True))
    ((expected, loss, _),), ((offloaded, its_loss, _),) = found
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for name, value in expected.items():
        torch.testing.assert_close(offloaded[name], value, rtol=0.0, atol=tolerance, msg=name)
    assert its_loss == pytest.approx(loss, abs=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-true"])
def test_offloading_changes_no_weight(precision: str) -> None:
    """But that the host's optimizer may round otherwise."""
    found = []
    for offload in (False, True):
        options = {
            "mesh": Mesh(shard=2), "engine": FullyShard(offload=offload), "precision": precision
        }  # fmt: skip
        found.append(run_ranks(train, 2, DEVICE, Sync, options, timeout_seconds=100, fresh=True))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for (there, loss_there, _), (whole, loss, _) in zip(*found, strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(value, there[name], rtol=0.0, atol=tolerance, msg=name)
        assert loss == pytest.approx(loss_there, abs=tolerance)
