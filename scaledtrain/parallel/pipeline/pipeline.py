"""What is asked of a pipeline, and this rank's part of a model cut so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, get_args

import torch
from torch import nn

from scaledtrain.byte_sizes import parse_bytes
from scaledtrain.comm.protocols import Group
from scaledtrain.data.cut import count_samples, to_device
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.parallel.engine import Recipe
from scaledtrain.parallel.pipeline.costs import PartCost, measure_parts
from scaledtrain.parallel.pipeline.cut import cut_step
from scaledtrain.parallel.pipeline.partition import describe_cut, partition
from scaledtrain.parallel.pipeline.parts import ModelParts, find_parts
from scaledtrain.parallel.pipeline.pipedream import AsynchronousName, delays
from scaledtrain.parallel.pipeline.schedules import SCHEDULES, pipeline_order
from scaledtrain.parallel.pipeline.simulate import peak_live, peak_live_of
from scaledtrain.parallel.pipeline.split_points import Cut, given_cut
from scaledtrain.parallel.pipeline.stage import Held, Stage, find_tied, make_stage
from scaledtrain.precision import Conversion
from scaledtrain.recompute.blocks import find_blocks
from scaledtrain.replica import MakeOptimizer
from scaledtrain.schedule import LossFn
from scaledtrain.schema import did_you_mean

__all__ = ["OwnStages", "Pipeline"]

_ASYNCHRONOUS: tuple[str, ...] = get_args(AsynchronousName)


@dataclass(frozen=True)
class Pipeline:
    """A model's blocks, one after another, on the ranks of ``mesh.pipe``.

    Each rank has a stage of the model, or several; a batch goes through in microbatches, so that
    all ranks have something to do. Which rank computes what when is the schedule's choice. Sent are
    the activations between stages, and their gradients back. A crash of a rank ends the run for its
    replica.

    The cut into stages is the one with the smallest slowest stage, by the measured time of each
    part, unless ``split`` says otherwise. What a model's parts are, see
    `scaledtrain.parallel.pipeline.parts.find_parts`.

    Args:
        schedule: ``"GPipe"``, ``"1F1B"``, ``"Interleaved1F1B"``, ``"InterleavedZeroBubble"``,
            ``"ZBVZeroBubble"``, ``"DualPipeV"`` (see
            `scaledtrain.parallel.pipeline.schedules.pipeline_order`), which give the gradients of
            the whole model; ``"PipeDream"``, ``"PipeDream-2BW"`` (see
            `scaledtrain.parallel.pipeline.pipedream.PipeDreamSchedule`), which never drain, and
            give stale ones.
        n_microbatches: into how many each batch is cut.
        stages_per_rank: for the schedules that can have more; None: as few as they can have.
        split: names of the parts with which the second stage begins, the third and so on; or how
            many parts each stage has. None: as is best.
        blocks: names of submodules between which a model is cut that has to be traced; None: they
            are found.
        memory: bytes that a rank may need for its stages, as a number or as ``"2GiB"``, with all
            activations kept, also those that are computed again; None: there are enough.
        bytes_per_second: between two ranks, if sending may take longer than
            computing.
        anneal_steps: of an asynchronous pipeline: updates for which the learning rate of a stale
            stage is divided by a power of its staleness that falls from 1 to 0 (PipeMare), which
            changes nothing where gradients are one update late. None: it is the same for all
            stages.
        example: a batch like those of the training, to measure the parts with, and to trace a
            model. None: a part is taken to cost as much as it has parameters. A config's comes from
            its data.

    Raises:
        ConfigError: an unknown schedule, or options that do not fit it.
    """

    schedule: str = "1F1B"
    n_microbatches: int = 4
    stages_per_rank: int | None = None
    split: Sequence[str | int] | None = None
    blocks: Sequence[str] | None = None
    memory: str | int | None = None
    bytes_per_second: float | None = None
    anneal_steps: int | None = None
    example: Any = None

    def __post_init__(self) -> None:
        names = (*SCHEDULES, *_ASYNCHRONOUS)
        if self.schedule not in names:
            raise ConfigError(
                f"pipeline.schedule is {self.schedule!r}{did_you_mean(self.schedule, names)}; it "
                f"can be: {', '.join(names)}"
            )
        if self.n_microbatches < 1:
            raise ConfigError(f"pipeline.n_microbatches is {self.n_microbatches}; it is >= 1")
        if self.anneal_steps is not None and not self.is_asynchronous:
            raise ConfigError(
                f"pipeline.anneal_steps corrects the learning rate of stale stages, but with "
                f"{self.schedule} none is; leave it out, or choose {' or '.join(_ASYNCHRONOUS)}"
            )
        if self.is_asynchronous and self.stages_per_rank not in (None, 1):
            raise ConfigError(
                f"pipeline.stages_per_rank is {self.stages_per_rank}, but {self.schedule} has one; "
                "leave it out, or choose Interleaved1F1B"
            )

    @property
    def is_asynchronous(self) -> bool:
        """Whether gradients are stale."""
        return self.schedule in _ASYNCHRONOUS

    def own_stages(
        self,
        model: nn.Module,
        group: Group,
        recipe: Recipe,
        device: torch.device,
        job: Group,
    ) -> OwnStages:
        """Cut a model, and keep what is this rank's. Collective.

        Args:
            model: whole; nothing of it is kept but this rank's stages.
            group: of the pipeline's ranks.
            recipe: of the training.
            device: on which the model computes.
            job: all ranks, those of other pipelines too: they make the same cut.

        Raises:
            ConfigError: it cannot be cut so.
        """
        loss_fn, batches = recipe.loss_fn, recipe.gradient_accumulation_steps
        conversion = Conversion.of(model)
        microbatch = to_device(self._example_microbatch(), device)
        if conversion is not None and microbatch is not None:
            if loss_fn is None:
                microbatch = conversion.narrow(microbatch)
            else:
                microbatch = conversion.narrow(microbatch[0]), *microbatch[1:]
                loss_fn = conversion.widening(loss_fn)
        traced = microbatch
        if loss_fn is not None and microbatch is not None:
            traced = microbatch[0]
        parts = find_parts(model, traced, own_loss=loss_fn is None, blocks=self.blocks)
        ranks = self._rank_of(group.size, batches)
        if self.split is not None:
            cut, told = given_cut(parts.names, self.split, len(ranks)), ""
        elif (kept := _as_before(recipe.parts_before, parts, ranks)) is not None:
            cut, told = kept, f"stages have {list(kept.counts)} parts, as they had before"
        else:
            with recipe.precision.autocast(device):
                costs = self._costs(parts, microbatch, job, loss_fn, recipe.optimizer)
            live = self._live(ranks, group.size, batches)
            cut = self._cut(costs, ranks, group.size, live)
            measured = microbatch is not None
            told = describe_cut(cut, costs, parts.names, live if measured else None)
        _check_trained(parts, cut, ranks)
        own = {
            stage: make_stage(parts, cut, stage)
            for stage, rank in enumerate(ranks)
            if rank == group.rank
        }
        _put_around(own, len(ranks), conversion)
        tied, names = find_tied(parts, cut), list(model.state_dict())
        return OwnStages(own, cut, tied, _blocks_of(model), told, names)

    def unmeasured_stages(
        self, model: nn.Module, rank: int, n_ranks: int, batches: int
    ) -> OwnStages:
        """What is a rank's, without measuring: unless ``split`` says it, by numbers of parameters.

        Args:
            model: whole; it is not changed.
            rank: of the pipeline.
            n_ranks: there are.
            batches: in a step.

        Raises:
            ConfigError: it cannot be cut so, or not without tracing it.
        """
        parts = find_parts(model, blocks=self.blocks)
        ranks = self._rank_of(n_ranks, batches)
        if self.split is not None:
            cut = given_cut(parts.names, self.split, len(ranks))
        else:
            cut = partition([_estimate(part) for part in parts.modules], len(ranks))
        _check_trained(parts, cut, ranks)
        own = {s: make_stage(parts, cut, s) for s, where in enumerate(ranks) if where == rank}
        _put_around(own, len(ranks), Conversion.of(model))
        tied, names = find_tied(parts, cut), list(model.state_dict())
        return OwnStages(own, cut, tied, _blocks_of(model), "", names)

    def _example_microbatch(self) -> Any:
        if self.example is None:
            if self.memory is not None:
                raise ConfigError(
                    "pipeline.memory is given, but no example batch to measure the model's parts "
                    "with; give pipeline.example"
                )
            return None
        step = StepBatch([self.example], [count_samples(self.example)])
        return cut_step(step, self.n_microbatches)[0].batch

    def _rank_of(self, n_ranks: int, batches: int) -> Sequence[int]:
        """Of each stage its rank."""
        if self.is_asynchronous:
            return range(n_ranks)
        n = batches * self.n_microbatches
        return pipeline_order(self.schedule, n_ranks, n, self.stages_per_rank).rank_of

    def _live(self, rank_of: Sequence[int], n_ranks: int, batches: int) -> list[int]:
        """For each stage, how many microbatches are between their passes at most."""
        if self.is_asynchronous:
            return [n_ranks - rank for rank in rank_of]
        n = batches * self.n_microbatches
        peaks = peak_live(pipeline_order(self.schedule, n_ranks, n, self.stages_per_rank))
        v = len(rank_of) // n_ranks
        return [math.ceil(peaks[rank] / v) for rank in rank_of]

    def live_of_stages(self, n_ranks: int, batches: int) -> list[int]:
        """For each stage, how many microbatches are between its passes at once, exactly."""
        ranks = self._rank_of(n_ranks, batches)
        if self.is_asynchronous:
            return self._live(ranks, n_ranks, batches)
        n = batches * self.n_microbatches
        order = pipeline_order(self.schedule, n_ranks, n, self.stages_per_rank)
        return [peak_live_of(order, stage) for stage in range(len(ranks))]

    def further_versions(self, rank: int, n_ranks: int, batches: int) -> int:
        """Of its weights, that a rank of so many keeps beside those that it updates."""
        if not self.is_asynchronous:
            return 0
        n = batches * self.n_microbatches
        delay = delays(self.schedule, n_ranks, n)[rank]  # type: ignore[arg-type]
        return delay + 1 if delay else 0

    def _costs(
        self,
        parts: ModelParts,
        microbatch: Any,
        job: Group,
        loss_fn: LossFn | None,
        optimizer: MakeOptimizer,
    ) -> list[PartCost]:
        """Rank 0's of the job, on all ranks, so that all make the same cut."""
        told = torch.zeros(len(parts), 6, dtype=torch.float64)
        if job.rank == 0:
            if microbatch is None:
                costs = [_estimate(part) for part in parts.modules]
            else:
                costs = measure_parts(parts, microbatch, loss_fn, optimizer)
            told = torch.tensor([astuple(cost) for cost in costs], dtype=torch.float64)
        job.broadcast([told])
        return [PartCost(a, b, *map(int, sizes)) for a, b, *sizes in told.tolist()]

    def _cut(
        self, costs: Sequence[PartCost], rank_of: Sequence[int], n_ranks: int, live: Sequence[int]
    ) -> Cut:
        memory = None
        if self.memory is not None:
            v = len(rank_of) // n_ranks
            memory = parse_bytes(self.memory, "pipeline.memory") // v
        return partition(
            costs,
            len(rank_of),
            bandwidth=self.bytes_per_second,
            memory_bytes=memory,
            live_microbatches=live,
        )


