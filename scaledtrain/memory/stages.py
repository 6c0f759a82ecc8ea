"""What each rank of a pipeline has of a model, and what its schedule keeps alive of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaledtrain.data.replica_loader import StepBatch, count_samples
from scaledtrain.memory.fake import bytes_of
from scaledtrain.memory.measure import UpdateBytes, update_bytes
from scaledtrain.parallel.pipeline.cut import cut_step
from scaledtrain.parallel.pipeline.parts import spread
from scaledtrain.parallel.pipeline.pipeline import OwnStages, Pipeline
from scaledtrain.parallel.pipeline.recompute import Called, StageMemory
from scaledtrain.precision import Precision
from scaledtrain.recompute.apart import kept_and_peak_bytes
from scaledtrain.recompute.policies import CheckpointPolicy
from scaledtrain.replica import MakeOptimizer, Replica
from scaledtrain.schedule import LossFn, as_arguments, inputs_and_targets

__all__ = ["RankOfStages", "ranks_of_stages"]


@dataclass(frozen=True)
class RankOfStages:
    """Bytes of one rank of a pipeline."""

    parameters: int
    buffers: int
    gradients: int
    update: UpdateBytes
    kept: int
    """Activations between forward and backward passes, of all microbatches under way at once."""
    activations: int
    """At most, messages included."""


def ranks_of_stages(
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Any,
    optimizer: MakeOptimizer,
    precision: Precision,
    policy: CheckpointPolicy | None,
    pipeline: Pipeline,
    n_ranks: int,
    batches: int,
) -> Iterator[RankOfStages]:
    """For each rank of a pipeline what it takes; inside of `Fakes`.

    Args:
        model: in the precision's format.
        loss_fn: as for `estimate_memory`, also for the following.
        batch: whole, of which the schedule makes microbatches.
        optimizer: a factory.
        precision: of the forward passes.
        policy: None: everything is kept.
        pipeline: how it is run.
        n_ranks: of the pipeline.
        batches: in a step.

    Raises:
        ConfigError: the model would have to be traced, or does not fit the policy.
    """
    step = StepBatch([batch], [count_samples(batch)])
    microbatch = cut_step(step, pipeline.n_microbatches)[0].batch
    ranks = [pipeline.unmeasured_stages(model, rank, n_ranks, batches) for rank in range(n_ranks)]
    calls = _calls(ranks, loss_fn, microbatch, precision)
    live = pipeline.live_of_stages(n_ranks, batches)
    for own in ranks:
        kept = activations = working = 0
        for number, stage in own.stages.items():
            memory = StageMemory(
                number, own.n_stages, calls[number], microbatch, loss_fn, precision
            )
            alive = memory.live(live[number], len(own.stages))
            if policy is not None:
                memory.install(policy, stage, own.blocks(number), alive)
            of_one, peak = kept_and_peak_bytes(stage, memory.sample)
            kept += live[number] * of_one
            activations += live[number] * (of_one + alive.bytes_each) + alive.bytes_once
            working = max(working, peak - of_one)
        replica = Replica(own, optimizer)
        precision.scaler(replica)  # says in which format gradients are
        gradients = bytes_of(replica.gradients())
        parameters = bytes_of([*replica.parameters, *replica.frozen])
        update = update_bytes(replica)
        replica.zero_grad()
        yield RankOfStages(
            parameters, bytes_of(own.buffers()), gradients, update, kept, activations + working
        )


@torch.no_grad()
def _calls(
    ranks: list[OwnStages], loss_fn: LossFn | None, batch: Any, precision: Precision
) -> dict[int, Called]:
    stages = dict(sorted((n, stage) for own in ranks for n, stage in own.stages.items()))
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if loss_fn is not None:
        args = (inputs_and_targets(batch)[0],)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        args = as_arguments(batch)
    calls = {}
    device = next(ranks[0].parameters()).device
    for number, stage in stages.items():
        with precision.autocast(device):
            output = stage(*args, **kwargs)
        calls[number] = Called(args, kwargs, output)
        args, kwargs = spread(output), {}
    return calls
