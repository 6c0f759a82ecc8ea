"""Estimates of memory: equal to what is alive in real steps, byte by byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import (
    DiLoCo,
    LocalSGD,
    Mesh,
    ParameterServer,
    Precision,
    Strategy,
    Sync,
    estimate_memory,
)
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.errors import ConfigError
from scaledtrain.memory import MemoryEstimator, SmallestBudget
from scaledtrain.memory.fake import bytes_of, tensors_in
from scaledtrain.models import GPT, MLP, ConvNet, next_token_loss
from scaledtrain.parallel import DeepSpeed
from scaledtrain.recompute import (
    CheckpointEvery,
    CheckpointPolicy,
    CheckpointSqrt,
    MemoryBudget,
    Selective,
    checkpoint_activations,
)
from scaledtrain.recompute.apart import peak_bytes
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.replica import Replica
from scaledtrain.schedule import call_model
from scaledtrain.server import Dana, DelayCompensated
from scaledtrain.strategies import Gossip, Hogwild

CPU = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=0.1, fused=True)


@dataclass
class Case:
    model: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Tensor]
    batch: tuple[Tensor, Tensor]


IMAGES = torch.randn(4, 1, 8, 8), torch.arange(4)
TOKENS = torch.arange(2 * 16).view(2, 16), torch.arange(2 * 16).view(2, 16)
CASES = {
    "mlp": Case(lambda: MLP(64, [48, 32, 24], 10), F.cross_entropy, IMAGES),
    "convnet": Case(lambda: ConvNet(1, 10, 8), F.cross_entropy, IMAGES),
    "gpt": Case(lambda: GPT(32, 16, 3, 2, 16, dropout=0.1), next_token_loss, TOKENS),
}
ONE_BLOCK = Case(lambda: GPT(32, 16, 1, 2, 16, dropout=0.1), next_token_loss, TOKENS)
POLICIES: dict[str, CheckpointPolicy | None] = {
    "none": None,
    "full": CheckpointEvery(),
    "every 2": CheckpointEvery(2),
    "sqrt": CheckpointSqrt(),
    "selective": Selective(),
}
PRECISIONS = [
    Precision("fp32"),
    Precision("bf16-mixed"),
    Precision("fp16-mixed"),
    Precision("bf16-true"),
    Precision("bf16-true", "kahan"),
    Precision("fp16-true"),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_activations_are_those_of_real_steps(name: str, precision: Precision) -> None:
    case = CASES[name]
    estimator = MemoryEstimator(case.model(), case.loss_fn, case.batch, ADAMW)
    for policy in POLICIES.values():
        model = precision.convert(case.model())

        def sample(called: Callable[..., Any]) -> Tensor:
            with precision.autocast(CPU):
                return call_model(called, case.batch, case.loss_fn)[1]

        if policy is not None:
            checkpoint_activations(model, policy)
        expected = peak_bytes(model, sample)
        with LiveBytes() as counted:
            loss = sample(model)
        kept = counted.live
        del loss
        found = estimator.estimate(precision, policy)
        assert (found.activations, found.kept.total) == (expected, kept)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_parameters_gradients_state_and_peak_are_those_of_real_steps(
    precision: Precision, microbatches: int
) -> None:
    """A loop by hand: the second of two steps, in which the optimizer's state is there."""
    case = ONE_BLOCK
    found = estimate_memory(
        case.model(),
        case.loss_fn,
        case.batch,
        ADAMW,
        precision=precision,
        microbatches=microbatches,
    )
    model = precision.convert(case.model())
    replica = Replica(model, ADAMW, make_rounding=partial(precision.rounding, 0))
    scaler = precision.scaler(replica)
    parameters = sum(p.nbytes for p in model.parameters())
    with LiveBytes() as counted:
        updater = replica.updater()
        for _ in range(2):
            counted.peak = state = counted.live
            for _ in range(microbatches):
                with precision.autocast(CPU):
                    loss = call_model(model, case.batch, case.loss_fn)[1]
                if microbatches > 1:
                    loss = loss * (1 / microbatches)
                scaler.backward(loss)
                loss = loss.detach()
            del loss
            gradients = sum(g.nbytes for g in replica.gradients())
            computing, counted.peak = counted.peak - state, counted.live
            updater.step()
            updating = counted.peak - state
            replica.zero_grad()
        assert counted.live == state
    assert (found.parameters, found.gradients) == (parameters, gradients)
    assert found.ranks[0].optimizer == state
    batch = microbatches * sum(t.nbytes for t in case.batch)
    assert found.batch == batch
    assert found.updating == updating - gradients
    # The sum of the microbatches' losses is 4 bytes, kept while the next one runs.
    assert computing <= found.computing <= computing + 8
    assert found.peak == parameters + batch + state + max(found.computing, updating)


