"""In which number formats a step computes, and in which parameters are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import DynamicScaler, LossScale, LossScaler, NoScaler
from scaledtrain.optim.narrow import KahanCompensation, MasterWeights, Rounding, StochasticRounding
from scaledtrain.replica import Replica
from scaledtrain.schema import did_you_mean

__all__ = ["Conversion", "Precision", "PrecisionName", "Update"]

PrecisionName = Literal["fp32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true"]
Update = Literal["stochastic", "kahan", "master", "nearest"]


class _Formats(NamedTuple):
    """What a name stands for."""

    autocast: torch.dtype | None = None
    parameters: torch.dtype | None = None
    scaled: bool = False
    updates: tuple[Update, ...] = ()
    """Ways to update parameters of 16 bits; the first is the default."""


_FORMATS: dict[str, _Formats] = {
    "fp32": _Formats(),
    "bf16-mixed": _Formats(autocast=torch.bfloat16),
    "fp16-mixed": _Formats(autocast=torch.float16, scaled=True),
    "bf16-true": _Formats(
        parameters=torch.bfloat16, updates=("stochastic", "kahan", "master", "nearest")
    ),
    "fp16-true": _Formats(parameters=torch.float16, scaled=True, updates=("master", "kahan")),
}
_HALF = (torch.float16, torch.bfloat16)
_ROUNDINGS: dict[Update, type[Rounding] | None] = {
    "stochastic": StochasticRounding,
    "kahan": KahanCompensation,
    "master": MasterWeights,
    "nearest": None,
}


@dataclass(frozen=True)
class Precision:
    """The number formats of a run.

    | name         | parameters | forward, backward | gradients | loss     |
    |--------------|------------|-------------------|-----------|----------|
    | `fp32`       | float32    | float32           | float32   | as it is |
    | `bf16-mixed` | float32    | autocast bfloat16 | float32   | as it is |
    | `fp16-mixed` | float32    | autocast float16  | float32   | scaled   |
    | `bf16-true`  | bfloat16   | bfloat16          | bfloat16  | as it is |
    | `fp16-true`  | float16    | float16           | float32   | scaled   |

    A parameter w of 16 bits cannot take an update smaller than half of its last place, 2^-9 |w| in
    bfloat16: rounded to the nearest it stays as it is, and training stalls. ``update`` says what is
    done about it; each is described in `scaledtrain.optim.narrow`:

    * ``"stochastic"``: round up or down at random, right in expectation, and the optimizer's state,
      too: nothing but 16-bit numbers between steps;
    * ``"kahan"``: what was rounded off is kept, in 16 bits, and added next time;
    * ``"master"``: the optimizer works on a float32 copy;
    * ``"nearest"``: as torch does it by itself, for comparison.

    Replicas that average parameters (`LocalSGD`, `Gossip`, ...) do so in the parameters' format,
    and lose what is smaller there; gradients that are averaged or pushed to a server, whose copy is
    float32, are no such case. With 16-bit parameters the optimizer's ``step`` is called for some
    parameters at a time: one that looks at all of them together does not fit, but LARS and LAMB do,
    which are given all at once.

    Args:
        name: of the formats.
        update: of 16-bit parameters; None: ``"stochastic"`` for bfloat16, ``"master"`` for float16.
        loss_scale: where the loss is scaled; None: the usual one.
        float32_matmul: how torch multiplies float32 matrices in this process, by
            ``torch.set_float32_matmul_precision``: ``"high"`` lets GPUs use TF32, ``"medium"``
            bfloat16; None leaves it as it is.

    Raises:
        ConfigError: an unknown name, or an option that the formats have no use for.

    Example:
        >>> precision = Precision("bf16-true", update="kahan")
        >>> model = precision.convert(nn.Linear(2, 1))
        >>> model.weight.dtype, model(torch.ones(3, 2)).dtype
        (torch.bfloat16, torch.float32)
        >>> print(precision)
        bf16-true (kahan)

    References:
        Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740; Kalamkar et al. 2019,
        A Study of BFLOAT16 for Deep Learning Training, arXiv 1905.12322; Zamirai et al. 2020,
        Revisiting BFloat16 Training, arXiv 2010.06192 (stochastic rounding, Kahan summation).
    """

    name: PrecisionName = "fp32"
    update: Update | None = None
    loss_scale: LossScale | None = None
    float32_matmul: Literal["highest", "high", "medium"] | None = None

    def __post_init__(self) -> None:
        if self.name not in _FORMATS:
            guess = did_you_mean(self.name, _FORMATS)
            raise ConfigError(f"precision is {self.name!r}{guess}; it can be: {_quoted(_FORMATS)}")
        formats = _FORMATS[self.name]
        if self.update is not None and self.update not in formats.updates:
            raise ConfigError(
                f"precision {self.name} has no update {self.update!r}; "
                + (
                    f"it can be: {_quoted(formats.updates)}"
                    if formats.updates
                    else "its parameters are float32, and take small updates as they are: leave "
                    "it out"
                )
            )
        if self.loss_scale is not None and not formats.scaled:
            raise ConfigError(
                f"precision {self.name} scales no loss, since its gradients have float32's range; "
                "leave loss_scale out, or compute in float16 (fp16-mixed, fp16-true)"
            )
        matmul = ("highest", "high", "medium")
        if self.float32_matmul not in (None, *matmul):
            raise ConfigError(
                f"float32_matmul is {self.float32_matmul!r}; it can be: {_quoted(matmul)}"
            )

    def __str__(self) -> str:
        """The name, and the update where there is a choice."""
        update = self._update
        return self.name if update is None else f"{self.name} ({update})"

    @property
    def _update(self) -> Update | None:
        updates = _FORMATS[self.name].updates
        return self.update or (updates[0] if updates else None)

    def convert(self, model: nn.Module) -> nn.Module:
        """Bring a model, in place, into the format of the parameters; once, before it is trained.

        With 16-bit parameters, buffers are converted as well; the model then takes floating inputs
        of any format, and returns float32, in which a loss function computes; a loss that the model
        returns by itself it computes as it does.

        Raises:
            ConfigError: mixed precision, and the model has 16-bit parameters.
        """
        if self.float32_matmul is not None:
            torch.set_float32_matmul_precision(self.float32_matmul)
        formats = _FORMATS[self.name]
        if formats.autocast is not None:
            for name, parameter in model.named_parameters():
                if parameter.dtype in _HALF:
                    raise ConfigError(
                        f"precision {self.name} keeps parameters in float32, but {name} is "
                        f"{parameter.dtype}; call model.float(), or choose bf16-true or fp16-true"
                    )
        if formats.parameters is None:
            return model
        Conversion(formats.parameters).put_around(model, model)
        return model.to(formats.parameters)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of matrix products under autocast; None: that of the parameters."""
        return _FORMATS[self.name].autocast

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Context in which the forward pass runs."""
        dtype = self.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    @property
    def scales_loss(self) -> bool:
        """Whether backward passes are of a loss that is scaled into the range of float16."""
        return _FORMATS[self.name].scaled

    def scaler(self, replica: Replica) -> LossScaler:
        """What runs the backward passes of a replica; once, as the parameters are prepared."""
        if not _FORMATS[self.name].scaled:
            return NoScaler()
        return DynamicScaler(self.loss_scale or LossScale(), replica.parameters)

    @property
    def rounds_at_random(self) -> bool:
        """Whether parameters, or their optimizer's state, are, so that copies elsewhere differ."""
        rounding = _ROUNDINGS[self._update] if self._update is not None else None
        narrow_state = rounding is not None and rounding.narrow_state
        return narrow_state and _FORMATS[self.name].parameters is torch.bfloat16

    def rounding(self, seed: int) -> Rounding | None:
        """How updates get into 16-bit parameters; None: the optimizer does it by itself.

        Args:
            seed: of random numbers; the same on all replicas, so that equal ones stay equal.
        """
        update = self._update
        make = None if update is None else _ROUNDINGS[update]
        return None if make is None else make(seed)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


