"""Asynchronous pipelines: never drained between steps, at the price of stale weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaledtrain.data.steps import StepBatch, Weigh
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import NoScaler
from scaledtrain.parallel.pipeline.cut import count_pieces, cut_step
from scaledtrain.parallel.pipeline.execute import device_of, predict
from scaledtrain.parallel.pipeline.mailbox import Mailbox
from scaledtrain.parallel.pipeline.places import Places
from scaledtrain.parallel.pipeline.schedules import Action, PipelineOrder
from scaledtrain.parallel.pipeline.simulate import Timed
from scaledtrain.parallel.pipeline.worker import Worker
from scaledtrain.precision import Precision
from scaledtrain.schedule import Abandon, Computed, LossFn, Told
from scaledtrain.timeline import Timeline

__all__ = ["AsynchronousName", "PipeDreamSchedule", "asynchronous_order", "delays"]

AsynchronousName = Literal["PipeDream", "PipeDream-2BW"]


def delays(name: AsynchronousName, n_stages: int, n_microbatches: int) -> list[int]:
    """Of each stage, how many steps after its forward pass a batch's gradient is there.

    That is also its staleness: how many updates the weights get between.

    Args:
        name: `"PipeDream"`: ceil((p - 1 - i) / m) in stage i of p; with one microbatch in a step,
            p - 1 - i. `"PipeDream-2BW"`: 1 in all stages.
        n_stages: one on each rank.
        n_microbatches: in a step.

    Raises:
        ConfigError: too few microbatches for two buffers, or an unknown name.

    Example:
        >>> delays("PipeDream", 4, 1), delays("PipeDream", 4, 2), delays("PipeDream-2BW", 4, 4)
        ([3, 2, 1, 0], [2, 1, 1, 0], [1, 1, 1, 1])
    """
    if name not in get_args(AsynchronousName):
        raise ConfigError(
            f"unknown asynchronous schedule {name!r}; there are "
            f"{' and '.join(get_args(AsynchronousName))}"
        )
    if name == "PipeDream":
        return [-(-(n_stages - 1 - stage) // n_microbatches) for stage in range(n_stages)]
    if n_microbatches < n_stages - 1:
        raise ConfigError(
            f"PipeDream-2BW on {n_stages} ranks cannot do with {n_microbatches} microbatches in a "
            "step: gradients would come more than one step late, but it keeps the weights for one; "
            f"take {n_stages - 1} microbatches or more, or PipeDream"
        )
    return [min(1, n_stages - 1)] * n_stages


class _Stream:
    """The endless 1F1B of all stages, cut into steps.

    In a step, stage i of p does for each new microbatch g a forward, and then the backward of
    g - (p - 1 - i); at last what is still to be done of the batch whose gradient is due.
    """

    def __init__(self, n_stages: int, steps_late: Sequence[int]) -> None:
        self._late = steps_late
        self._ends: list[int] = []  # microbatches up to the end of each step
        self._done = [0] * n_stages  # backwards

    def step(self, n_microbatches: int) -> list[list[Action]]:
        """What each stage does in the next step."""
        begin = self._ends[-1] if self._ends else 0
        self._ends.append(begin + n_microbatches)
        return [self._of_stage(i, range(begin, begin + n_microbatches)) for i in range(self._n)]

    @property
    def _n(self) -> int:
        return len(self._done)

    def _of_stage(self, stage: int, new: range) -> list[Action]:
        actions = []
        for g in new:
            actions.append(Action("F", stage, g))
            if self._done[stage] <= g - (self._n - 1 - stage):
                actions.append(self._backward(stage))
        due = len(self._ends) - 1 - self._late[stage]
        while due >= 0 and self._done[stage] < self._ends[due]:
            actions.append(self._backward(stage))
        return actions

    def _backward(self, stage: int) -> Action:
        self._done[stage] += 1
        return Action("B", stage, self._done[stage] - 1)


def asynchronous_order(
    name: AsynchronousName, n_ranks: int, n_microbatches: int, n_steps: int
) -> PipelineOrder:
    """All of a run as one order, the end included, in which the pipeline is drained.

    Args:
        name: see `delays`.
        n_ranks: of the pipeline, with a stage each.
        n_microbatches: in a step.
        n_steps: before the end.

    Example:
        >>> print(asynchronous_order("PipeDream", n_ranks=2, n_microbatches=1, n_steps=4))
        PipeDream
        rank 0: 0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3
        rank 1: 1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3
    """
    late = delays(name, n_ranks, n_microbatches)
    stream = _Stream(n_ranks, late)
    ranks: list[list[Action]] = [[] for _ in range(n_ranks)]
    for size in [n_microbatches] * n_steps + [0] * max(late):
        for own, actions in zip(ranks, stream.step(size), strict=True):
            own += actions
    return PipelineOrder(name, tuple(map(tuple, ranks)))


@dataclass
class _Step:
    """A step whose gradient may still be to come."""

    numbers: range
    samples: int
    weight: float
    """In a mean over replicas."""
    weights: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    """With which its microbatches compute; nothing: with the parameters themselves."""


class PipeDreamSchedule:
    r"""Asynchronous 1F1B: a step does not wait for its own gradients.

    In step t a rank runs the forward passes of batch t, and of backward passes what has its
    gradients. At the end of the step ``.grad`` holds the whole gradient of batch t - d, d as
    `delays` has it, taken at the weights with which that batch went forward; in the first d steps
    there is none. (Weight stashing: a stage with d > 0 has d + 1 further versions of its weights.)

    * ``"PipeDream"``: d = ceil((p - 1 - i) / m) in stage i, so that one step may be one microbatch:

          w_i(t+1) = w_i(t) - lr g_i(w_0(t - d_0), ..., w_i(t - d_i), ...; batch t - d_i)

    * ``"PipeDream-2BW"``: d = 1 in all stages, with at least p - 1 microbatches in a step; all
      stages use weights of the same age, W(t+1) = W(t) - lr g(W(t-1)).

    The update is whoever's: an optimizer's, a strategy's. A run ends with `pending` steps on a
    batch without microbatches, of a weight above 0, which drain the pipeline. Saved before that, a
    run resumes without the gradients of the last d batches.

    Args:
        name: of the schedule.
        stage: of this rank; there is one on each, in the order of the ranks.
        n_microbatches: into how many each batch of a step is cut.
        loss_fn: as for `PipelineSchedule`, like the following.
        group: of the ranks.
        back: the same ranks again; needed with NCCL.
        batches: in a step.
        loss_weight: as for `PipelineSchedule`.
        precision: of the forward passes. Of loss scaling nothing is known here: it would need one
            verdict of all stages in each step.
        timeout_seconds: for each message.
        timeline: where waiting is recorded, and every action if it keeps spans.
        timed: keep when each action was done.

    Attributes:
        delay: d of this rank's stage.
        times: of this rank's actions since the beginning, if ``timed``.

    Raises:
        ConfigError: the numbers do not fit, or the precision scales the loss.

    References:
        Narayanan et al. 2019, PipeDream, arXiv 1806.03377; Narayanan et al. 2021, Memory-Efficient
        Pipeline-Parallel DNN Training, arXiv 2006.09503 (2BW).
    """

    def __init__(
        self,
        name: AsynchronousName,
        stage: nn.Module,
        n_microbatches: int,
        loss_fn: LossFn | None,
        group: dist.ProcessGroup,
        back: dist.ProcessGroup | None = None,
        *,
        batches: int = 1,
        loss_weight: Weigh | None = None,
        precision: Precision | None = None,
        timeout_seconds: float = 300.0,
        timeline: Timeline | None = None,
        timed: bool = False,
    ) -> None:
        n_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if n_microbatches < 1 or batches < 1:
            raise ConfigError(f"{batches} x {n_microbatches} microbatches in a step; both are >= 1")
        precision = precision or Precision()
        if precision.scales_loss:
            raise ConfigError(
                f"{name} with precision {precision.name}: stages of an asynchronous pipeline would "
                "be at different loss scales; compute in bfloat16 (bf16-mixed), which needs none"
            )
        late = delays(name, n_ranks, batches * n_microbatches)
        self.delay = late[rank]
        self._longest = max(late)
        self._stream = _Stream(n_ranks, late)
        self._pieces = n_microbatches
        self._loss_weight = loss_weight
        self._parameters = [p for p in stage.parameters() if p.requires_grad]
        self._places = Places([stage], self._parameters)
        n_versions = self.delay + 1 if self.delay and self._parameters else 0
        self._free = [
            {p: nn.Parameter(p.detach().clone()) for p in self._parameters}
            for _ in range(n_versions)
        ]
        self._steps: list[_Step] = []  # those whose gradient is not delivered
        self._count = 0  # microbatches so far
        self._pending = 0
        device = device_of({rank: stage})
        self._mailbox = Mailbox(group, back, device, timeout_seconds, timeline)
        self._worker = Worker(
            {rank: stage},
            range(n_ranks),
            self._mailbox,
            loss_fn,
            precision,
            NoScaler(),
            device=device,
            timed=timed,
            timeline=timeline,
            around=self._weights_of,
        )

    @property
    def bytes_sent(self) -> int:
        """Of the tensors that this rank has handed to the transport so far."""
        return self._mailbox.bytes_sent

    @property
    def times(self) -> list[Timed]:
        """Of this rank's actions."""
        return self._worker.times

    @property
    def pending(self) -> int:
        """Steps without microbatches that drain the pipeline; the same on all ranks."""
        return self._pending

    one_by_one = False

    def tell(self, told: Told) -> None:
        """Nothing: microbatches overlap."""

    def backward_passes(self, batch: StepBatch) -> int:
        """How often gradients are added to ``.grad`` in a step: a late one is handed over whole."""
        if self.delay:
            return 1
        return sum(count_pieces(whole, self._pieces) for whole in batch.microbatches)

    def weight(self, batch: StepBatch) -> float:
        """That of the batch whose gradient is due; where none is yet, there are none elsewhere."""
        if len(self._steps) < self.delay:
            return 1.0
        return self._steps[0].weight if self.delay else batch.weight

    def predict(self, batch: StepBatch) -> tuple[list[Any] | None, Tensor]:
        """Forward passes alone, with the weights of now; as `PipelineSchedule.predict`."""
        return predict(self._worker, batch)

    def outputs(self, batch: Any) -> Any:
        """As `PipelineSchedule.outputs`, with the weights of now."""
        return self._worker.outputs(batch)

    def refresh(self) -> None:
        """No stages have weights in common."""

    def run(self, batch: StepBatch, abandon: Abandon = None) -> Computed | None:
        """Run one step; ``abandon`` is not asked.

        Returns:
            Loss and samples of the batch whose gradient is in ``.grad`` now; in the first d steps
            none is due.

        Raises:
            WaitTimeoutError, PeerLostError: another rank is stuck or died.
        """
        microbatches = cut_step(batch, self._pieces, weigh=self._loss_weight)
        numbers = range(self._count, self._count + len(microbatches))
        self._count = numbers.stop
        self._worker.microbatches.update(zip(numbers, microbatches, strict=True))
        step = _Step(numbers, batch.samples, batch.weight)
        if self._free:
            step.weights = self._free.pop()
            with torch.no_grad():
                torch._foreach_copy_([*step.weights.values()], [*self._parameters])
        self._steps.append(step)
        # A step in which only this replica has no samples does not drain: the others go on.
        drains = not numbers and batch.weight > 0
        self._pending = max(0, self._pending - 1) if drains else self._longest
        self._worker.run(self._stream.step(len(numbers)), numbers)
        if self._pending == 0:
            self._mailbox.finish()
        if len(self._steps) <= self.delay:
            return _nothing()._replace(is_due=False)
        return self._deliver(self._steps.pop(0))

    def _weights_of(self, microbatch: int) -> AbstractContextManager[None]:
        if not self._parameters or not self.delay or microbatch < 0:  # which is not trained on
            return nullcontext()
        step = next(s for s in reversed(self._steps) if microbatch in s.numbers)
        return self._places.holding(step.weights)

    def _deliver(self, step: _Step) -> Computed:
        """Hand a batch's gradient to the parameters, as if a backward pass had made it."""
        came = {p: copy.grad for p, copy in step.weights.items() if copy.grad is not None}
        if came:
            torch.autograd.backward(list(came), list(came.values()))
        for copy in step.weights.values():
            copy.grad = None
        if step.weights:
            self._free.append(step.weights)
        for microbatch in step.numbers:
            del self._worker.microbatches[microbatch]
        if not step.numbers:
            return _nothing()
        return Computed(self._worker.loss(step.numbers), step.samples)


def _nothing() -> Computed:
    return Computed(torch.zeros(()), 0)
