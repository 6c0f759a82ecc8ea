"""In which order a replica runs the forward and backward passes of one step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scaledtrain.clock import Clock, HostClock
from scaledtrain.data.steps import StepBatch
from scaledtrain.drop_compute import DropCompute
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import LossScaler, NoScaler
from scaledtrain.precision import Precision

__all__ = [
    "Abandon",
    "Computed",
    "LossFn",
    "MicrobatchLoop",
    "Pace",
    "Schedule",
    "Slowdown",
    "Told",
    "as_arguments",
    "call_model",
    "call_without_loss",
    "inputs_and_targets",
    "loss_of",
]

LossFn = Callable[[Any, Any], Tensor]
Abandon = Callable[[], bool] | None
Told = Callable[[int], None] | None


class Computed(NamedTuple):
    """What a schedule made of a step's microbatches."""

    loss: Tensor
    """The mean over ``samples``, a detached scalar on the device; the gradients are those of it."""
    samples: int
    """How many of the batch's samples were computed with."""
    share: float = 1.0
    """Of the batch's samples, exactly 1 for all, so that equal weights stay equal."""
    is_due: bool = True
    """Whether gradients come with this step, on whatever replica; else there is no update."""


class Schedule(Protocol):
    """Runs one step's microbatches; their gradients add up in the parameters' ``.grad``."""

    def run(self, batch: StepBatch, abandon: Abandon = None) -> Computed | None:
        """Run forward and backward.

        Args:
            batch: the microbatches.
            abandon: asked now and then; once it is true the rest need not be computed. None: all
                of it is wanted in any case.

        Returns:
            Loss and samples; None if it was abandoned: the gradients are then of no use.
        """

    def backward_passes(self, batch: StepBatch) -> int:
        """How many will add up in that step's gradients; 0: that is not known."""

    def weight(self, batch: StepBatch) -> float:
        """This replica's in a mean of the gradients that will be there after that step."""

    def predict(self, batch: StepBatch) -> tuple[list[Any] | None, Tensor]:
        """Forward passes alone, without gradients, of a batch's microbatches as they are.

        Returns:
            Their outputs, None where another rank has them; and their mean loss.
        """

    def outputs(self, batch: Any) -> Any:
        """Of the model for a batch, which may lack targets; None where another rank has them."""

    @property
    def pending(self) -> int:
        """Steps on no batch after the last one, until all gradients have come."""

    @property
    def one_by_one(self) -> bool:
        """Whether microbatches run one after another, in each step as many as its batch has."""

    def tell(self, told: Told) -> None:
        """Call this after each microbatch, with its samples; in ``.grad`` is then what there is.

        Only a schedule that runs them one by one does.
        """


def call_model(model: Callable[..., Any], batch: Any, loss_fn: LossFn | None) -> tuple[Any, Tensor]:
    """Outputs and loss of one microbatch: ``model(**batch).loss``, or ``loss_fn(model(x), y)``."""
    if loss_fn is None:
        outputs = model(**batch) if isinstance(batch, Mapping) else model(*as_arguments(batch))
        loss = _own_loss(outputs)
        if loss is None:
            raise ConfigError(
                "no loss_fn was given, and the model returned "
                f"{type(outputs).__name__} without a .loss; pass loss_fn(outputs, targets), or "
                "put the labels into the batch so that the model computes its loss"
            )
    else:
        inputs, targets = inputs_and_targets(batch)
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"the loss must be one number (a zero-dimensional tensor), not {shape}; "
            "average it over the batch, e.g. loss.mean()"
        )
    return outputs, loss


def call_without_loss(model: Callable[..., Any], batch: Any) -> Any:
    """Outputs for inputs alone, (inputs, targets), or the keywords of a model."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _own_loss(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    return getattr(outputs, "loss", None)


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """The two parts of a batch for a ``loss_fn``.

    Raises:
        ConfigError: it has not two.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ConfigError(
            f"with a loss_fn each batch must be (inputs, targets); the loader gave "
            f"{_describe(batch)}. For a dict batch leave out loss_fn and let the model return "
            "its loss"
        )
    return batch[0], batch[1]


