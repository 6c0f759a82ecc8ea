"""What one rank of a pipeline does: passes through its stages, and messages to their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from scaledtrain.clock import HostClock
from scaledtrain.data.cut import count_samples
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import LossScaler
from scaledtrain.parallel.pipeline.cut import Microbatch, cut_step
from scaledtrain.parallel.pipeline.mailbox import Mailbox, Message, messages
from scaledtrain.parallel.pipeline.schedules import Action, Kind, breadth_first
from scaledtrain.parallel.pipeline.simulate import Timed
from scaledtrain.parallel.pipeline.split_backward import SplitBackward
from scaledtrain.precision import Precision
from scaledtrain.schedule import (
    LossFn,
    as_arguments,
    call_model,
    call_without_loss,
    inputs_and_targets,
    loss_of,
)
from scaledtrain.timeline import Timeline

__all__ = ["Worker"]

What = Literal["activations", "gradients"]


@dataclass
class _Pass:
    """What is kept of a forward pass for its backward: not the outputs, which may go."""

    inputs: list[Tensor]
    """That need gradients."""
    roots: list[GradientEdge]
    """Of the outputs that have gradients, or of the loss."""
    scale: Tensor | None
    """What the loss counts in the mean; None: this is not the last stage."""
    split: SplitBackward | None = None
    gradients: list[Tensor] | None = None
    """Of the outputs, where the whole backward is left for its second part."""


class Worker:
    """One rank's stages.

    Args:
        stages: by number. Each takes what the one before returned, a tensor or a tuple of tensors;
            the first one what the model would be given.
        rank_of: of every stage its rank.
        mailbox: to the other ranks.
        loss_fn: ``loss_fn(outputs, targets)``; None: the last stage returns the loss.
        precision: its ``autocast`` is used.
        scaler: of the loss.
        recomputed: the stages' activations are recomputed. The whole backward is then made in its
            first part: each branch of a second one would recompute them again.
        device: of the stages.
        around: microbatch -> a context in which its passes run.
        timed: keep when each action was done; on CUDA each one then waits for the device.
        timeline: where actions are noted, if it keeps spans.

    Attributes:
        microbatches: by number, those under way.
        times: of the actions.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        rank_of: Sequence[int],
        mailbox: Mailbox,
        loss_fn: LossFn | None,
        precision: Precision,
        scaler: LossScaler,
        *,
        device: torch.device,
        recomputed: bool = False,
        around: Callable[[int], AbstractContextManager[Any]] = nullcontext,
        timed: bool = False,
        timeline: Timeline | None = None,
    ) -> None:
        rank = mailbox.rank
        own = [stage for stage, where in enumerate(rank_of) if where == rank]
        if sorted(stages) != own:
            raise ConfigError(
                f"rank {rank} of the pipeline was given the stages {sorted(stages)}, but by its "
                f"schedule it has the stages {own}"
            )
        self._stages = stages
        self._rank_of = rank_of
        self._last = len(rank_of) - 1
        self._mailbox = mailbox
        self._loss_fn = loss_fn
        self._precision = precision
        self._scaler = scaler
        self._recomputed = recomputed
        self._device = device
        self._around = around
        self._timed = timed
        self._timeline = timeline
        self._now = HostClock().now if timeline is None else timeline.now
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._here: dict[Message, tuple[list[Tensor], bool]] = {}
        self._losses: dict[int, Tensor] = {}
        self._outputs: dict[int, Any] = {}
        self._with_loss = True
        self.microbatches: dict[int, Microbatch] = {}
        self.times: list[Timed] = []

    def run(
        self,
        ranks: Sequence[Sequence[Action]],
        numbers: Sequence[int],
        with_loss: bool = True,
    ) -> None:
        """Do this rank's part of some actions.

        Args:
            ranks: of all ranks, since theirs say which messages will come in which order.
            numbers: of the microbatches of which the last stage computes the loss.
            with_loss: it does; else outputs alone are made.
        """
        self._with_loss = with_loss
        rank = self._mailbox.rank
        for source, actions in enumerate(ranks):
            if source != rank:
                sent = messages(actions, self._rank_of, self._form, rank, with_loss)
                self._mailbox.expect(source, sent)
        left = len(numbers)
        for action in ranks[rank]:
            self._do(action)
            if action.kind == "F" and action.stage == self._last:
                left -= 1
                if left == 0 and with_loss:
                    self._tell_loss(numbers)

    def predict(self, batch: StepBatch) -> tuple[list[Any] | None, Tensor]:
        """Forward passes alone, of the batch's microbatches as they are; between steps.

        Returns:
            Their outputs, on the rank of the last stage; and their mean loss.
        """
        outputs = self._forward_only(batch, with_loss=True)
        return outputs, self.loss(range(-len(batch.microbatches), 0))

    def outputs(self, batch: Any) -> Any:
        """Of a batch that may lack targets, on the rank of the last stage; between steps."""
        outputs = self._forward_only(StepBatch([batch], [count_samples(batch)]), with_loss=False)
        return None if outputs is None else outputs[0]

    @torch.no_grad()
    def _forward_only(self, batch: StepBatch, with_loss: bool) -> list[Any] | None:
        microbatches = cut_step(batch, 1)
        numbers = range(-len(microbatches), 0)  # no others have these
        self.microbatches.update(zip(numbers, microbatches, strict=True))
        order = breadth_first(self._rank_of, len(numbers), backward=False)
        ranks = [[a._replace(microbatch=numbers[a.microbatch]) for a in own] for own in order.ranks]
        self.run(ranks, numbers, with_loss)
        for number in numbers:
            del self.microbatches[number]
        is_last = self._mailbox.rank == self._rank_of[self._last]
        return [self._outputs.pop(number) for number in numbers] if is_last else None

    def loss(self, numbers: Sequence[int]) -> Tensor:
        """The mean loss of some microbatches, once; on every rank, and the same on all."""
        if self._mailbox.rank == self._rank_of[self._last]:
            return self._losses.pop(numbers[-1])
        return self._mailbox.receive(Message("loss", self._last, numbers[-1]))[0][0]

    def _tell_loss(self, numbers: Sequence[int]) -> None:
        first, *others = (self._losses.pop(i) for i in numbers)
        self._losses[numbers[-1]] = total = sum(others, first)
        for rank in sorted(set(self._rank_of) - {self._mailbox.rank}):
            self._mailbox.send(rank, Message("loss", self._last, numbers[-1]), [total])

    def _do(self, action: Action) -> None:
        """Do one action; a received tensor is waited for, a sent one is not."""
        kind, stage, i = action
        came: tuple[list[Tensor], bool] | None = None
        if kind == "F" and stage > 0:
            came = self._take("activations", stage - 1, i)
        elif kind in ("B", "I") and stage < self._last:
            came = self._take("gradients", stage, i)
        start = self._now()
        with self._around(i):
            if kind == "F":
                self._forward(stage, i, came)
            elif kind == "W":
                self._backward_weights(stage, i)
            else:
                self._backward(kind, stage, i, came[0] if came else [])
        if self._timed:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.times.append(Timed(action, start, self._now()))
        if self._timeline is not None and i >= 0:  # it is trained on
            self._timeline.note(str(action), start)

    def _form(self, microbatch: int) -> Hashable:
        return self.microbatches[microbatch].form

    def _take(self, what: What, stage: int, i: int) -> tuple[list[Tensor], bool]:
        """What a neighbouring stage has made, here or on another rank."""
        message = Message(what, stage, i, self._form(i))
        if message in self._here:
            return self._here.pop(message)
        return self._mailbox.receive(message)

    def _give(
        self, what: What, stage: int, i: int, to: int, tensors: list[Tensor], is_tuple: bool = True
    ) -> None:
        """Hand tensors to the stage ``to``."""
        message = Message(what, stage, i, self._form(i))
        rank = self._rank_of[to]
        if rank == self._mailbox.rank:
            needs = [what == "activations" and t.requires_grad for t in tensors]
            apart = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
            self._here[message] = apart, is_tuple
        else:
            self._mailbox.send(rank, message, tensors, is_tuple)

    def _forward(self, stage: int, i: int, came: tuple[list[Tensor], bool] | None) -> None:
        share = self.microbatches[i].share
        with self._precision.autocast(self._device):
            outputs = self._call(stage, i, came)
        inputs = [] if came is None else [t for t in came[0] if t.requires_grad]
        if stage < self._last:
            tensors, is_tuple = _as_tensors(stage, outputs)
            if torch.is_grad_enabled():
                roots = [get_gradient_edge(t) for t in tensors if t.requires_grad]
                self._passes[stage, i] = _Pass(inputs, roots, None)
            self._give("activations", stage, i, stage + 1, tensors, is_tuple)
            return
        if not self._with_loss:
            self._outputs[i] = outputs
            return
        loss = loss_of(share, *outputs)
        if torch.is_grad_enabled():
            roots = [get_gradient_edge(loss)] if loss.requires_grad else []
            self._passes[stage, i] = _Pass(inputs, roots, torch.full_like(loss, share))
        else:
            self._outputs[i] = outputs[0]
        loss = loss.detach()
        self._losses[i] = loss if share == 1.0 else loss * share

    def _call(self, stage: int, i: int, came: tuple[list[Tensor], bool] | None) -> Any:
        """Outputs of a stage; of the last one outputs and loss, unless there is none."""
        module, batch = self._stages[stage], self.microbatches[i].batch
        if not self._with_loss:
            if came is None:
                return call_without_loss(module, batch)
            return module(tuple(came[0]) if came[1] else came[0][0])
        if came is None:
            if stage == self._last:
                return call_model(module, batch, self._loss_fn)
            return _call_first(module, batch, self._loss_fn)
        tensors, is_tuple = came
        given = tuple(tensors) if is_tuple else tensors[0]
        if stage == self._last:
            return call_model(lambda *_, **__: module(given), batch, self._loss_fn)
        return module(given)

    def _backward(self, kind: Kind, stage: int, i: int, gradients: list[Tensor]) -> None:
        kept = self._passes.pop((stage, i))
        with self._scaler.passes() as scale:
            if kept.scale is not None:
                gradients = [kept.scale * scale]
            if kind == "I" and not self._recomputed and not kept.inputs:
                kept.gradients = gradients  # all of it can wait
            elif kind == "I" and not self._recomputed and kept.roots:
                parameters = self._stages[stage].parameters()
                kept.split = SplitBackward(kept.roots, gradients, kept.inputs, parameters)
            elif kept.roots:
                torch.autograd.backward(kept.roots, gradients)
        if stage > 0:  # also where nothing below learns: who expects a message gets it, empty
            split = kept.split
            found = [t.grad for t in kept.inputs] if split is None else split.input_gradients
            given = [
                torch.zeros_like(x) if g is None else g
                for x, g in zip(kept.inputs, found, strict=True)
            ]
            self._give("gradients", stage - 1, i, stage - 1, given)
        if kind == "I":
            self._passes[stage, i] = _Pass([], kept.roots, None, kept.split, kept.gradients)

    def _backward_weights(self, stage: int, i: int) -> None:
        kept = self._passes.pop((stage, i))
        with self._scaler.passes():
            if kept.split is not None:
                kept.split.finish()
            elif kept.gradients is not None and kept.roots:
                torch.autograd.backward(kept.roots, kept.gradients)


def _call_first(module: nn.Module, batch: Any, loss_fn: LossFn | None) -> Any:
    """As `call_model` calls the model, without the loss."""
    if loss_fn is not None:
        return module(inputs_and_targets(batch)[0])
    return module(**batch) if isinstance(batch, Mapping) else module(*as_arguments(batch))


def _as_tensors(stage: int, outputs: Any) -> tuple[list[Tensor], bool]:
    if isinstance(outputs, Tensor):
        return [outputs], False
    if isinstance(outputs, (tuple, list)) and all(isinstance(o, Tensor) for o in outputs):
        return list(outputs), True
    raise ConfigError(
        f"stage {stage} of the pipeline returned a {type(outputs).__name__}; what goes from one "
        "stage to the next is a tensor or a tuple of tensors: cut the model elsewhere"
    )