def test_all_batches_of_a_step_are_there_at_once() -> None:
    """As the loader moves them to a device, which here has no memory."""
    batches = [(torch.zeros(4, 64), torch.zeros(4, 64)) for _ in range(8)]
    steps = ReplicaLoader(batches, accumulation=8, device=torch.device("meta")).epoch(0)
    there = bytes_of(tensors_in(next(steps).microbatches))
    model = nn.Linear(64, 64)
    found = estimate_memory(model, F.mse_loss, batches[0], ADAMW, microbatches=8)
    assert found.batch == there == 8 * 2 * 4 * 64 * 4
    two = estimate_memory(model, F.mse_loss, batches[0], ADAMW, microbatches=2)
    assert found.peak - two.peak == 6 * 2 * 4 * 64 * 4


def test_the_smallest_budget_is_that_of_real_steps() -> None:
    case = CASES["gpt"]

    def sample(called: Callable[..., Any]) -> Tensor:
        return call_model(called, case.batch, case.loss_fn)[1]

    with pytest.raises(ConfigError) as error:
        checkpoint_activations(case.model(), MemoryBudget(1), sample)
    told = re.search(r"(\d+) bytes \([^)]*\) are needed", str(error.value))
    assert told is not None
    least = int(told[1])
    found = estimate_memory(
        case.model(),
        case.loss_fn,
        case.batch,
        ADAMW,
        activation_checkpointing=SmallestBudget(),
    )
    # The budget is rounded up to a thousandth of what everything needs.
    assert 0.9 * least <= found.activations <= least