def loss_of(weight: float, outputs: Any, loss: Tensor) -> Tensor:
    """The loss of a microbatch; zero if it counts nothing, since a mean of no terms is NaN.

    Its backward pass goes through the outputs all the same: other ranks may take part in it. Of a
    model that returns its loss alone that is all there is, and has to be finite.
    """
    if weight:
        return loss
    parts = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t is not loss]
    parts = [(t * 0.0).sum() for t in parts if t.requires_grad]
    if not parts:
        return loss * 0.0
    return torch.stack([t.to(loss.dtype) for t in parts]).sum().nan_to_num()  # of infinite outputs


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """With which a model is called that returns its own loss; a mapping gives keywords instead."""
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


class Pace(Protocol):
    """How long computing takes on a device that is slower than the host's, or only imagined."""

    def begin_step(self) -> None:
        """A step begins: what is drawn once for a step is drawn now."""

    def seconds(self, elapsed: float, share: float) -> float:
        """How long a microbatch of this step takes in all, at least ``elapsed``.

        Args:
            elapsed: what it took the host.
            share: of the samples of a step that are in it; a replica with more samples than others
                has more than 1 in all.
        """


class MicrobatchLoop:
    """Microbatches one after another on one device: plain training and gradient accumulation.

    The gradient is that of the mean loss over all samples of the step, also when the last
    microbatch is smaller: loss i counts n_i / sum_j n_j. Where `DropCompute` ends a step early it
    is that of the mean over the samples that were computed with.

    Args:
        model: called as ``model(inputs)``, or as ``model(**batch)`` when there is no ``loss_fn``.
        evaluated: called so in evaluations; None: the model.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the microbatch's samples, a scalar.
        precision: its ``autocast`` is used.
        parameters: whose gradients are computed.
        scaler: runs the backward passes; default: of the loss as it is.
        drop_compute: when to begin no further microbatch.
        paces: how long computing takes: each is asked with the time that the one before told.
        clock: by which it takes that long.
        device: on which the model computes; None: where the parameters are, which may be in the
            host's memory between steps.

    Attributes:
        microbatch_seconds: what each microbatch of the last step took, in order. On CUDA the time
            of the device if there is a threshold or a pace, else that of the host.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        loss_fn: LossFn | None,
        precision: Precision,
        parameters: Sequence[nn.Parameter],
        *,
        evaluated: Callable[..., Any] | None = None,
        scaler: LossScaler | None = None,
        drop_compute: DropCompute | None = None,
        paces: Sequence[Pace] = (),
        clock: Clock | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self._evaluated = evaluated or model
        self.microbatch_seconds: list[float] = []
        self._loss_fn = loss_fn
        self._precision = precision
        self._parameters = parameters
        self._scaler = scaler or NoScaler()
        self._drop_compute = drop_compute or DropCompute()
        self._paces = paces
        self._clock = clock or HostClock()
        self._device = parameters[0].device if device is None else device
        self._told: Told = None
        # Else the clock would show when kernels were launched.
        may_drop = math.isfinite(self._drop_compute.threshold_seconds)
        self._waits_for_device = may_drop or bool(paces)

    def run(self, batch: StepBatch, abandon: Abandon = None) -> Computed | None:
        """Run forward and backward for each microbatch; asks ``abandon`` between the two."""
        total: Tensor | None = None
        samples = batch.samples
        mean = samples if batch.gradient_samples is None else batch.gradient_samples
        even = mean / batch.multiple if batch.even_share is None else batch.even_share
        computed = 0
        self.microbatch_seconds = []
        for pace in self._paces:
            pace.begin_step()
        for microbatch, size in zip(batch.microbatches, batch.sizes, strict=True):
            if computed and self._drop_compute.is_over(
                sum(self.microbatch_seconds) / batch.multiple
            ):
                break
            start = self._clock.now()
            with self._precision.autocast(self._device):
                # The outputs are let go of before backward, which can use their memory.
                loss = loss_of(size, *call_model(self.model, microbatch, self._loss_fn))
            if abandon is not None and abandon():
                return None
            if size != mean:
                loss = loss * (size / mean)
            self._scaler.backward(loss)
            if self._told is not None:
                self._told(size)
            loss = loss.detach()
            total = loss if total is None else total + loss
            computed += size
            if self._waits_for_device and loss.is_cuda:
                torch.cuda.synchronize(loss.device)
            if self._paces and not self._take_time(start, size / even if even else 1.0, abandon):
                return None
            self.microbatch_seconds.append(self._clock.now() - start)
        if total is None:  # this replica has no samples left in a step that others still make
            total = torch.zeros(())
        if computed and computed != mean:
            total = total * (mean / computed)
        if computed < samples:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            torch._foreach_mul_(gradients, samples / computed)
        return Computed(total, computed, 1.0 if computed == samples else computed / samples)

    def backward_passes(self, batch: StepBatch) -> int:
        """One for each microbatch."""
        return len(batch.microbatches)

    def weight(self, batch: StepBatch) -> float:
        """The batch's."""
        return batch.weight

    @torch.no_grad()
    def predict(self, batch: StepBatch) -> tuple[list[Any], Tensor]:
        """Outputs and mean loss."""
        outputs: list[Any] = []
        total = torch.zeros((), device=self._device)
        for microbatch, size in zip(batch.microbatches, batch.sizes, strict=True):
            with self._precision.autocast(self._device):
                made, loss = call_model(self._evaluated, microbatch, self._loss_fn)
            outputs.append(made)
            total = loss if size == batch.samples else total + loss * (size / batch.samples)
        return outputs, total

    @torch.no_grad()
    def outputs(self, batch: Any) -> Any:
        """The model's."""
        with self._precision.autocast(self._device):
            return call_without_loss(self._evaluated, batch)

    pending = 0
    one_by_one = True

    def tell(self, told: Told) -> None:
        """Call this after each microbatch; see `Schedule`."""
        self._told = told

    def _take_time(self, start: float, share: float, abandon: Abandon) -> bool:
        seconds = self._clock.now() - start
        for pace in self._paces:
            seconds = pace.seconds(seconds, share)
        return self._clock.sleep_until(start + seconds, abandon)


