"""A replica's stages on the ranks of a pipeline, as a layout needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from scaledtrain.comm.process_group import device_of_messages, meet_in_pairs
from scaledtrain.comm.protocols import Group, Link
from scaledtrain.data.cut import count_samples
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.parallel.engine import Recipe
from scaledtrain.parallel.pipeline.cut import cut_step
from scaledtrain.parallel.pipeline.execute import PipelineSchedule
from scaledtrain.parallel.pipeline.pipedream import PipeDreamSchedule, delays
from scaledtrain.parallel.pipeline.pipeline import OwnStages, Pipeline
from scaledtrain.parallel.pipeline.pipemare import pipemare
from scaledtrain.parallel.pipeline.recompute import Called, StageMemory, seen_calls
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import CheckpointPolicy
from scaledtrain.replica import MakeScheduler

if TYPE_CHECKING:
    from scaledtrain.loss_scale import LossScaler

__all__ = ["Pipe", "StagesSchedule"]

StagesSchedule = PipelineSchedule | PipeDreamSchedule


@dataclass(frozen=True)
class Pipe:
    """This rank's stages, and what is needed to run them.

    Args:
        stages: of this rank.
        pipeline: what was asked for.
        links: among the ranks of the pipeline, one for each direction.
        recipe: of the training.
    """

    stages: OwnStages
    pipeline: Pipeline
    links: Sequence[Link]
    recipe: Recipe

    @classmethod
    def of(
        cls,
        model: nn.Module,
        pipeline: Pipeline,
        links: Sequence[Link],
        recipe: Recipe,
        job: Group,
    ) -> Pipe:
        """Cut a model. Collective, of all ranks of the job."""
        if recipe.compile is not None:
            raise ConfigError(
                f"compile is {recipe.compile!r}, and mesh.pipe above 1, whose stages are run part "
                "by part and are not compiled; leave one of them out"
            )
        link = links[0]
        stages = pipeline.own_stages(model, link.group, recipe, link.device, job)
        if pipeline.is_asynchronous and stages.tied:
            raise ConfigError(
                f"pipeline.schedule is {pipeline.schedule}, but stages have weights in common "
                f"({stages.tied[0][0].name}), whose gradients it would add up from different "
                "steps; untie them (model.tied_embedding=false), or choose 1F1B"
            )
        return cls(stages, pipeline, links, recipe)

    def check_shardable(self) -> None:
        """Raise ConfigError where stages cannot be sharded."""
        if self.stages.tied:
            raise ConfigError(
                f"mesh.shard is above 1, but stages have weights in common "
                f"({self.stages.tied[0][0].name}), which cannot be sharded as well; untie them "
                "(model.tied_embedding=false), or set mesh.shard to 1"
            )
        if self.pipeline.schedule not in ("GPipe", "1F1B", "Interleaved1F1B"):
            raise ConfigError(
                f"mesh.shard is above 1, but pipeline.schedule is {self.pipeline.schedule}, which "
                "takes backward passes apart, or keeps old weights, and so misses fully_shard's "
                "hooks; choose GPipe, 1F1B or Interleaved1F1B, or set mesh.shard to 1"
            )

    def recompute(
        self, policy: CheckpointPolicy, batch: Any, schedule: StagesSchedule, sharded: bool
    ) -> Executor:
        """Let a policy decide what each stage here keeps. Collective.

        Args:
            policy: it is tried out on what each stage is really given, but where stages are
                sharded: they run only in a step that all ranks make.
            batch: as large as any.
            schedule: of the stages.
            sharded: whether they are.

        Raises:
            ConfigError: it cannot; where stages are sharded, if it has to measure.
        """
        own, pipeline, recipe = self.stages, self.pipeline, self.recipe
        step = StepBatch([batch], [count_samples(batch)])
        microbatch = cut_step(step, pipeline.n_microbatches)[0].batch
        calls: dict[int, Called] = {}
        if not sharded:
            whole = StepBatch([microbatch], [count_samples(microbatch)])
            calls = seen_calls(own.stages, lambda: schedule.predict(whole))
        live = pipeline.live_of_stages(self.links[0].group.size, recipe.gradient_accumulation_steps)
        found: list[Executor] = []

        def remove() -> None:
            for executor in found[1:]:
                executor.remove()

        try:
            for number, stage in own.stages.items():
                blocks = own.blocks(number)
                if sharded:
                    found.append(policy.install(stage, blocks, None))
                    continue
                loss_fn, precision = recipe.loss_fn, recipe.precision
                memory = StageMemory(
                    number, own.n_stages, calls[number], microbatch, loss_fn, precision
                )
                alive = memory.live(live[number], len(own.stages))
                found.append(memory.install(policy, stage, blocks, alive))
        except BaseException:
            for executor in found:
                executor.remove()
            raise
        told = [f"stage {n}: {e.told}" for n, e in zip(own.stages, found, strict=True) if e.told]
        found[0].when_removed(remove)
        found[0].told = "\n".join(told)
        return found[0]

    def check_pushes(self, strategy: str) -> None:
        """Raise ConfigError where gradients come in other steps than the batches they are of."""
        if self.pipeline.is_asynchronous:
            raise ConfigError(
                f"pipeline.schedule is {self.pipeline.schedule}, whose stages have the gradient of "
                f"a batch some steps later, but {strategy} pushes one of the whole replica in each "
                "step; choose 1F1B, or a strategy whose replicas have optimizers (sync, local_sgd, "
                "diloco)"
            )

    def full_state_dict(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The whole model's on the first rank of the pipeline, empty on others; all call this.

        Args:
            own: of this rank's stages, in the host's memory.
        """
        link = self.links[0]
        group = link.process_group()
        device = device_of_messages(group, link.device)
        if link.group.rank > 0:
            dist.send_object_list([own], group=group, group_dst=0, device=device)
            return {}
        found = dict(own)
        for rank in range(1, link.group.size):
            received: list[Any] = [None]
            dist.recv_object_list(received, group=group, group_src=rank, device=device)
            found = {**received[0], **found}  # of tied weights the first stage's
        return {name: found[name] for name in self.stages.names}

    def schedule(self, scaler: LossScaler, sharded: bool, replicas: int) -> StagesSchedule:
        """What runs the stages; see `Layout.schedule`.

        Args:
            scaler: of the loss.
            sharded: whether the stages are.
            replicas: how many have such stages.
        """
        forth, back = (link.process_group() for link in self.links)
        link, pipeline, stages = self.links[0], self.pipeline, self.stages.stages
        if link.device.type == "cuda":
            _begin_backward_thread(link.device)
            if device_of_messages(forth, link.device).type == "cuda":
                meet_in_pairs(forth, back, link.device)
        if pipeline.is_asynchronous:
            (stage,) = stages.values()
            return PipeDreamSchedule(
                pipeline.schedule,  # type: ignore[arg-type]
                stage,
                pipeline.n_microbatches,
                self.recipe.loss_fn,
                forth,
                back,
                batches=self.recipe.gradient_accumulation_steps,
                loss_weight=self.recipe.loss_weight,
                precision=self.recipe.precision,
                timeout_seconds=link.timeout_seconds,
                timeline=link.timeline,
            )
        return PipelineSchedule(
            pipeline.schedule,
            stages,
            pipeline.n_microbatches,
            self.recipe.loss_fn,
            forth,
            back,
            batches=self.recipe.gradient_accumulation_steps,
            n_stages=self.stages.n_stages,
            loss_weight=self.recipe.loss_weight,
            precision=self.recipe.precision,
            scaler=scaler,
            tied=self.stages.tied,
            equalizes=replicas > 1 or self.recipe.precision.rounds_at_random,
            recomputed=self.recipe.recomputed,
            sharded=sharded,
            device=link.device,
            timeout_seconds=link.timeout_seconds,
            timeline=link.timeline,
        )

    def scheduler(self, make: MakeScheduler | None) -> MakeScheduler | None:
        """A learning-rate schedule, with the correction for this rank's staleness.

        Raises:
            ConfigError: there is nothing to correct on any rank.
        """
        if self.pipeline.anneal_steps is None:
            return make
        group = self.links[0].group
        n = self.recipe.gradient_accumulation_steps * self.pipeline.n_microbatches
        late = delays(self.pipeline.schedule, group.size, n)  # type: ignore[arg-type]
        if max(late) < 2:
            raise ConfigError(
                "pipeline.anneal_steps divides learning rates by powers of how many updates late "
                f"a stage's gradients are, but with {self.pipeline.schedule} on {group.size} ranks "
                f"and {n} microbatches in a step that is at most {max(late)}; leave it out, or "
                "take PipeDream with two ranks more than a step has microbatches, or with still "
                "more"
            )
        return pipemare(late[group.rank], self.pipeline.anneal_steps, make)


def _begin_backward_thread(device: torch.device) -> None:
    """Run a kernel in the thread that goes backwards on this GPU, so that it is at home there.

    A stage that is not the last one begins with a matrix product, and cuBLAS warns where it is the
    first to come.
    """
    with torch.enable_grad():
        torch.zeros((), device=device, requires_grad=True).exp().backward()  # type: ignore[no-untyped-call]