def _as_before(
    counts: Sequence[int] | None, parts: ModelParts, rank_of: Sequence[int]
) -> Cut | None:
    """The cut of the run that this one goes on from; None: it had none that fits."""
    if counts is None or len(counts) != len(rank_of) or sum(counts) != len(parts):
        return None
    return Cut(tuple(counts))


def _put_around(own: Mapping[int, nn.Module], n_stages: int, conversion: Conversion | None) -> None:
    """What is around a whole model is around its stages."""
    if conversion is not None:
        conversion.put_around(own.get(0), own.get(n_stages - 1))


def _check_trained(parts: ModelParts, cut: Cut, rank_of: Sequence[int]) -> None:
    """All ranks look at what all have, so that none is left waiting for another's error."""
    for rank in sorted(set(rank_of)):
        stages = [stage for stage, where in enumerate(rank_of) if where == rank]
        own = [part for stage in stages for part in cut.parts_of(stage)]
        if not any(p.requires_grad for part in own for p in parts.modules[part].parameters()):
            names = ", ".join(parts.names[part] for part in own)
            raise ConfigError(
                f"rank {rank} of the pipeline would have nothing to train: none of its parts "
                f"({names}) has a parameter with requires_grad=True; let every rank have some "
                "(pipeline.split), or take fewer ranks"
            )


