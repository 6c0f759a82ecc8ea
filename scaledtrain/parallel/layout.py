"""A model on the ranks of a mesh: what each rank has of it, and whom it talks to about what."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scaledtrain.balance.balancer import Balancer
from scaledtrain.balance.loader import BalancedLoader
from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group, Link
from scaledtrain.comm.votes import any_rank
from scaledtrain.data.cut import to_device
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.data.steps import Steps, Weigh
from scaledtrain.errors import ClusterError, ConfigError
from scaledtrain.mesh import Mesh
from scaledtrain.parallel.batches import AgreedBatches
from scaledtrain.parallel.engine import Divided, DividedSchedule, Engine, Recipe, check_engine
from scaledtrain.parallel.pipe import Pipe, StagesSchedule
from scaledtrain.parallel.pipeline.pipeline import Pipeline
from scaledtrain.parallel.shard import FullyShard
from scaledtrain.parallel.whole_tensors import for_stages
from scaledtrain.recompute import CheckpointPolicy, Executor, checkpoint_activations
from scaledtrain.recompute.apart import Sample
from scaledtrain.replica import MakeOptimizer, MakeScheduler
from scaledtrain.schedule import MicrobatchLoop, Schedule

if TYPE_CHECKING:
    from scaledtrain.drop_compute import DropCompute
    from scaledtrain.loss_scale import LossScaler
    from scaledtrain.schedule import Slowdown
    from scaledtrain.strategies import Strategy

__all__ = ["Layout", "lay_out"]


class Layout:
    """One rank's piece of a model, and the ranks that this rank shares it, or the model, with.

    Made by `lay_out`. It composes what each axis of the mesh asks for; nothing knows more than one.

    Args:
        model: this rank's piece of it.
        link: to the ranks that have the same piece of other replicas: the strategy's.
        pieces: all ranks of this replica; None: this one.
        shards: of this rank's piece, and the ranks that have the others; None: it is whole.
        pipe: this rank's stages, and what runs them; None: it has the whole chain.

    Attributes:
        model: as given.
        link: as given.
        pieces: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        link: Link,
        pieces: Group | None = None,
        shards: tuple[Divided, Group] | None = None,
        pipe: Pipe | None = None,
    ) -> None:
        self.model = model
        self.link = link
        self.pieces: Group = pieces or LocalGroup()
        self._shards = shards
        self._pipe = pipe
        self._stages: StagesSchedule | None = None

    @property
    def _shard_group(self) -> Group:
        return LocalGroup() if self._shards is None else self._shards[1]

    @property
    def is_whole(self) -> bool:
        """Whether this rank has all of the model, as plain tensors on the device."""
        return self.pieces.size == 1 and self._shards is None

    @property
    def shards(self) -> Group:
        """The ranks that have shards of the tensors of which this rank has one."""
        return self._shard_group

    @property
    def updated_together(self) -> Group:
        """The ranks of this replica that make each update together, with one norm of all gradients.

        Stages of an asynchronous pipeline make it each by itself.
        """
        if self._pipe is not None and self._pipe.pipeline.is_asynchronous:
            return LocalGroup()
        return self.pieces

    @property
    def stage_ranks(self) -> int:
        """How many ranks of this replica have different stages of the model."""
        return 1 if self._pipe is None else self._pipe.links[0].group.size

    @property
    def parts(self) -> Sequence[int]:
        """How many parts of the model each of the stages has, of all ranks; none: it is whole."""
        return () if self._pipe is None else self._pipe.stages.counts

    @property
    def told(self) -> str:
        """About the layout, for people to read."""
        return "" if self._pipe is None else self._pipe.stages.told

    @property
    def data_ranks(self) -> int:
        """How many ranks of this replica train on different samples."""
        return self._shard_group.size

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's tensors, also frozen ones, in the model's order."""
        if self._shards is not None:
            return self._shards[0].named_parameters
        return list(self.model.named_parameters())

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """This rank's, by the names that the whole model has for them."""
        if self._pipe is None:
            return list(self.model.named_modules())
        stages = self._pipe.stages.stages.values()
        return [item for stage in stages for item in stage.named_modules() if item[0]]

    @property
    def in_memory(self) -> bool:
        """Whether `named_parameters` have their values between steps."""
        return self._shards is None or self._shards[0].in_memory

    def counted_elsewhere(self) -> set[str]:
        """Names of parameters that another rank of this replica has as well, and counts."""
        return set() if self._pipe is None else self._pipe.stages.counted_elsewhere()

    def recompute(
        self, policy: CheckpointPolicy, sample: Sample, compile: str | None, batch: Any
    ) -> Executor:
        """Let a policy decide what this rank's piece keeps. Collective.

        Args:
            policy: it is tried out, where a piece can be run alone.
            sample: of the model's loss of that batch.
            compile: as `checkpoint_activations` has it.
            batch: as large as any.

        Raises:
            ConfigError: it cannot.
        """
        if self._pipe is None:
            stand_in = None if self._shards is None else self._shards[0].stand_in(policy.blocks)
            return checkpoint_activations(
                self.model, policy, sample, compile=compile, stand_in=stand_in
            )
        if policy.blocks is not None or compile is not None:
            raise ConfigError(
                "with mesh.pipe the blocks that are computed again are those of each stage, as "
                "they are; leave activation_checkpointing.blocks and compile out"
            )
        assert self._stages is not None
        return self._pipe.recompute(policy, batch, self._stages, self._shards is not None)

    def scheduler(self, make: MakeScheduler | None) -> MakeScheduler | None:
        """A learning-rate schedule as this piece of the model wants it."""
        return make if self._pipe is None else self._pipe.scheduler(make)

    def steps(
        self,
        loader: Iterable[Any],
        replica: int,
        replicas: int,
        *,
        accumulation: int = 1,
        seed: int = 0,
        alone: bool = False,
        balancer: Balancer | None = None,
        weigh: Weigh | None = None,
        batches_per_step: int | None = None,
    ) -> Steps:
        """This rank's share of a loader's batches.

        Args:
            loader: see `ReplicaLoader`, also for the rest.
            replica: this rank's.
            replicas: how many share the batches.
            accumulation: batches of a step on each rank.
            seed: of the order of the samples.
            alone: this replica is in step with no other.
            balancer: tells how many samples each replica takes; None: as many as the others.
            weigh: how much a batch counts; default: its samples.
            batches_per_step: of all ranks together, instead of ``accumulation``.
        """
        group, device = self._shard_group, self.link.device
        if alone and self._shards is not None and self._shards[0].needs_lockstep:
            raise ConfigError(
                "the replicas of this strategy go their own way, but this engine has to know when "
                "others write into its parameters; take engine=fully_shard, or a strategy whose "
                "replicas step together (sync, local_sgd, diloco)"
            )
        if alone:  # all ranks of a replica have the same places in the epoch
            rank, ranks, share = replica, replicas, (group.rank, group.size)
        else:
            rank, ranks, share = replica * group.size + group.rank, replicas * group.size, (0, 1)
        own: Steps
        if balancer is not None:
            own = BalancedLoader(
                loader,
                balancer,
                replica=replica,
                piece=(group.rank, group.size),
                accumulation=accumulation,
                seed=seed,
                device=device,
                alone=alone,
                weigh=weigh,
                batches_per_step=batches_per_step,
            )
        else:
            own = ReplicaLoader(
                loader,
                rank=rank,
                replicas=ranks,
                accumulation=accumulation,
                seed=seed,
                device=device,
                alone=alone,
                share=share,
                weigh=weigh,
                batches_per_step=batches_per_step,
            )
        return own if self._shards is None else AgreedBatches(own, group, device)

    @property
    def called(self) -> Callable[..., Any]:
        """What runs the model in a step."""
        return self.model if self._shards is None else self._shards[0].called

    def optimizer(self, usual: MakeOptimizer) -> MakeOptimizer:
        """What makes the optimizer of `named_parameters`."""
        made = usual if self._pipe is None else for_stages(usual)
        return made if self._shards is None else self._shards[0].optimizer(made)

    def scaler(self, usual: Callable[[], LossScaler]) -> LossScaler:
        """What runs backward passes."""
        return usual() if self._shards is None else self._shards[0].scaler(usual)

    def schedule(self, loop: MicrobatchLoop, scaler: LossScaler) -> Schedule:
        """What runs the forward and backward passes of a step.

        Args:
            loop: runs a whole model's, without more ado.
            scaler: of the loss.
        """
        schedule: Schedule = loop
        if self._pipe is not None:
            sharded, replicas = self._shards is not None, self.link.group.size
            schedule = self._stages = self._pipe.schedule(scaler, sharded, replicas)
        if self._shards is not None:
            schedule = DividedSchedule(schedule, self._shards[0], scaler)
        return schedule

    @property
    def saved_elsewhere(self) -> Collection[str]:
        """Names of parameters that `state_dict` has on another rank of this replica."""
        return () if self._shards is None else self._shards[0].saved_elsewhere

    def state_dict(self) -> Mapping[str, Any]:
        """What this rank saves of the model; the ranks of the replica call this together."""
        self.refresh()
        if self._shards is not None:
            return self._shards[0].state_dict(self.model)
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the ranks of the replica call this together."""
        if self._shards is not None:
            self._shards[0].load_state_dict(self.model, state)
        else:
            self.model.load_state_dict(state)

    def full_state_dict(self) -> dict[str, Any]:
        """The whole model's, on the host; on the first rank of this replica, empty on others.

        All ranks of the replica call this together.
        """
        self.refresh()
        if self._shards is not None:
            is_first = self._shard_group.rank == 0
            own = self._shards[0].full_state_dict(keep=is_first)
        else:
            is_first = True
            own = copy.deepcopy(to_device(self.model.state_dict(), torch.device("cpu")))
        return self._pipe.full_state_dict(own) if self._pipe is not None and is_first else own

    def check_fits(
        self, strategy: Strategy, drop_compute: DropCompute | None, slowdown: Slowdown | None
    ) -> None:
        """See that ranks which have a replica together can run all microbatches together.

        Raises:
            ConfigError: something lets one of them go its own way.
        """
        if self.is_whole:
            return
        if drop_compute is not None and math.isfinite(drop_compute.threshold_seconds):
            raise ConfigError(
                "drop_compute lets each rank end a step by itself, but with mesh.shard, mesh.pipe "
                "or an engine each microbatch is computed to its end; leave one of them out"
            )
        if self._pipe is not None and slowdown is not None and slowdown.slows:
            raise ConfigError(
                "slowdown makes a rank compute slower, but with mesh.pipe a schedule decides what "
                "it computes when; leave one of them out"
            )
        if self._pipe is not None and strategy.pushes_gradients:
            self._pipe.check_pushes(str(strategy))
        if strategy.may_abandon:
            raise ConfigError(
                f"{strategy} lets each rank abandon a step by itself, but with mesh.shard, "
                "mesh.pipe or an engine it is computed to its end; choose a policy that does not "
                "stop work under way, or plain replicas of one rank"
            )

    def refresh(self) -> None:
        """Let the model compute with the values that `named_parameters` have now. Collective."""
        if self._shards is not None:
            self._shards[0].refresh()
        if self._stages is not None:
            self._stages.refresh()

    def share_buffers(self) -> None:
        """Give all ranks of this replica the first one's running statistics."""
        if self._shards is not None:
            self._shard_group.broadcast(list(self.model.buffers()))

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole of a tensor of which this rank has the part that it has of that parameter.

        Args:
            name: of the parameter.
            tensor: of the same shape as this rank's part, or it is returned as it is.
        """
        return tensor if self._shards is None else self._shards[0].whole(name, tensor)

    def close(self) -> None:
        """The training is over."""
        if self._shards is not None:
            self._shards[0].close()

    def agree(self, vote: bool) -> bool:
        """Whether a rank of this replica says so; all of them ask together."""
        return any_rank(self.pieces, vote)

    def sum(self, values: Tensor) -> None:
        """Add up, in place, over the ranks of this replica."""
        self.pieces.all_reduce([values], "sum").wait()


def lay_out(
    model: nn.Module,
    link: Link,
    mesh: Mesh,
    recipe: Recipe,
    engine: Engine | None = None,
    pipeline: Pipeline | None = None,
) -> Layout:
    """Give each rank of a mesh its piece of a model. Collective.

    Args:
        model: on the link's device, in the precision's format. It is changed where it is divided.
            Rank 0's values count.
        link: to all ranks.
        mesh: the layout.
        recipe: of the training.
        engine: what divides parameters where ``mesh.shard`` is above 1; default `FullyShard`. If it
            offloads, one rank alone may have it.
        pipeline: what runs the stages where ``mesh.pipe`` is above 1; default 1F1B.

    Returns:
        What this rank has, and how it computes with the others.

    Raises:
        ConfigError: the mesh does not fit the job, or the model cannot be divided so.
    """
    mesh.check(link.group.size)
    check_engine(engine, mesh)
    if pipeline is not None and mesh.pipe == 1:
        raise ConfigError(
            f"pipeline is {pipeline}, but mesh.pipe is 1, so that there is nothing to divide; set "
            "mesh.pipe to the number of ranks that have the stages of a replica, or leave pipeline "
            "out"
        )
    if mesh.ranks_per_replica == 1 and engine is None:
        return Layout(model, link)
    place, replicas = mesh.place(link.group.rank), mesh.replicas(link.group.size)
    if link.returned:
        raise ClusterError(
            f"rank {link.group.rank} came back, but replica {place.replicate} is laid out (mesh, "
            "engine) by all ranks of the job together; restart the whole job, from its last "
            "checkpoint if it keeps any"
        )
    # All start with the same values, whose parts are taken below.
    link.group.broadcast([*model.parameters(), *model.buffers()])
    of_replica = f"replica/{place.replicate}"
    pieces = link.part(of_replica, mesh.ranks(place, "pipe", "shard")).group
    of_strategy = link
    if mesh.ranks_per_replica > 1:
        of_strategy = link.part(
            f"replicas/{place.pipe}/{place.shard}",
            mesh.ranks(place, "replicate", replicas=replicas),
            of_replica,
        )
    pipe: Pipe | None = None
    roots = [model]
    if mesh.pipe > 1:
        among = [
            link.part(f"pipe/{way}/{place.replicate}/{place.shard}", mesh.ranks(place, "pipe"))
            for way in ("there", "back")
        ]
        pipe = Pipe.of(model, pipeline or Pipeline(), among, recipe, link.group)
        model, roots = pipe.stages, list(pipe.stages.stages.values())
    if mesh.shard == 1 and engine is None:  # stages
        return Layout(model, of_strategy, pieces, pipe=pipe)
    if pipe is not None:
        pipe.check_shardable()
    among_shards = link.part(f"shards/{place.replicate}/{place.pipe}", mesh.ranks(place, "shard"))
    engine = FullyShard() if engine is None else engine
    if pipe is not None and not engine.takes_stages:
        raise ConfigError(
            f"mesh.pipe is above 1, but {type(engine).__name__} divides whole models only; take "
            "engine=fully_shard, or set mesh.pipe to 1"
        )
    recipe = recipe._replace(recomputed=recipe.recomputed and pipe is None)
    shards = engine.apply(roots, among_shards.process_group(), recipe)
    return Layout(model, of_strategy, pieces, (shards, among_shards.group), pipe)
