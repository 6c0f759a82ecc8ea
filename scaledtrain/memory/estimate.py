"""How much memory training takes, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from scaledtrain.memory.estimator import MemoryEstimator
from scaledtrain.memory.figures import MemoryEstimate
from scaledtrain.mesh import Mesh
from scaledtrain.parallel.engine import Engine
from scaledtrain.parallel.pipeline.pipeline import Pipeline
from scaledtrain.precision import Precision, PrecisionName
from scaledtrain.recompute.policies import CheckpointPolicy
from scaledtrain.replica import MakeOptimizer
from scaledtrain.schedule import LossFn
from scaledtrain.strategies.strategy import Strategy

__all__ = ["estimate_memory"]


def estimate_memory(
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Any,
    optimizer: MakeOptimizer,
    *,
    precision: Precision | PrecisionName = "fp32",
    activation_checkpointing: CheckpointPolicy | None = None,
    batch_size: int | None = None,
    microbatches: int = 1,
    strategy: Callable[[], Strategy] | None = None,
    workers: int = 1,
    mesh: Mesh | None = None,
    engine: Engine | None = None,
    pipeline: Pipeline | None = None,
    blocks: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> MemoryEstimate:
    r"""How many bytes a step of training takes, activations included, without allocating them.

    The step is made, forward pass, backward pass and update, by the code that makes it in training,
    on tensors that have sizes but no memory, and what is alive is counted. So it knows what
    operators keep, of any model, and what optimizers keep, of any optimizer that does not look at
    its gradients all together or at values; and it takes seconds, for a model of 70 billion
    parameters, too. At most are alive, on a rank,

        parameters + buffers + batch + optimizer + strategy
          + max(activations and gradients while computing, gradients + what the update takes)

    and on one with a server the update's share on top, since it may come while the rank computes.

    With ``mesh.pipe`` what is not told by rank is of the rank that needs most; an asynchronous
    schedule's further versions of weights count as parameters.

    With ``mesh.shard`` parameters, gradients and optimizer are those of the largest shard; what is
    gathered of the blocks that compute, and their gradients until they are reduced, is counted
    while computing. With ``engine=FullyShard(offload=True)`` the device has, beside that, buffers
    and batch alone.

    Not counted is what is not a tensor of torch's: what a kernel needs while it runs, what an
    allocator rounds up or does not give back (on CUDA some 10 % more), the CUDA context, buffers
    of the transport between ranks, batches that are loaded ahead, evaluation. Strategies are
    counted as they are while their replicas compute, see `scaledtrain.memory.ranks`; a server's
    shards count on the first rank, all of them.

    Args:
        model: any; only the sizes of its tensors are used. Made under ``torch.device("meta")`` it
            needs no memory either.
        loss_fn: ``loss_fn(outputs, targets)``; None: the model returns its own loss.
        batch: as the loader gives it, of any number of samples.
        optimizer: a factory, as that of the `Trainer`.
        precision: the number formats, or their name.
        activation_checkpointing: which activations are computed again; None keeps all.
        batch_size: samples; None: as many as in ``batch``. Each tensor whose first dimension has as
            many entries as the batch has samples gets that many.
        microbatches: batches in a step.
        strategy: makes what replicas tell each other; None: each keeps model and optimizer.
        workers: ranks.
        mesh: their layout; None: each has a replica.
        engine: what divides parameters where ``mesh.shard`` is above 1, or offloads them; default
            `FullyShard`, the only one of which it is known.
        pipeline: how the stages are run where ``mesh.pipe`` is above 1; default `Pipeline`. They
            are cut by numbers of parameters, unless it has a ``split``; activations are those of
            all microbatches that its schedule keeps alive, messages included.
        blocks: names of the submodules that are the chain, unless the policy has some; None: they
            are found.
        device: whose kernels are meant: this host must have it.

    Raises:
        ConfigError: the parts do not fit each other; or shapes in the model follow from values.

    Example:
        Two layers of 10 numbers: 220 parameters, as many gradients, two momenta of each and 4
        counts of steps.

        >>> from functools import partial
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        >>> batch = torch.zeros(5, 10), torch.zeros(5, 10)
        >>> adam = partial(torch.optim.AdamW, fused=True)
        >>> found = estimate_memory(model, nn.functional.mse_loss, batch, adam)
        >>> found.parameters, found.gradients, found.ranks[0].optimizer  # 4 * 220, 8 * 220 + 4 * 4
        (880, 880, 1776)
        >>> found.kept.blocks  # outputs of the layers: 5 * 10 * 4 bytes
        (200, 200)
    """
    estimator = MemoryEstimator(
        model,
        loss_fn,
        batch,
        optimizer,
        microbatches=microbatches,
        strategy=strategy,
        workers=workers,
        mesh=mesh,
        engine=engine,
        pipeline=pipeline,
        blocks=blocks,
        device=device,
    )
    return estimator.estimate(precision, activation_checkpointing, batch_size)
