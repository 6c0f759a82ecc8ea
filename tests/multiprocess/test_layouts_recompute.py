"""Activations under fully_shard: plans keep to a budget, and change no bit of what is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Mesh, Trainer, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT
from scaledtrain.models.gpt import next_token_loss
from scaledtrain.parallel import FullyShard, Pipeline
from scaledtrain.recompute import (
    CheckpointEvery,
    CheckpointPolicy,
    CheckpointSqrt,
    MemoryBudget,
    Selective,
)
from scaledtrain.recompute.chain import Chain
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.recompute.plan import ELSEWHERE, Keep, Plan
from tests.ranks import run_ranks

LENGTH = 48
# Of 8 x 48 tokens of 8 numbers a block keeps at least 8 * 48 * 8 * 4 = 12288 bytes; it has
# 12 * 8^2 parameters and a few more, some 3.5 KB, that are gathered once or twice at a time.
GATHERED = 4 * 3_600


def net() -> nn.Module:
    torch.manual_seed(1)
    return GPT(vocab_size=11, sequence_length=LENGTH, n_layers=6, n_heads=2, d_model=8, dropout=0.1)


def loader(local: int = 8) -> DataLoader[Any]:
    tokens = torch.randint(11, (32, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=local)


def trainer(link: Link, policy: CheckpointPolicy | None, **options: Any) -> Trainer:
    return Trainer(
        net(),
        next_token_loss,
        partial(torch.optim.SGD, lr=0.1),
        mesh=Mesh(shard=2),
        activation_checkpointing=policy,
        console=False,
        link=link,
        **options,
    )


def forced(way: str, is_meant: bool) -> AbstractContextManager[Any]:
    """Inside, all blocks run in one way, if that is meant, whatever is fastest."""

    def plan(chain: Chain, peak_bytes: int) -> Plan:
        return (*(Keep(way),) * (len(chain) - 1), Keep())

    return mock.patch("scaledtrain.recompute.budget._plan", plan) if is_meant else nullcontext()


def run(cases: list[tuple[CheckpointPolicy | None, dict[str, Any]]]) -> list[Any]:
    found: list[Any] = []
    with connect(transport="torch", timeout_seconds=100) as link:
        for policy, options in cases:
            offloads = isinstance(policy, MemoryBudget) and policy.offload is not None
            try:
                with forced(ELSEWHERE, offloads), trainer(link, policy, **options) as trained:
                    trained.fit(loader(), max_epochs=1)
                    batch = next(trained.layout.steps(list(loader()), 0, 1).epoch(0))
                    with LiveBytes() as counted:
                        trained.schedule.run(batch)
                    found.append((trained.full_state_dict(), int(counted.peak)))
            except ConfigError as error:
                found.append(str(error))
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_plans_keep_to_the_budget_and_change_no_bit() -> None:
    budgets = {"fp32": (2600, 1600, 900), "bf16-mixed": (2400, 1400, 800)}  # KiB
    cases: list[tuple[CheckpointPolicy | None, dict[str, Any]]] = []
    for precision, sizes in budgets.items():
        policies = [None, CheckpointEvery(1), Selective(), *(MemoryBudget(n * 1024) for n in sizes)]
        policies.append(MemoryBudget(sizes[-1] * 1024, offload="disk"))  # see `run`
        cases += [(policy, {"precision": precision}) for policy in policies]
    found = run_ranks(run, 2, cases, timeout_seconds=150)[0]
    for place, sizes in enumerate(budgets.values()):
        (expected, everything), *others = found[7 * place : 7 * place + 7]
        assert all(equal(trained, expected) for trained, _ in others)
        for n, (_, peak) in zip((*sizes, sizes[-1]), others[2:], strict=True):
            assert peak <= n * 1024 + GATHERED
        assert everything > sizes[0] * 1024 + GATHERED  # else nothing is computed again


def test_what_cannot_be_is_an_error_on_every_rank() -> None:
    nested = FullyShard(block_classes=["_FeedForward"])
    cases = [
        (MemoryBudget("20KiB"), {}),
        (CheckpointSqrt(), {}),
        (CheckpointEvery(2), {}),
        (CheckpointEvery(1), {"engine": nested}),
    ]
    for told in run_ranks(run, 2, cases, timeout_seconds=120):
        small, sqrt, pairs, inside = told
        assert "do not fit into 20480 bytes" in small
        assert "raise the budget" in small
        assert "3 blocks are to be computed again together" in sqrt
        assert "choose a policy that takes them one by one" in pairs
        assert (
            "engine.block_classes has _FeedForward, modules inside of the blocks (_Block)" in inside
        )


def one_rank_has_more(budget: int) -> str:
    with connect(transport="torch", timeout_seconds=100) as link:
        long, short = torch.zeros(8, LENGTH, dtype=torch.long), torch.zeros(8, 4, dtype=torch.long)
        batches = [(long, long), (short, short)]
        trained = trainer(link, MemoryBudget(budget))
        with pytest.raises(ConfigError) as caught:
            trained.fit(batches, max_epochs=1)
        trained.close()
        return str(caught.value)


def test_a_rank_whose_batch_does_not_fit_ends_the_others() -> None:
    first, second = run_ranks(one_rank_has_more, 2, 200 * 1024, timeout_seconds=120)
    assert "do not fit into 204800 bytes" in first
    assert second == (
        "another rank of this replica cannot run with this activation checkpointing; its own error "
        "says why"
    )


def stages(cases: list[tuple[str, CheckpointPolicy | None, dict[str, Any]]]) -> list[Any]:
    """Of each case: this rank's parameters after an epoch, and the peak of a step; or the error."""
    found: list[Any] = []
    with connect(transport="torch", timeout_seconds=100) as link:
        for schedule, policy, options in cases:
            trained = Trainer(
                net(),
                next_token_loss,
                partial(torch.optim.SGD, lr=0.1),
                mesh=Mesh(pipe=2),
                pipeline=Pipeline(schedule, n_microbatches=4),
                activation_checkpointing=policy,
                console=False,
                link=link,
                **options,
            )
            try:
                with trained:
                    trained.fit(loader(32), max_epochs=2)
                    batch = next(trained.layout.steps(list(loader(32)), 0, 1).epoch(0))
                    with LiveBytes() as counted:
                        trained.schedule.run(batch)
                    own = {n: p.detach().clone() for n, p in trained.model.named_parameters()}
                    found.append((own, int(counted.peak)))
            except ConfigError as error:
                found.append(str(error))
    return found


