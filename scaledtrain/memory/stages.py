"""What the schedule of a pipeline keeps alive of activations, on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from scaledtrain.data.cut import count_samples
from scaledtrain.data.steps import StepBatch
from scaledtrain.memory.fake import Fakes
from scaledtrain.parallel.pipeline.cut import cut_step
from scaledtrain.parallel.pipeline.parts import spread
from scaledtrain.parallel.pipeline.pipeline import OwnStages, Pipeline
from scaledtrain.parallel.pipeline.recompute import Called, StageMemory
from scaledtrain.precision import Precision
from scaledtrain.recompute.apart import kept_and_peak_bytes
from scaledtrain.recompute.policies import CheckpointPolicy
from scaledtrain.schedule import LossFn, as_arguments, inputs_and_targets

__all__ = ["RankActivations", "activations_of_stages"]


class RankActivations(NamedTuple):
    """Bytes of a rank's activations, of all microbatches under way at once."""

    kept: int
    """Between forward and backward passes."""
    most: int
    """Messages included."""
    looks_at_values: bool
    """The stages do, which fake tensors have not."""


def activations_of_stages(
    fakes: Fakes,
    ranks: Sequence[OwnStages],
    loss_fn: LossFn | None,
    batch: Any,
    precision: Precision,
    policy: CheckpointPolicy | None,
    pipeline: Pipeline,
    batches: int,
) -> list[RankActivations]:
    """For each rank of a pipeline.

    Args:
        fakes: inside of which this is.
        ranks: the stages of each, in the precision's format.
        loss_fn: as for `estimate_memory`, also for the following.
        batch: whole, of which the schedule makes microbatches.
        precision: of the forward passes.
        policy: None: everything is kept.
        pipeline: how it is run.
        batches: in a step.

    Raises:
        ConfigError: the policy does not fit the stages.
    """
    step = StepBatch([batch], [count_samples(batch)])
    microbatch = cut_step(step, pipeline.n_microbatches)[0].batch
    calls = _calls(ranks, loss_fn, microbatch, precision)
    live = pipeline.live_of_stages(len(ranks), batches)
    found = []
    for own in ranks:
        kept = messages = working = n_read = 0
        for number, stage in own.stages.items():
            memory = StageMemory(
                number, own.n_stages, calls[number], microbatch, loss_fn, precision
            )
            alive = memory.live(live[number], len(own.stages))
            if policy is not None:
                policy.install_on_stage(stage, own.blocks(number), memory.sample, alive)
            before = fakes.n_read
            of_one, peak = kept_and_peak_bytes(stage, memory.sample)
            n_read += fakes.n_read - before
            kept += alive.microbatches * of_one
            messages += alive.microbatches * alive.bytes_each + alive.bytes_once
            working = max(working, peak - of_one)
        found.append(RankActivations(kept, kept + messages + working, n_read > 0))
    return found


@torch.no_grad()
def _calls(
    ranks: Sequence[OwnStages], loss_fn: LossFn | None, batch: Any, precision: Precision
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