def _blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    try:
        return find_blocks(model)
    except ConfigError:
        return ()


def _estimate(part: nn.Module) -> PartCost:
    n = float(sum(p.numel() for p in part.parameters()))
    return PartCost(n, 2 * n)


class OwnStages(nn.Module):
    """This rank's stages, with the names that the whole model has for what is in them.

    Args:
        stages: by number.
        cut: into the stages of all ranks.
        tied: groups of parameters that are one.
        blocks: of the whole model, in the order in which it calls them.
        told: about the cut, for people to read.
        names: of all that the whole model's state dict has, in order.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        cut: Cut,
        tied: list[tuple[Held, ...]],
        blocks: Sequence[nn.Module],
        told: str,
        names: Sequence[str],
    ) -> None:
        super().__init__()
        self._stages = nn.ModuleDict({str(number): stage for number, stage in stages.items()})
        self._own = list(stages.values())
        self.counts = cut.counts
        self.n_stages = len(cut)
        self.tied = tied
        own = {m for stage in stages.values() for part in stage.parts for m in part.modules()}
        self._blocks = [block for block in blocks if block in own]  # and no other stage's
        self.told = told
        self.names = names

    @property
    def stages(self) -> dict[int, nn.Module]:
        """By number."""
        return {int(number): stage for number, stage in self._stages.items()}

    def blocks(self, number: int) -> Sequence[nn.Module]:
        """Of a stage, in order; the parts where no other blocks are known."""
        parts = next(s.parts for n, s in zip(self.stages, self._own, strict=True) if n == number)
        own = {module for part in parts for module in part.modules()}
        return [block for block in self._blocks if block in own] or parts

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """With the whole model's names; those of several stages here come once."""
        found: dict[str, nn.Parameter] = {}
        for stage in self._stages.values():
            found |= stage.named_parameters(prefix, recurse, remove_duplicate)
        yield from found.items()

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """With those of traced parts, so that who puts modes back reaches them, too."""
        inner = (module for stage in self._own for module in stage.modules())
        yield from dict.fromkeys([*super().modules(), *inner])

    def counted_elsewhere(self) -> set[str]:
        """Names of parameters that an earlier stage on another rank has, too."""
        own = self.stages
        return {
            held.name
            for group in self.tied
            for held in group
            if held.stage in own and group[0].stage not in own
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of all stages here, with the whole model's names."""
        state: dict[str, Any] = {}
        for stage in self._stages.values():
            state |= stage.state_dict(*args, **kwargs)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Restore what ``state_dict`` returned."""
        for stage in self._stages.values():
            own = {name: state_dict[name] for name in stage.state_dict() if name in state_dict}
            stage.load_state_dict(own, strict, assign)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A rank cannot run the model alone.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this rank has some stages of the model and cannot run it alone; use the Trainer's fit "
            "and evaluate, which all ranks of the pipeline call together"
        )
