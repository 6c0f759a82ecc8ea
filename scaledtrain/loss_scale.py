"""Backward passes lifted into the range of float16, and what an overflow means."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError, NonFiniteLossError
from scaledtrain.replica import Replica

__all__ = ["DynamicScaler", "LossScale", "LossScaler", "NoScaler"]

_TOGETHER = 16  # gradients of which there are two for a moment


class LossScaler(ABC):
    """Runs backward passes, and judges the gradients that they left.

    Between the two, gradients are always in the units of the loss: whoever adds them up, sends,
    compresses or looks at them need not know that anything was scaled.

    Attributes:
        overflows: steps without an update so far, since a gradient was not finite.
    """

    overflows = 0

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, a scalar, to the parameters' ``.grad``."""

    @contextmanager
    def passes(self) -> Iterator[float]:
        """Backward passes inside are made by the caller, of the loss times what this gives."""
        yield 1.0

    @abstractmethod
    def hand_over(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Add to the parameters' ``.grad`` what backward passes have left somewhere else.

        Args:
            parameters: with or without a gradient.
            gradients: of the losses that ``backward`` was given; not used by anybody else.
        """

    @abstractmethod
    def check_and_clip(
        self, replica: Replica, max_norm: float | None, measure: bool
    ) -> tuple[bool, Tensor | None]:
        """Make the gradients of a step, combined over replicas or not, ready for the update.

        Args:
            replica: whose gradients.
            max_norm: clip to this 2-norm; None does not clip.
            measure: give the norm also when nothing is clipped.

        Returns:
            Whether the update may be made, and the norm before clipping (None if not known).
        """

    def metrics(self) -> Mapping[str, float]:
        """What a record should tell, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - it may need nothing
        """Restore what ``state_dict`` returned."""


class NoScaler(LossScaler):
    """Nothing is scaled, and every update is made."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the parameters' ``.grad``."""
        loss.backward()  # type: ignore[no-untyped-call]

    def hand_over(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """As they are."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            _add(parameter, gradient)

    def check_and_clip(
        self, replica: Replica, max_norm: float | None, measure: bool
    ) -> tuple[bool, Tensor | None]:
        """Clip; see `LossScaler`."""
        if max_norm is not None:
            return True, replica.clip_gradients(max_norm)
        return True, replica.gradient_norm() if measure else None


@dataclass(frozen=True)
class LossScale:
    """How the scale of the loss follows what gradients can bear.

    float16 holds numbers from 6e-8 to 65504; gradients are often smaller. The loss is multiplied by
    a scale S, so that everything that backward computes is S times larger, and the gradients are
    divided by S in float32. If one is not finite then, S was too large (or the data are bad): the
    step makes no update, and S is multiplied by ``backoff_factor``. After ``growth_interval`` steps
    without an overflow it is multiplied by ``growth_factor``.

    Args:
        initial: the first S. A power of two changes no bit of a gradient that neither overflows nor
            vanishes, if the factors are powers of two as well.
        growth_interval: clean steps before S grows.
        growth_factor: > 1.
        backoff_factor: in (0, 1).
        minimum: an overflow at this S ends the run, since the loss scale is not to blame for it.

    Raises:
        ConfigError: a value out of its range.

    References:
        Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740. The numbers are those
        of ``torch.amp.GradScaler``.
    """

    initial: float = 65536.0
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    minimum: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "minimum": (self.minimum > 0, "a scale > 0"),
            "initial": (self.minimum <= self.initial < math.inf, f">= minimum {self.minimum}"),
            "growth_interval": (self.growth_interval >= 1, "a number of steps, >= 1"),
            "growth_factor": (self.growth_factor > 1, "> 1"),
            "backoff_factor": (0 < self.backoff_factor < 1, "between 0 and 1"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ConfigError(
                    f"the loss scale's {name} is {getattr(self, name)}; it is {expected}"
                )


class DynamicScaler(LossScaler):
    r"""Scales the loss by S, and unscales each gradient where it arrives at its parameter.

        p.grad += float32(d(S loss) / dp) / S

    That is before it is added to those of earlier microbatches, and before any hook that waits for
    finished gradients (a bucket that begins its all-reduce during backward), so that neither the
    mean over replicas nor what a compression keeps is ever in units of an S that changes. Other
    backward passes through the same parameters are left alone. Where no hook waits, and there are
    no earlier gradients, all are unscaled at the end of the backward pass, which is faster.

    The verdict is about the gradients after they were combined: with `Sync` an overflow on one
    replica is in the mean, and all skip together; a replica that trains alone skips alone, with a
    scale of its own. A crash loses scale and counts (save ``state_dict``).

    Args:
        options: the scale.
        parameters: whose gradients are unscaled; those of 16 bits get gradients in float32.

    Attributes:
        scale: S of the next backward pass.

    Example:
        >>> weight = nn.Parameter(torch.tensor(3.0))
        >>> scaler = DynamicScaler(LossScale(initial=1024.0), [weight])
        >>> scaler.backward(weight * 2)
        >>> weight.grad
        tensor(2.)
    """

    def __init__(self, options: LossScale, parameters: Sequence[nn.Parameter]) -> None:
        self.scale = options.initial
        self._options = options
        self._clean = 0
        self._parameters = parameters
        self._under_way = False
        me = weakref.ref(self)

        def unscale(gradient: Tensor) -> Tensor | None:
            owner = me()
            if owner is None or not owner._under_way:
                return None
            return gradient * (1.0 / owner.scale)

        hooks = []
        for parameter in parameters:
            if parameter.dtype.itemsize < 4:
                parameter.grad_dtype = torch.float32
            hooks.append(parameter.register_hook(unscale))  # type: ignore[no-untyped-call]
        finalizer = weakref.finalize(self, lambda: [hook.remove() for hook in hooks])
        finalizer.atexit = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the parameters' ``.grad``, computed S times larger."""
        with self.passes() as scale:
            (loss * scale).backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def passes(self) -> Iterator[float]:
        """Backward passes inside are of S times the loss; their gradients are unscaled."""
        together = not any(map(_is_watched, self._parameters))
        self._under_way = not together
        try:
            yield self.scale
        finally:
            self._under_way = False
            if together:
                self._unscale()

    def _unscale(self) -> None:
        """All gradients, some at a time; not in place: some may share memory."""
        present = [p for p in self._parameters if p.grad is not None]
        for i in range(0, len(present), _TOGETHER):
            some = present[i : i + _TOGETHER]
            gradients = [p.grad for p in some if p.grad is not None]
            unscaled = torch._foreach_mul(gradients, 1.0 / self.scale)
            for parameter, gradient in zip(some, unscaled, strict=True):
                parameter.grad = gradient

    def hand_over(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Divided by S, where they are, so that there are not two of each."""
        pairs = zip(parameters, gradients, strict=True)
        wide = [gradient.to(parameter.grad_dtype) for parameter, gradient in pairs]
        if wide:
            torch._foreach_mul_(wide, 1.0 / self.scale)
        for parameter, gradient in zip(parameters, wide, strict=True):
            _add(parameter, gradient)

    def check_and_clip(
        self, replica: Replica, max_norm: float | None, measure: bool
    ) -> tuple[bool, Tensor | None]:
        """Judge by the norm, which is finite if every gradient is; see `LossScaler`.

        But gradients whose squares have a sum beyond float32 (a norm above 1.8e19, which no update
        would survive) count as an overflow, too.

        Raises:
            NonFiniteLossError: an overflow, and the scale is as small as it may be.
        """
        norm = replica.gradient_norm() if max_norm is None else replica.clip_gradients(max_norm)
        if math.isfinite(norm.item()):
            self._clean += 1
            if self._clean >= self._options.growth_interval:  # a resumed run's may be smaller
                self._clean = 0
                self.scale *= self._options.growth_factor
            return True, norm
        if self.scale <= self._options.minimum:
            raise NonFiniteLossError(
                f"a gradient is not finite although the loss scale is down to {self.scale}, so it "
                "is not the scale that makes it overflow; lower the learning rate, look for NaN in "
                "the inputs, or compute in bfloat16 (precision=bf16-mixed), which has float32's "
                "range"
            )
        self._clean = 0
        self.overflows += 1
        self.scale = max(self.scale * self._options.backoff_factor, self._options.minimum)
        return False, None

    def metrics(self) -> Mapping[str, float]:
        """Scale and overflows."""
        return {"loss_scale": self.scale, "overflows": self.overflows}

    def state_dict(self) -> dict[str, Any]:
        """Scale, clean steps since it last changed, overflows."""
        return {"scale": self.scale, "clean": self._clean, "overflows": self.overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; that of a run without a scale changes nothing."""
        self.scale = state.get("scale", self.scale)
        self._clean = state.get("clean", self._clean)
        self.overflows = state.get("overflows", self.overflows)


def _is_watched(parameter: nn.Parameter) -> bool:
    """Whether a gradient that comes is added to one, or seen by a hook other than a scaler's."""
    return bool(
        parameter.grad is not None
        or parameter._post_accumulate_grad_hooks
        or len(parameter._backward_hooks or ()) > 1
    )


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