@dataclass(frozen=True)
class Slowdown:
    """A handicap for experiments with stragglers.

    A step takes factor x draw x max(its compute, min_compute_seconds), and never less than its
    compute. Where ``balance`` gives replicas other shares than even ones, the second time is in
    proportion to a replica's samples.

    Args:
        factors: rank -> how many times longer its compute takes (4.0: four times), at least 1; a
            rank that the job does not have is ignored.
        min_compute_seconds: pretend that the device needs at least this long for a step. With it a
            few cores can stand for many devices, since a sleeping rank uses no core.
        gamma_shape: multiply the time of each step by a draw from the gamma distribution of this
            shape and of mean 1, whose standard deviation is 1 / sqrt(shape). To see the draws below
            1 as well, choose ``min_compute_seconds`` well above what computing takes. None: every
            draw is 1.

    Raises:
        ConfigError: a factor below 1, a negative time, or a shape that is not positive.

    References:
        Ali et al. 2000, Task Execution Time Modeling for Heterogeneous Computing Systems (gamma
        distributed times).
    """

    factors: Mapping[int, float]
    min_compute_seconds: float = 0.0
    gamma_shape: float | None = None

    def __post_init__(self) -> None:
        for rank, factor in self.factors.items():
            if factor < 1.0:
                raise ConfigError(
                    f"slowdown of rank {rank} is {factor}; a factor is >= 1 (4.0 makes the rank "
                    "four times slower): slow down the other ranks instead"
                )
        if self.min_compute_seconds < 0:
            raise ConfigError(f"min_compute_seconds is {self.min_compute_seconds}; it is >= 0")
        if self.gamma_shape is not None and not self.gamma_shape > 0:
            raise ConfigError(
                f"gamma_shape is {self.gamma_shape}; it is > 0 (the larger, the more alike are the "
                "times), or None for times that do not vary"
            )

    @property
    def slows(self) -> bool:
        """Whether any rank computes slower than it can."""
        return (self.factors, self.min_compute_seconds, self.gamma_shape) != ({}, 0.0, None)

    def pace(self, rank: int, seed: int = 0) -> Pace | None:
        """How fast that rank is to compute, None: as it can; draws follow from rank and seed."""
        factor = self.factors.get(rank, 1.0)
        if (factor, self.min_compute_seconds, self.gamma_shape) == (1.0, 0.0, None):
            return None
        return _Slowed(self, factor, random.Random(f"{seed} {rank}"))


class _Slowed:
    def __init__(self, slowdown: Slowdown, factor: float, generator: random.Random) -> None:
        self._factor = self._multiple = factor
        self._least = slowdown.min_compute_seconds
        self._shape = slowdown.gamma_shape
        self._generator = generator

    def begin_step(self) -> None:
        if self._shape is not None:
            draw = self._generator.gammavariate(self._shape, 1.0 / self._shape)
            self._multiple = self._factor * draw

    def seconds(self, elapsed: float, share: float) -> float:
        return max(elapsed, self._multiple * max(elapsed, self._least * share))
