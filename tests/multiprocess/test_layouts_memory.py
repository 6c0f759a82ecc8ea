"""The memory of sharded models, estimated on one process, against what real ranks allocate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Mesh, Trainer, connect, estimate_memory
from scaledtrain.data.steps import StepBatch
from scaledtrain.models import GPT
from scaledtrain.models.gpt import next_token_loss
from scaledtrain.parallel import FullyShard
from scaledtrain.recompute import CheckpointEvery, CheckpointPolicy
from tests.ranks import run_ranks

LENGTH = 32
BLOCK = 4 * 50_000  # 12 * 64^2 parameters, and a few more
ADAMW = partial(torch.optim.AdamW, fused=True)
Case = tuple[str, int, CheckpointPolicy | None, FullyShard]
CASES: list[Case] = [
    ("fp32", 1, None, FullyShard()),  # parameters are most of it
    ("fp32", 16, None, FullyShard()),  # activations are
    ("fp32", 16, CheckpointEvery(1), FullyShard()),
    ("fp32", 16, None, FullyShard(reshard_after_forward=False)),
    ("bf16-mixed", 1, None, FullyShard()),
    ("bf16-mixed", 16, None, FullyShard()),
]


def net() -> nn.Module:
    return GPT(vocab_size=512, sequence_length=LENGTH, n_layers=5, n_heads=2, d_model=64)


def allocated(trainer: Trainer, batch: StepBatch) -> int:
    """Bytes at most, by the allocator, in forward and backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.schedule.run(batch)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure() -> list[tuple[int, int, int]]:
    found = []
    with connect(transport="torch", timeout_seconds=100) as link:
        for precision, size, policy, engine in CASES:
            with Trainer(
                net(),
                next_token_loss,
                ADAMW,
                mesh=Mesh(shard=2),
                engine=engine,
                precision=precision,  # type: ignore[arg-type]
                activation_checkpointing=policy,
                console=False,
                link=link,
            ) as trainer:
                tokens = torch.zeros(4 * size, LENGTH, dtype=torch.long)
                loader = DataLoader(TensorDataset(tokens, tokens), batch_size=size)
                trainer.fit(loader, max_steps=2)
                batch = next(trainer.layout.steps(loader, 0, 1).epoch(0))
                states = trainer.strategy.state_dict()["updater"]["optimizer"]["state"].values()
                found.append(
                    (
                        sum(p.nbytes for p in trainer.replica.parameters),
                        sum(value.nbytes for state in states for value in state.values()),
                        # On a busy machine gloo's threads give their copies up later.
                        min(allocated(trainer, batch) for _ in range(3)),
                    )
                )
    return found


def estimate(case: Case, **options: Any) -> Any:
    precision, size, policy, engine = case
    tokens = torch.zeros(size, LENGTH, dtype=torch.long)
    return estimate_memory(
        net(),
        next_token_loss,
        (tokens, tokens),
        ADAMW,
        precision=precision,  # type: ignore[arg-type]
        activation_checkpointing=policy,
        **{"workers": 2, "mesh": Mesh(shard=2), "engine": engine, **options},
    )


def test_estimates_are_what_two_real_ranks_allocate() -> None:
    measured = run_ranks(measure, 2, timeout_seconds=180)[0]
    for case, (parameters, optimizer, computing) in zip(CASES, measured, strict=True):
        found = estimate(case)
        assert (found.parameters, found.gradients) == (parameters, parameters)
        assert len(found.ranks) == 2
        assert found.ranks[0].optimizer == optimizer
        # gloo copies what it gathers and what it reduces: not counted, as other transports do not.
        assert 0.98 * found.computing <= computing <= found.computing + 3 * BLOCK
        assert found.peak == parameters + found.batch + optimizer + found.computing


def test_what_divides_a_model_is_in_its_estimate() -> None:
    whole = estimate(CASES[1], workers=1, mesh=Mesh(), engine=None)
    halves, quarters = estimate(CASES[1]), estimate(CASES[1], workers=4, mesh=Mesh(shard=4))
    assert whole.activations == halves.activations == quarters.activations
    # Each tensor's first dim is a multiple of 4 here.
    assert whole.parameters == 2 * halves.parameters == 4 * quarters.parameters
    assert len(quarters.ranks) == 4
    assert len(estimate(CASES[1], workers=4).ranks) == 4  # of two replicas


def test_shards_that_are_offloaded_are_not_on_the_device() -> None:
    """Nor are their gradients, which with a second microbatch are all there."""
    here, offloaded = (
        estimate(CASES[0], microbatches=2, engine=FullyShard(offload=o)) for o in (False, True)
    )
    assert (here.parameters, here.batch) == (offloaded.parameters, offloaded.batch)
    assert here.computing - offloaded.computing == here.gradients
    (rank, other), update = offloaded.ranks, offloaded.updating
    assert rank == other
    assert rank.peak == offloaded.peak == offloaded.batch + offloaded.computing
    assert rank.host == 2 * offloaded.parameters + rank.optimizer + update
    assert [r.host for r in here.ranks] == [0, 0]


def test_one_rank_may_offload_all_of_a_model() -> None:
    """What it gathers is gone between blocks; two blocks are there at once, and one's gradients."""
    options = {"workers": 1, "mesh": Mesh()}
    here = estimate(CASES[0], engine=None, **options)
    offloaded = estimate(CASES[0], engine=FullyShard(offload=True), **options)
    assert offloaded.parameters == here.parameters
    ((rank,), update) = offloaded.ranks, offloaded.updating
    assert rank.peak == offloaded.peak == offloaded.batch + offloaded.computing
    assert rank.host == 2 * here.parameters + rank.optimizer + update
    assert offloaded.peak < here.peak