# Gradients of the rank's blocks, added up one at a time, and embeddings; no activations.
GRADIENTS = 4 * 3 * 1_000


def test_a_rank_of_a_pipeline_keeps_to_its_budget_and_changes_no_bit() -> None:
    """GPipe keeps 4 microbatches alive, 1F1B 2 and 1, of 8 samples each."""
    budgets = {"GPipe": (3000, 1300), "1F1B": (1700, 1100), "Interleaved1F1B": (4000, 2600)}
    cases: list[tuple[str, CheckpointPolicy | None, dict[str, Any]]] = []
    for schedule, sizes in budgets.items():
        cases.append((schedule, None, {}))
        cases += [(schedule, MemoryBudget(n * 1024), {}) for n in sizes]
        cases.append((schedule, CheckpointEvery(1), {}))
    cases.append(("1F1B", MemoryBudget("20KiB"), {}))
    for rank, of_rank in enumerate(run_ranks(stages, 2, cases, timeout_seconds=200)):
        for place, sizes in enumerate(budgets.values()):
            (expected, everything), *others = of_rank[4 * place : 4 * place + 4]
            assert all(equal(trained, expected) for trained, _ in others)
            for n, (_, peak) in zip(sizes, others, strict=False):
                assert peak <= n * 1024 + GRADIENTS
            if rank == 0:
                assert everything > sizes[0] * 1024 + GRADIENTS
        assert "do not fit into 20480 bytes" in of_rank[-1]


class OwnLoss(nn.Module):
    """Called with inputs and targets, which go from part to part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(_Passing() for _ in range(3))
        self.loss = _Loss()

    def pipeline_parts(self) -> list[nn.Module]:
        return [*self.blocks, self.loss]


class _Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.inner(x)), y


class _Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.head(x), y)


def with_own_loss() -> list[dict[str, Tensor]]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    found = []
    with connect(transport="torch", timeout_seconds=60) as link:
        for policy in (None, CheckpointEvery(1)):
            with Trainer(
                OwnLoss(),
                None,
                partial(torch.optim.SGD, lr=0.1),
                mesh=Mesh(pipe=2),
                pipeline=Pipeline("1F1B", n_microbatches=2),
                activation_checkpointing=policy,
                console=False,
                link=link,
            ) as trained:
                trained.fit([(x, x.sum(1, keepdim=True))], max_epochs=2)
                found.append({n: p.detach().clone() for n, p in trained.model.named_parameters()})
    return found


def test_stages_of_a_model_with_a_loss_of_its_own_compute_activations_again() -> None:
    for kept, again in run_ranks(with_own_loss, 2, timeout_seconds=60):
        assert equal(again, kept)
