"""Runs a pipeline's schedule: this rank's list of actions, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaledtrain.data.steps import StepBatch, Weigh
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import LossScaler, NoScaler
from scaledtrain.parallel.pipeline.cut import count_pieces, cut_step
from scaledtrain.parallel.pipeline.mailbox import Mailbox
from scaledtrain.parallel.pipeline.schedules import PipelineOrder, breadth_first, pipeline_order
from scaledtrain.parallel.pipeline.simulate import Timed, check_order
from scaledtrain.parallel.pipeline.tied import TiedGroup, TiedWeights
from scaledtrain.parallel.pipeline.worker import Worker
from scaledtrain.precision import Precision
from scaledtrain.schedule import Abandon, Computed, LossFn, Told
from scaledtrain.timeline import Timeline

__all__ = ["PipelineSchedule"]


class PipelineSchedule:
    """Microbatches through a model whose stages are on several ranks, without stale weights.

    Every rank of the pipeline is given the same batch; the first stage uses its inputs, the last
    one its targets. The gradient is that of the mean loss over all samples of the step, whatever
    the sizes of the microbatches; it adds up in ``.grad`` of each rank's own parameters, whose
    hooks run once for each microbatch, also where a backward pass is in two parts (those of tied
    weights once in a step, when their gradient is complete). Stages draw random numbers (dropout)
    from the generators of their rank, in the order of its actions.

    Nothing is copied but what cannot be sent as it is. Sends are not waited for before the end of a
    step, receives are posted before they are needed, and what a stage has sent is let go of unless
    its own backward needs it. The death of a rank, or its silence for ``timeout_seconds``, is told
    by those that wait for it.

    Args:
        order: the name of a schedule, or an order of your own. In a step of fewer microbatches, at
            the end of an epoch, it is that schedule for these if there is one, else all forwards
            and then all backwards.
        stages: of this rank, by number: modules that take what the one before returned, a tensor or
            a tuple of tensors.
        n_microbatches: into how many each batch of a step is cut.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the samples, a scalar; None: the last
            stage returns the loss, and the first one is called with the whole batch.
        group: of the ranks of the pipeline.
        back: the same ranks again; needed with NCCL, see `Mailbox`.
        batches: in a step, by which the number of its microbatches is known.
        loss_weight: how much a batch counts in the mean, which is how the sizes of a step's are
            given; None: its samples.
        n_stages: of all ranks; None: as few as the schedule can have.
        precision: of the forward passes.
        scaler: of the loss; default: none. It must come to the same verdicts on all ranks.
        tied: groups of (stage, parameter name) that are one weight.
        equalizes: copies of tied weights get the first stage's values before each step: what
            replicas tell each other (compressed, or added up in another order) may differ by copy,
            and so may what is rounded at random.
        recomputed: the stages recompute activations: backward passes are then made in one part.
        sharded: the stages are, so that a small batch is cut into as many microbatches as others.
        device: on which the stages compute; None: where they are, which shards in the host's memory
            are not.
        timeout_seconds: for each message.
        timeline: where waiting is recorded, and every action if it keeps spans.
        timed: keep when each action of the last step was done.

    Attributes:
        times: of this rank's actions in the last step, if ``timed``; on the clock of the host.

    Raises:
        ConfigError: the schedule cannot be run so; before anything is sent.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> stages = {0: nn.Linear(2, 4), 1: nn.Linear(4, 1)}  # on two ranks: one on each
        >>> schedule = PipelineSchedule("Interleaved1F1B", stages, 2, nn.functional.mse_loss,
        ...                             dist.group.WORLD)
        >>> print(schedule.order)
        Interleaved1F1B
        rank 0: 0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1
        >>> computed = schedule.run(StepBatch([(torch.ones(6, 2), torch.ones(6, 1))], [6]))
        >>> computed.samples, stages[0].weight.grad is not None
        (6, True)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        order: str | PipelineOrder,
        stages: Mapping[int, nn.Module],
        n_microbatches: int,
        loss_fn: LossFn | None,
        group: dist.ProcessGroup,
        back: dist.ProcessGroup | None = None,
        *,
        batches: int = 1,
        loss_weight: Weigh | None = None,
        n_stages: int | None = None,
        precision: Precision | None = None,
        scaler: LossScaler | None = None,
        tied: Sequence[TiedGroup] = (),
        equalizes: bool = False,
        recomputed: bool = False,
        sharded: bool = False,
        device: torch.device | None = None,
        timeout_seconds: float = 300.0,
        timeline: Timeline | None = None,
        timed: bool = False,
    ) -> None:
        n_ranks = dist.get_world_size(group)
        self._is_named = isinstance(order, str)
        if isinstance(order, str):
            order = pipeline_order(
                order, n_ranks, batches * n_microbatches, stages_per_rank(n_stages, n_ranks)
            )
        elif len(order.ranks) != n_ranks or order.n_microbatches != batches * n_microbatches:
            raise ConfigError(
                f"the order {order.name} is for {len(order.ranks)} ranks and "
                f"{order.n_microbatches} microbatches, but there are {n_ranks} ranks, and "
                f"{batches} x {n_microbatches} microbatches in a step"
            )
        check_order(order)
        self.order = order
        self._orders = {order.n_microbatches: order}
        self.times: list[Timed] = []
        self._pieces = n_microbatches
        self._loss_weight = loss_weight
        self._sharded = sharded
        device = device_of(stages) if device is None else device
        scaler = scaler or NoScaler()
        self._mailbox = Mailbox(group, back, device, timeout_seconds, timeline)
        self._worker = Worker(
            stages,
            order.rank_of,
            self._mailbox,
            loss_fn,
            precision or Precision(),
            scaler,
            recomputed=recomputed,
            device=device,
            timed=timed,
            timeline=timeline,
        )
        self._equalizes = equalizes
        self._tied = TiedWeights(tied, stages, order.rank_of, self._mailbox, scaler)

    @property
    def bytes_sent(self) -> int:
        """Of the tensors that this rank has handed to the transport so far."""
        return self._mailbox.bytes_sent

    def predict(self, batch: StepBatch) -> tuple[list[Any] | None, Tensor]:
        """Forward passes alone, without gradients, of a batch's microbatches as they are.

        Returns:
            Their outputs, on the rank of the last stage, None elsewhere; and their mean loss, the
            same on all ranks.

        Raises:
            ConfigError: there is no microbatch.
        """
        return predict(self._worker, batch)

    def outputs(self, batch: Any) -> Any:
        """Of the model for a batch, which may lack targets; None but on the last stage's rank."""
        return self._worker.outputs(batch)

    def refresh(self) -> None:
        """Let copies of tied weights be equal; all ranks call it together, where it is needed."""
        if self._equalizes:
            self._tied.equalize()
            self._mailbox.finish()

    def run(self, batch: StepBatch, abandon: Abandon = None) -> Computed | None:
        """Run forward and backward; ``abandon`` is not asked: the other ranks go on, too.

        Raises:
            WaitTimeoutError, PeerLostError: another rank is stuck or died.
        """
        microbatches = cut_step(batch, self._pieces, self._sharded, self._loss_weight)
        if not microbatches:  # the epoch left nothing to this replica
            return Computed(torch.zeros(()), 0)
        worker, numbers = self._worker, range(len(microbatches))
        order = self._order_for(len(numbers))
        worker.microbatches = dict(enumerate(microbatches))
        worker.times = []
        if self._equalizes:
            self._tied.equalize()
        with self._tied.apart():
            worker.run(order.ranks, numbers)
        self._tied.expect()
        self._tied.combine()
        loss = worker.loss(numbers)
        self._mailbox.finish()
        self.times = worker.times
        return Computed(loss, batch.samples)

    pending = 0

    one_by_one = False

    def tell(self, told: Told) -> None:
        """Nothing: microbatches overlap."""

    def backward_passes(self, batch: StepBatch) -> int:
        """How many add up in a step's gradients; what a strategy wants to know beforehand."""
        return sum(count_pieces(whole, self._pieces) for whole in batch.microbatches)

    def weight(self, batch: StepBatch) -> float:
        """The batch's."""
        return batch.weight

    def _order_for(self, n_microbatches: int) -> PipelineOrder:
        nominal = self.order
        if n_microbatches > nominal.n_microbatches:
            raise ConfigError(
                f"a step has {n_microbatches} microbatches, but the schedule {nominal.name} was "
                f"made for {nominal.n_microbatches}; say how many batches a step has (batches=...)"
            )
        if n_microbatches not in self._orders:
            order = breadth_first(nominal.rank_of, n_microbatches)
            if self._is_named:
                n_ranks = len(nominal.ranks)
                with suppress(ConfigError):
                    order = pipeline_order(
                        nominal.name, n_ranks, n_microbatches, nominal.n_stages // n_ranks
                    )
            self._orders[n_microbatches] = order
        return self._orders[n_microbatches]


def predict(worker: Worker, batch: StepBatch) -> tuple[list[Any] | None, Tensor]:
    """See `PipelineSchedule.predict`."""
    if not batch.microbatches:
        raise ConfigError("a pipeline was given no microbatch to predict for")
    return worker.predict(batch)


def stages_per_rank(n_stages: int | None, n_ranks: int) -> int | None:
    """How many of the stages each rank has.

    Raises:
        ConfigError: they cannot be shared equally.
    """
    if n_stages is None:
        return None
    if n_stages < 1 or n_stages % n_ranks:
        raise ConfigError(
            f"{n_stages} stages cannot be shared equally by the {n_ranks} ranks of a pipeline; cut "
            f"the model into a multiple of {n_ranks}"
        )
    return n_stages // n_ranks


def device_of(stages: Mapping[int, nn.Module]) -> torch.device:
    """Where the stages are; the CPU if they have no tensors."""
    tensors: list[Tensor] = [t for s in stages.values() for t in [*s.parameters(), *s.buffers()]]
    return tensors[0].device if tensors else torch.device("cpu")
