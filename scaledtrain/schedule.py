"""In which order a replica runs the forward and backward passes of one step."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from scaledtrain.data.replica_loader import StepBatch
from scaledtrain.drop_compute import DropCompute
from scaledtrain.errors import ConfigError
from scaledtrain.precision import Precision

__all__ = [
    "Computed",
    "LossFn",
    "MicrobatchLoop",
    "Pace",
    "Schedule",
    "Slowdown",
    "call_model",
]

LossFn = Callable[[Any, Any], Tensor]

_NAP_SECONDS = 0.005  # a sleeper looks so often whether its work is still wanted


class Computed(NamedTuple):
    """What a schedule made of a step's microbatches."""

    loss: Tensor
    """The mean over ``samples``, a detached scalar on the device; the gradients are those of it."""
    samples: int
    """How many of the batch's samples were computed with."""


def _never() -> bool:
    return False


class Schedule(Protocol):
    """Runs one step's microbatches; their gradients add up in the parameters' ``.grad``."""

    def run(self, batch: StepBatch, abandon: Callable[[], bool] = _never) -> Computed | None:
        """Run forward and backward.

        Args:
            batch: the microbatches.
            abandon: asked now and then; once it is true the rest need not be computed.

        Returns:
            Loss and samples; None if it was abandoned: the gradients are then of no use.
        """


def call_model(model: Callable[..., Any], batch: Any, loss_fn: LossFn | None) -> tuple[Any, Tensor]:
    """Outputs and loss of one microbatch: ``model(**batch).loss``, or ``loss_fn(model(x), y)``."""
    if loss_fn is None:
        outputs = model(**batch) if isinstance(batch, Mapping) else model(*_as_tuple(batch))
        loss = _own_loss(outputs)
        if loss is None:
            raise ConfigError(
                "no loss_fn was given, and the model returned "
                f"{type(outputs).__name__} without a .loss; pass loss_fn(outputs, targets), or "
                "put the labels into the batch so that the model computes its loss"
            )
    else:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ConfigError(
                f"with a loss_fn each batch must be (inputs, targets); the loader gave "
                f"{_describe(batch)}. For a dict batch leave out loss_fn and let the model return "
                "its loss"
            )
        inputs, targets = batch
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"the loss must be one number (a zero-dimensional tensor), not {shape}; "
            "average it over the batch, e.g. loss.mean()"
        )
    return outputs, loss


def _own_loss(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    return getattr(outputs, "loss", None)


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


@dataclass(frozen=True)
class Pace:
    """How fast a device pretends to compute.

    Args:
        factor: how many times longer everything takes, >= 1.
        min_compute_seconds: a whole step takes at least so long, before the factor.
        draws: for each step one more factor; None: 1.
    """

    factor: float = 1.0
    min_compute_seconds: float = 0.0
    draws: Iterator[float] | None = None

    @property
    def is_real(self) -> bool:
        """Whether nothing is pretended."""
        return (self.factor, self.min_compute_seconds, self.draws) == (1.0, 0.0, None)

    def of_step(self) -> float:
        """How many times longer the step that begins takes."""
        return self.factor if self.draws is None else self.factor * next(self.draws)

    def rest(
        self, start: float, multiple: float, share: float, abandon: Callable[[], bool]
    ) -> bool:
        """Sleep for the rest of the pretended time.

        Args:
            start: when computing began, by ``time.perf_counter``.
            multiple: how many times longer it takes.
            share: of a step that was computed since.
            abandon: asked now and then.

        Returns:
            Whether the work is still wanted.
        """
        elapsed = time.perf_counter() - start
        end = start + multiple * max(elapsed, self.min_compute_seconds * share)
        while (left := end - time.perf_counter()) > 0:
            if abandon():
                return False
            time.sleep(min(left, _NAP_SECONDS))
        return True


class MicrobatchLoop:
    """Microbatches one after another on one device: plain training and gradient accumulation.

    The gradient is that of the mean loss over all samples of the step, also when the last
    microbatch is smaller: loss i counts n_i / sum_j n_j. Where `DropCompute` ends a step early it
    is that of the mean over the samples that were computed with.

    Args:
        model: called as ``model(inputs)``, or as ``model(**batch)`` when there is no ``loss_fn``.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over the microbatch's samples, a scalar.
        precision: its ``autocast`` and ``scale`` are used.
        parameters: whose gradients are computed.
        drop_compute: when to begin no further microbatch.
        pace: how fast to compute, for experiments.

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
        drop_compute: DropCompute | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.model = model
        self.microbatch_seconds: list[float] = []
        self._loss_fn = loss_fn
        self._precision = precision
        self._parameters = parameters
        self._drop_compute = drop_compute or DropCompute()
        self._pace = pace or Pace()
        # Else the clock would show when kernels were launched.
        may_drop = math.isfinite(self._drop_compute.threshold_seconds)
        self._waits_for_device = may_drop or not self._pace.is_real

    def run(self, batch: StepBatch, abandon: Callable[[], bool] = _never) -> Computed | None:
        """Run forward and backward for each microbatch; asks ``abandon`` between the two."""
        total: Tensor | None = None
        samples = batch.samples
        computed = 0
        self.microbatch_seconds = []
        multiple = self._pace.of_step()
        for microbatch, size in zip(batch.microbatches, batch.sizes, strict=True):
            if computed and self._drop_compute.is_over(sum(self.microbatch_seconds)):
                break
            start = time.perf_counter()
            with self._precision.autocast():
                # The outputs are let go of before backward, which can use their memory.
                loss = call_model(self.model, microbatch, self._loss_fn)[1]
            if abandon():
                return None
            if size != samples:
                loss = loss * (size / samples)
            self._precision.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
            total = loss if total is None else total + loss
            computed += size
            if self._waits_for_device and loss.is_cuda:
                torch.cuda.synchronize(loss.device)
            if not self._pace.rest(start, multiple, size / samples, abandon):
                return None
            self.microbatch_seconds.append(time.perf_counter() - start)
        if total is None:  # this replica has no samples left in a step that others still make
            total = torch.zeros(())
        if computed < samples:
            total = total * (samples / computed)
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            torch._foreach_mul_(gradients, samples / computed)
        return Computed(total, computed)


@dataclass(frozen=True)
class Slowdown:
    """A handicap for experiments with stragglers.

    A step takes factor x draw x max(its compute, min_compute_seconds), and never less than its
    compute.

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

    def pace(self, rank: int, seed: int = 0) -> Pace:
        """How fast that rank is to compute; the draws follow from rank and seed."""
        factor, shape = self.factors.get(rank, 1.0), self.gamma_shape
        if shape is None:
            return Pace(factor, self.min_compute_seconds)
        return Pace(factor, self.min_compute_seconds, _gamma_draws(shape, f"{seed} {rank}"))


def _gamma_draws(shape: float, seed: str) -> Iterator[float]:
    generator = random.Random(seed)
    while True:
        yield generator.gammavariate(shape, 1.0 / shape)
