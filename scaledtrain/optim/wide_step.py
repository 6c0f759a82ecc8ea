"""Any optimizer, on parameters of 16 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.optim.layerwise import LayerwiseOptimizer
from scaledtrain.optim.narrow import Narrow, Rounding
from scaledtrain.optim.together import AT_ONCE_ON_A_GPU, portions, round_all, widened

__all__ = ["WideStep"]

_AT_ONCE = 2**20  # numbers, on a CPU
_HALF = (torch.float16, torch.bfloat16)


class WideStep:
    """Lets an optimizer work in float32 on parameters of 16 bits.

    ``step`` takes the parameters some at a time: each becomes float32 for the moment, with its
    gradient and its state, the optimizer's own ``step`` is called, which skips those without a
    gradient, and all become 16 bits again. So any optimizer will do that treats every parameter by
    itself: all of ``torch.optim`` but LBFGS. LARS and LAMB will, too: where they clip a norm over
    all tensors, or work on shards, all are widened at once. Groups, learning rates and fused
    kernels are as usual. Parameters of 32 bits are left alone.

    The memory for float32 is that of ``n_at_once`` numbers at a time, or of the largest tensor if
    that is larger. A crash loses what is not saved: ``state_dict`` holds what the optimizer's own
    does not.

    Args:
        optimizer: of the parameters.
        rounding: of these.
        n_at_once: numbers that are widened together; None: 2^20 on a CPU, whose caches they are to
            fit, and 2^24 on a GPU, which has little to do for fewer.

    Example:
        >>> from scaledtrain.optim import StochasticRounding
        >>> weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = WideStep(sgd, StochasticRounding(seed=0))
        >>> weight.grad = torch.full_like(weight, 2.0**-10)  # an eighth of the gap above 1
        >>> optimizer.step()
        >>> (weight < 1).float().mean()      # below 1 the gap is 2^-8: a quarter
        tensor(0.2...)
    """

    def __init__(
        self, optimizer: Optimizer, rounding: Rounding, *, n_at_once: int | None = None
    ) -> None:
        self._optimizer = optimizer
        self._rounding = rounding
        self._n_at_once = n_at_once

    def step(self) -> None:
        """Make one update from the parameters' ``.grad``."""
        gradients = {
            index: parameter.grad
            for index, parameter in enumerate(self._parameters())
            if parameter.grad is not None
        }
        parameters = list(self._parameters())
        for index in gradients:
            parameters[index].grad = None
        for some in portions(parameters, list(gradients), self._most_at_once()):
            of_dtypes = [
                {i: parameters[i].data for i in some if parameters[i].dtype == dtype}
                for dtype in _HALF
            ]
            for narrow in filter(None, of_dtypes):
                self._widen(parameters, narrow)
            for i in some:
                parameters[i].grad = gradients[i].to(parameters[i].dtype)
            self._optimizer.step()
            for i in some:
                parameters[i].grad = None
            for narrow in filter(None, of_dtypes):
                self._narrow(parameters, narrow)
        for index, gradient in gradients.items():
            parameters[index].grad = gradient

    def _most_at_once(self) -> float:
        optimizer = self._optimizer
        coupled = isinstance(optimizer, LayerwiseOptimizer) and optimizer.couples_tensors
        if coupled:
            return math.inf
        if self._n_at_once is not None:
            return self._n_at_once
        device = next(self._parameters()).device
        return _AT_ONCE if device.type == "cpu" else AT_ONCE_ON_A_GPU

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _widen(self, parameters: Sequence[nn.Parameter], narrow: Mapping[int, Tensor]) -> None:
        values = self._rounding.widen(_some(narrow))
        for i, wide in zip(narrow, values, strict=True):
            dtype, parameters[i].data = parameters[i].dtype, wide
            state = {k: v for k, v in self._state_of(parameters[i]) if v.dtype == dtype}
            if state:
                wide_state = widened(list(state.values()))
                self._optimizer.state[parameters[i]].update(zip(state, wide_state, strict=True))

    def _narrow(self, parameters: Sequence[nn.Parameter], narrow: Mapping[int, Tensor]) -> None:
        bits = self._rounding.bits(list(narrow.values()))
        wide = [parameters[i].data for i in narrow]
        self._rounding.keep(_some(narrow), wide, bits)
        if self._rounding.narrow_state and next(iter(narrow.values())).dtype == torch.bfloat16:
            self._narrow_state([parameters[i] for i in narrow], bits)
        for i, own in narrow.items():
            parameters[i].data = own

    def _narrow_state(self, parameters: Sequence[nn.Parameter], bits: Tensor) -> None:
        """With the bits of their parameters."""
        of_keys: dict[str, list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        own_bits = torch.split(bits, [parameter.numel() for parameter in parameters])
        for parameter, own in zip(parameters, own_bits, strict=True):
            for key, value in self._state_of(parameter):
                if value.dtype == torch.float32:
                    of_keys.setdefault(key, []).append((parameter, value, own))
        for key, found in of_keys.items():
            wide = [value for _, value, _ in found]
            out = [torch.empty_like(value, dtype=torch.bfloat16) for value in wide]
            some = bits if len(found) == len(parameters) else torch.cat([own for *_, own in found])
            round_all(wide, some, out)
            for (parameter, *_), value in zip(found, out, strict=True):
                self._optimizer.state[parameter][key] = value

    def _state_of(self, parameter: nn.Parameter) -> list[tuple[str, Tensor]]:
        """Tensors of the parameter's shape: not the count of steps, which would stand still."""
        state = self._optimizer.state.get(parameter, {})
        return [
            (key, value)
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape
        ]

    def state_dict(self) -> dict[str, Any]:
        """A copy of what the rounding remembers."""
        return self._rounding.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], of_optimizer: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, when the optimizer's own state has been restored.

        Args:
            state: as returned.
            of_optimizer: the optimizer's own, as saved: it brings its state into the parameters'
                format when it loads it, in which float32 is lost.
        """
        parameters = list(self._parameters())
        self._rounding.load_state_dict(state, parameters[0].device)
        saved = (i for group in of_optimizer["param_groups"] for i in group["params"])
        for parameter, i in zip(parameters, saved, strict=True):
            own = self._optimizer.state.get(parameter, {})
            for key, value in own.items():
                if isinstance(value, Tensor) and key != "step":  # which it leaves as it is
                    exact = of_optimizer["state"][i][key]
                    self._optimizer.state[parameter][key] = exact.to(value.device, copy=True)


def _some(narrow: Mapping[int, Tensor]) -> Narrow:
    return Narrow(list(narrow), list(narrow.values()))
