"""Runs a step of training on tensors without memory, and counts what is alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.data.cut import count_samples
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.memory.fake import Fakes, batch_of, bytes_of, copied, tensors_in
from scaledtrain.memory.figures import MemoryEstimate, RankMemory
from scaledtrain.memory.gathering import gathering_of, shards_of
from scaledtrain.memory.measure import Kept, UpdateBytes, activation_bytes, most_bytes, update_bytes
from scaledtrain.memory.ranks import RankKept, bytes_kept_by_ranks
from scaledtrain.memory.search import largest
from scaledtrain.memory.stages import activations_of_stages
from scaledtrain.mesh import Mesh
from scaledtrain.parallel.engine import Engine, check_engine
from scaledtrain.parallel.pipeline.pipeline import OwnStages, Pipeline
from scaledtrain.parallel.shard import FullyShard
from scaledtrain.precision import Precision, PrecisionName
from scaledtrain.recompute.blocks import find_blocks, named_blocks
from scaledtrain.recompute.policies import CheckpointPolicy
from scaledtrain.replica import MakeOptimizer, Replica
from scaledtrain.schedule import LossFn, MicrobatchLoop, call_model
from scaledtrain.strategies.strategy import Strategy

__all__ = ["MemoryEstimator"]


class MemoryEstimator:
    """Estimates for one model, with any precision, policy and batch size.

    What the optimizer and the strategy keep is found once for each precision. Arguments, and what
    is counted: see `estimate_memory`.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        >>> batch = torch.zeros(2, 64), torch.zeros(2, 64)
        >>> adam = partial(torch.optim.AdamW, fused=True)
        >>> estimator = MemoryEstimator(model, nn.functional.mse_loss, batch, adam)
        >>> estimator.estimate("fp32").peak, estimator.estimate("bf16-true").peak
        (534088, 770112)
        >>> estimator.largest_batch(2**30)
        381152
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        batch: Any,
        optimizer: MakeOptimizer,
        *,
        microbatches: int = 1,
        strategy: Callable[[], Strategy] | None = None,
        workers: int = 1,
        mesh: Mesh | None = None,
        engine: Engine | None = None,
        pipeline: Pipeline | None = None,
        blocks: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device is {device}, which this host has not; which kernels a device has cannot "
                "be known elsewhere: leave device out, which counts as on a CPU"
            )
        for name, value in (("microbatches", microbatches), ("workers", workers)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; there is at least one")
        self._mesh = mesh or Mesh()
        self._mesh.check(workers)
        if self._mesh.pipe > 1 and self._mesh.shard > 1:
            raise ConfigError(
                f"mesh.pipe is {self._mesh.pipe} and mesh.shard is {self._mesh.shard}, but what "
                "sharded stages take is not estimated; set one of them to 1"
            )
        self._pipeline = pipeline or Pipeline()
        self._microbatches = microbatches
        if engine is not None and not isinstance(engine, FullyShard):
            raise ConfigError(
                f"engine is {engine}, but only what shards of FullyShard take is estimated; say "
                "engine=fully_shard (engine.offload=true with what is offloaded), or measure a run "
                "(memory_bytes in its metrics)"
            )
        check_engine(engine, self._mesh)
        self._engine = engine or FullyShard()
        self._model = copied(model, "meta").train()
        self._loss_fn = loss_fn
        self._batch = batch
        self._optimizer = optimizer
        self._batches_run = min(2, microbatches)  # more add to gradients that are there
        self._strategy = strategy
        self._workers = workers
        self._blocks = blocks
        self._prepared: dict[Precision, list[_Prepared]] = {}

    def estimate(
        self,
        precision: Precision | PrecisionName = "fp32",
        activation_checkpointing: CheckpointPolicy | None = None,
        batch_size: int | None = None,
    ) -> MemoryEstimate:
        """For one way to train.

        Args:
            precision: the number formats.
            activation_checkpointing: what is kept; None: everything.
            batch_size: samples; None: as many as in ``batch``.

        Raises:
            ConfigError: the parts do not fit each other, or something needs values.
        """
        size = self._size(batch_size)
        if self._mesh.pipe > 1:
            return self._of_stages(precision, activation_checkpointing, size)
        (prepared,) = self._prepare(precision)
        with Fakes() as fakes, fakes.explained(type(self._model).__name__):
            step = _Step(self, prepared, activation_checkpointing, size)
            n_read = fakes.n_read
            activations, at_the_end = activation_bytes(step.model, step.sample, step.blocks)
            computing = step.most_bytes()
            looks_at_values = fakes.n_read > n_read
        ranks = tuple(prepared.rank(kept, step.batch_bytes, computing) for kept in prepared.ranks)
        return MemoryEstimate(
            batch_size=size,
            parameters=prepared.parameters,
            buffers=prepared.buffers,
            batch=step.batch_bytes,
            gradients=prepared.gradients,
            activations=activations,
            kept=at_the_end,
            computing=computing,
            updating=prepared.update.working,
            ranks=ranks,
            peak=max(rank.peak for rank in ranks),
            looks_at_values=looks_at_values,
        )

    def largest_batch(
        self,
        memory: int,
        precision: Precision | PrecisionName = "fp32",
        activation_checkpointing: CheckpointPolicy | None = None,
    ) -> int:
        """Samples in the largest batch with which the peak fits; 0: not even one does.

        That many samples, and one more, are looked at as `estimate` does: nothing is extrapolated.

        Args:
            memory: bytes, of every rank.
            precision: the number formats.
            activation_checkpointing: what is kept; None: everything.

        Raises:
            ConfigError: as `estimate`; or activations do not grow with the batch.
        """
        if self._mesh.pipe > 1:
            return largest(
                lambda size: self._of_stages(precision, activation_checkpointing, size).peak, memory
            )
        (prepared,) = self._prepare(precision)

        def peak(size: int) -> int:
            with Fakes() as fakes, fakes.explained(type(self._model).__name__):
                step = _Step(self, prepared, activation_checkpointing, size)
                computing = step.most_bytes()
            return max(
                prepared.rank(kept, step.batch_bytes, computing).peak for kept in prepared.ranks
            )

        return largest(peak, memory)

    def _of_stages(
        self,
        precision: Precision | PrecisionName,
        policy: CheckpointPolicy | None,
        size: int,
    ) -> MemoryEstimate:
        if self._blocks is not None or (policy is not None and policy.blocks is not None):
            raise ConfigError(
                "with mesh.pipe the blocks that are computed again are those of each stage, as "
                "they are; leave blocks out"
            )
        prepared = self._prepare(precision)
        with Fakes() as fakes, fakes.explained(type(self._model).__name__):
            model = copied(prepared[0].model, self._device)
            batch = batch_of(size, self._batch, self._device)
            batch_bytes = bytes_of(tensors_in(batch)) * self._microbatches
            activations = activations_of_stages(
                fakes,
                [self._stages_of(model, rank) for rank in range(self._mesh.pipe)],
                self._loss_fn,
                batch,
                prepared[0].precision,
                policy,
                self._pipeline,
                self._microbatches,
            )
        ranks: list[RankMemory] = []
        for replica in range(self._mesh.replicas(self._workers)):
            for of_rank, found in zip(prepared, activations, strict=True):
                computing = of_rank.gradients + found.most
                ranks.append(of_rank.rank(of_rank.ranks[replica], batch_bytes, computing))
        needs_most = max(range(len(ranks)), key=lambda rank: ranks[rank].peak)
        shown = prepared[needs_most % self._mesh.pipe]
        most = activations[needs_most % self._mesh.pipe]
        return MemoryEstimate(
            batch_size=size,
            parameters=shown.parameters,
            buffers=shown.buffers,
            batch=batch_bytes * shown.steps,
            gradients=shown.gradients,
            activations=most.most,
            kept=Kept(most.kept, (), 0),
            computing=shown.gradients + most.most,
            updating=shown.update.working,
            ranks=tuple(ranks),
            peak=ranks[needs_most].peak,
            looks_at_values=any(found.looks_at_values for found in activations),
        )

    def _stages_of(self, model: nn.Module, rank: int) -> OwnStages:
        return self._pipeline.unmeasured_stages(model, rank, self._mesh.pipe, self._microbatches)

    def _size(self, batch_size: int | None) -> int:
        size = count_samples(self._batch) if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch_size is {size}; a batch has at least one sample")
        return size

    def _prepare(self, precision: Precision | PrecisionName) -> list[_Prepared]:
        """For each rank of a pipeline; for one, if there is none."""
        if isinstance(precision, str):
            precision = Precision(precision)
        # How float32 is multiplied changes no bytes, but would be set for the whole process.
        precision = replace(precision, float32_matmul=None)
        if precision not in self._prepared:
            model = precision.convert(copied(self._model, "meta"))
            with Fakes() as fakes, fakes.explained("the optimizer or the strategy"):
                self._prepared[precision] = [
                    self._prepare_rank(precision, model, rank) for rank in range(self._mesh.pipe)
                ]
        return self._prepared[precision]

    def _prepare_rank(self, precision: Precision, model: nn.Module, rank: int) -> _Prepared:
        shards, pipe, versions = self._mesh.shard, self._mesh.pipe, 0

        def make_model() -> nn.Module:
            if shards > 1:
                return shards_of(model, shards, self._device)
            whole = copied(model, self._device)
            return self._stages_of(whole, rank) if pipe > 1 else whole

        rounding = partial(precision.rounding, 0)
        replica = Replica(make_model(), self._optimizer, make_rounding=rounding)
        precision.scaler(replica)  # says in which format gradients are
        gradients = bytes_of(replica.gradients())
        update = update_bytes(replica)
        parameters = bytes_of([*replica.parameters, *replica.frozen])
        if pipe > 1:
            trained = bytes_of(replica.parameters)
            versions = self._pipeline.further_versions(rank, pipe, self._microbatches)
            parameters += trained * versions
        replicas = self._mesh.replicas(self._workers)
        kept = [RankKept(update.state, 0, updates=True, serves=False)] * replicas
        if self._strategy is not None:
            kept = bytes_kept_by_ranks(
                make_model, self._optimizer, precision, self._strategy, replicas
            )
        ranks = [of_replica for of_replica in kept for _ in range(shards)]
        buffers = bytes_of(replica.buffers)
        return _Prepared(
            precision,
            model,
            parameters,
            buffers,
            gradients,
            update,
            ranks,
            steps=max(1, versions),  # each with weights, and a batch, of its own
            offloads=self._engine.offload,
        )


@dataclass(frozen=True)
class _Prepared:
    """What depends on the precision alone."""

    precision: Precision
    model: nn.Module
    """On the meta device."""
    parameters: int
    buffers: int
    gradients: int
    update: UpdateBytes
    ranks: Sequence[RankKept]
    steps: int
    """That are under way at once."""
    offloads: bool
    """Shards, with all that belongs to them, are in the host's memory."""

    def rank(self, kept: RankKept, batch: int, computing: int) -> RankMemory:
        """What a rank has at most.

        Args:
            kept: by it.
            batch: bytes of those of one step.
            computing: bytes at most.
        """
        working = self.update.working if kept.updates else 0
        meanwhile = working if kept.serves else 0  # of another worker's gradient
        shards = self.parameters + kept.optimizer + kept.strategy
        device = self.buffers + batch * self.steps
        if self.offloads:
            host = shards + self.gradients + working + meanwhile
            return RankMemory(kept.optimizer, kept.strategy, device + computing, host)
        peak = device + shards + max(computing + meanwhile, self.gradients + working)
        return RankMemory(kept.optimizer, kept.strategy, peak, 0)


class _Step:
    """A replica on fake tensors, and a batch; inside of `Fakes`."""

    def __init__(
        self,
        of: MemoryEstimator,
        prepared: _Prepared,
        policy: CheckpointPolicy | None,
        size: int,
    ) -> None:
        self.model = copied(prepared.model, of._device)
        of_policy = None if policy is None else policy.blocks
        self.blocks = _blocks(self.model, of_policy or of._blocks, needed=policy is not None)
        self._gathering = gathering_of(self.model, of._engine, of._mesh.shard, prepared.precision)
        self._batch = batch_of(size, of._batch, of._device)
        self._loss_fn = of._loss_fn
        self._precision = prepared.precision
        self._device = of._device
        replica = Replica(self.model, of._optimizer)
        self._loop = MicrobatchLoop(
            self.model,
            of._loss_fn,
            prepared.precision,
            replica.parameters,
            scaler=prepared.precision.scaler(replica),
        )
        n = of._batches_run
        self._step = StepBatch([self._batch] * n, [size] * n)
        self.batch_bytes = bytes_of(tensors_in(self._batch)) * of._microbatches
        if policy is not None:
            policy.install(self.model, self.blocks, self.sample)

    def sample(self, called: Callable[..., Any]) -> Tensor:
        """The loss of a microbatch."""
        with self._precision.autocast(self._device):
            return call_model(called, self._batch, self._loss_fn)[1]

    def most_bytes(self) -> int:
        """That are alive at once in the forward and backward passes of every microbatch."""
        if self._gathering is None:
            return most_bytes(lambda: self._loop.run(self._step))
        self._gathering.on = True
        try:
            return most_bytes(lambda: self._loop.run(self._step))
        finally:
            self._gathering.on = False


def _blocks(model: nn.Module, names: Sequence[str] | None, needed: bool) -> list[nn.Module]:
    if names is not None:
        return named_blocks(model, names)
    try:
        return find_blocks(model)
    except ConfigError:
        if needed:
            raise
        return []