OPTIMIZERS = {
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "asgd": torch.optim.ASGD,
    "adam": partial(torch.optim.Adam, amsgrad=True),
    "nadam": torch.optim.NAdam,
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_any_optimizer_is_that_of_a_real_one(name: str) -> None:
    case, make = CASES["mlp"], OPTIMIZERS[name]
    model = case.model()
    found = estimate_memory(model, case.loss_fn, case.batch, make)
    replica = Replica(model, make)
    replica.gradients()
    updater = replica.updater()
    updater.step()
    state = updater.optimizer.state.values()
    tensors = [v for of in state for v in of.values() if isinstance(v, Tensor)]
    assert found.ranks[0].optimizer == sum(t.nbytes for t in tensors)


# P: bytes of the parameters, 4 * 10 * 10; the optimizer, SGD with momentum, keeps P.
STRATEGIES: dict[str, tuple[Callable[[], Strategy], list[tuple[int, int]]]] = {
    "sync": (Sync, [(1, 0)] * 3),
    "local": (lambda: LocalSGD(8), [(1, 0)] * 3),
    # an anchor, and the momentum of the outer optimizer
    "diloco": (lambda: DiLoCo(8), [(1, 2)] * 3),
    # what others reach, and their answer
    "gossip": (Gossip, [(1, 2)] * 3),
    # the server's copy of the parameters; a worker has no optimizer
    "server": (ParameterServer, [(1, 1), (0, 0), (0, 0)]),
    # ... and for each worker what it was sent
    "dc_asgd": (lambda: ParameterServer(correction=DelayCompensated()), [(1, 4), (0, 0), (0, 0)]),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_each_rank_keeps_for_its_strategy(name: str) -> None:
    make, expected = STRATEGIES[name]
    found = estimate_memory(
        nn.Linear(10, 10, bias=False),
        F.mse_loss,
        (torch.zeros(2, 10), torch.zeros(2, 10)),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        strategy=make,
        workers=3,
    )
    assert [(r.optimizer / 400, r.strategy / 400) for r in found.ranks] == expected


def test_a_momentum_for_each_worker_is_on_the_server() -> None:
    found = estimate_memory(
        nn.Linear(10, 10, bias=False),
        F.mse_loss,
        (torch.zeros(2, 10), torch.zeros(2, 10)),
        partial(torch.optim.SGD, lr=0.1),
        strategy=lambda: ParameterServer(correction=Dana()),
        workers=3,
    )
    # 3 workers', their sum, and the server's copy
    assert [r.strategy / 400 for r in found.ranks] == [5, 0, 0]


def test_shared_parameters_are_on_one_rank() -> None:
    found = estimate_memory(
        nn.Linear(10, 10, bias=False),
        F.mse_loss,
        (torch.zeros(2, 10), torch.zeros(2, 10)),
        partial(torch.optim.SGD, lr=0.1),
        strategy=Hogwild,
        workers=3,
    )
    counts = 3 * 8  # updates of each rank, beside the parameters
    assert sorted(r.strategy for r in found.ranks) == [-400, -400, counts]


class TestLargestBatch:
    def test_fits_and_one_more_does_not(self) -> None:
        case = CASES["gpt"]
        estimator = MemoryEstimator(case.model(), case.loss_fn, case.batch, ADAMW)
        for policy in (None, CheckpointEvery()):
            n = estimator.largest_batch(2**22, "bf16-mixed", policy)
            peaks = [estimator.estimate("bf16-mixed", policy, size).peak for size in (n, n + 1)]
            assert peaks[0] <= 2**22 < peaks[1]

    def test_is_none_where_the_parameters_alone_do_not_fit(self) -> None:
        case = CASES["gpt"]
        estimator = MemoryEstimator(case.model(), case.loss_fn, case.batch, ADAMW)
        assert estimator.largest_batch(10_000) == 0

    def test_activations_that_do_not_grow_are_an_error(self) -> None:
        class Constant(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return self.weight.sum()

        estimator = MemoryEstimator(
            Constant(2, 2), lambda out, y: out, ((torch.zeros(2),) * 2), ADAMW
        )
        estimator._batch = torch.zeros(()), torch.zeros(())
        with pytest.raises(ConfigError, match="memory does not limit the batch"):
            estimator.largest_batch(10_000)


def test_a_model_of_70_billion_parameters_is_not_allocated() -> None:
    sizes = {"n_layers": 2, "n_heads": 64, "d_model": 53_248}  # 2 * 12 d^2 = 68e9, and embeddings
    with torch.device("meta"):
        model = GPT(vocab_size=32_000, sequence_length=64, **sizes)
    n = sum(p.numel() for p in model.parameters())
    assert n > 69e9
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    found = estimate_memory(model, next_token_loss, (tokens, tokens), ADAMW)
    assert (found.parameters, found.gradients) == (4 * n, 4 * n)
    assert found.ranks[0].optimizer == 8 * n + 4 * len(list(model.parameters()))


def test_the_model_is_left_as_it_is() -> None:
    case = CASES["gpt"]
    model = case.model().eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    estimate_memory(model, case.loss_fn, case.batch, ADAMW, precision="fp16-true")
    assert not model.training
    assert not model._forward_hooks
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert all(p.grad is None and p.dtype is torch.float32 for p in model.parameters())


class TestWhatCannotBe:
    def test_shapes_that_follow_from_values(self) -> None:
        class Masked(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x[x[:, 0] > 0])

        batch = torch.zeros(4, 3), torch.zeros(4, 2)
        with pytest.raises(ConfigError, match="memory of Masked cannot be known"):
            estimate_memory(Masked(3, 2), lambda out, y: out.mean(), batch, ADAMW)

    def test_values_that_decide_are_told(self) -> None:
        class Deciding(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum() > 0 else x

        batch = torch.zeros(4, 2), torch.zeros(4, 2)
        assert estimate_memory(Deciding(2, 2), F.mse_loss, batch, ADAMW).looks_at_values
        assert not estimate_memory(nn.Linear(2, 2), F.mse_loss, batch, ADAMW).looks_at_values

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"batch_size": 0}, "batch_size is 0"),
            ({"workers": 0}, "workers is 0"),
            ({"microbatches": 0}, "microbatches is 0"),
            ({"precision": "fp8"}, "precision is 'fp8'"),
            ({"workers": 2, "mesh": Mesh(shard=2), "engine": DeepSpeed()}, "engine is DeepSpeed"),
            ({"activation_checkpointing": CheckpointEvery()}, "has no nn.Sequential"),
            ({"blocks": ["x"]}, "blocks has 'x'"),
        ],
    )
    def test_wrong_arguments(self, options: dict[str, Any], told: str) -> None:
        batch = torch.zeros(4, 2), torch.zeros(4, 2)
        with pytest.raises(ConfigError, match=told):
            estimate_memory(nn.Linear(2, 2), F.mse_loss, batch, ADAMW, **options)