class Conversion(NamedTuple):
    """What is around a model whose parameters have 16 bits; a model in stages has it at its ends.

    Args:
        dtype: of the parameters.
    """

    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Conversion | None:
        """What `Precision.convert` has put around a model; None: nothing."""
        hooks = model._forward_pre_hooks.values()
        dtypes = [h.args[0] for h in hooks if isinstance(h, partial) and h.func is _narrow_inputs]
        return cls(dtypes[0]) if dtypes else None

    @staticmethod
    def has_put(hook: Callable[..., Any]) -> bool:
        """Whether a hook is one of these."""
        return hook is _widen_outputs or getattr(hook, "func", None) is _narrow_inputs

    def put_around(self, first: nn.Module | None, last: nn.Module | None) -> None:
        """Let one module take floating inputs of any format, and one return float32."""
        if first is not None:
            first.register_forward_pre_hook(partial(_narrow_inputs, self.dtype), with_kwargs=True)
        if last is not None:
            last.register_forward_hook(_widen_outputs)

    def narrow(self, inputs: Any) -> Any:
        """Inputs as the model computes with them."""
        return _narrow(self.dtype, inputs)

    def widening(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The loss of outputs that have not been widened."""
        return lambda outputs, targets: loss_fn(_widen(outputs), targets)


def _narrow_inputs(
    dtype: torch.dtype, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _narrow(dtype, args), _narrow(dtype, kwargs)


def _narrow(dtype: torch.dtype, values: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def _widen_outputs(model: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
    return _widen(outputs)


def _widen(values: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in _HALF else t, values)
