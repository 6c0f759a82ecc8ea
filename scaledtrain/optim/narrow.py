"""Updates of parameters that have only 16 bits, by any optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.optim.layerwise import LayerwiseOptimizer
from scaledtrain.optim.rounding import random_bits, stochastic_round

__all__ = [
    "KahanCompensation",
    "MasterWeights",
    "Rounding",
    "StochasticRounding",
    "WideStep",
]

_AT_ONCE, _AT_ONCE_ON_A_GPU = 2**20, 2**24
_HALF = (torch.float16, torch.bfloat16)


class Rounding(ABC):
    """How a parameter of 16 bits holds a value that the optimizer sees in float32.

    Args:
        seed: of random numbers.

    Attributes:
        narrow_state: whether the optimizer's state of bfloat16 parameters is bfloat16, too, rounded
            stochastically, since running means stall as well; float16 is too narrow for it.
    """

    narrow_state: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __repr__(self) -> str:
        """For messages."""
        return f"{type(self).__name__}()"

    @abstractmethod
    def widen(self, index: int, narrow: Tensor) -> Tensor:
        """The value in float32, for the optimizer to change in place.

        Args:
            index: of the parameter.
            narrow: its 16 bits, which somebody else may have written to since the last step.
        """

    @abstractmethod
    def keep(self, index: int, narrow: Tensor, wide: Tensor, bits: Tensor) -> None:
        """Write a value back.

        Args:
            index: of the parameter.
            narrow: its 16 bits, to write to.
            wide: what ``widen`` returned, changed.
            bits: random, for `stochastic_round`.
        """

    def bits(self, like: Tensor) -> Tensor:
        """As many as a tensor has entries, on its device; none if nothing needs them."""
        if not self.narrow_state:
            return torch.empty(0, dtype=torch.int16)
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        return random_bits(like.numel(), self._generator)

    def state_dict(self) -> dict[str, Any]:
        """A copy of what a resumed run needs."""
        return {"generator": None if self._generator is None else self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state_dict`` returned."""
        self._generator = None
        if state["generator"] is not None:
            self._generator = torch.Generator(device)
            self._generator.set_state(state["generator"].cpu())


class StochasticRounding(Rounding):
    r"""bfloat16 only, rounded up or down at random.

        p <- round(float32(p) + update),  E[p] = what float32 would hold

    Between steps AdamW keeps 2 (parameter) + 2 + 2 (state) bytes per parameter, float32 12. A
    replica draws the same numbers as any other with the same seed.
    """

    def widen(self, index: int, narrow: Tensor) -> Tensor:
        """As it is."""
        return narrow.float()

    def keep(self, index: int, narrow: Tensor, wide: Tensor, bits: Tensor) -> None:
        """Round at random."""
        stochastic_round(wide, bits, narrow)


class KahanCompensation(Rounding):
    r"""16 bits for the parameter, and 16 for what they lack.

        w = float32(p) + float32(c) + update,  p <- nearest(w),  c <- nearest(w - p)

    so about twice the significant bits of p. bfloat16 with AdamW: 4 + 2 + 2 bytes per parameter.

    Args:
        seed: of random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._compensation: dict[int, Tensor] = {}

    def widen(self, index: int, narrow: Tensor) -> Tensor:
        """Parameter and compensation."""
        wide = narrow.float()
        rest = self._compensation.get(index)
        return wide if rest is None else wide.add_(rest)

    def keep(self, index: int, narrow: Tensor, wide: Tensor, bits: Tensor) -> None:
        """To the nearest, and what is left over."""
        narrow.copy_(wide)
        # Of an overflow the rest would be no number.
        rest = torch.where(narrow.isfinite(), wide - narrow.float(), 0.0)
        self._compensation[index] = rest.to(narrow.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, and c."""
        rests = {index: rest.clone() for index, rest in self._compensation.items()}
        return {**super().state_dict(), "compensation": rests}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state, device)
        rests = state["compensation"].items()
        self._compensation = {index: rest.to(device, copy=True) for index, rest in rests}


class MasterWeights(Rounding):
    r"""The optimizer's own copy m of the parameters, in float32, with its state in float32.

        m <- m + update,  p <- nearest(m)

    An entry of p that somebody else has changed since, say a mean over replicas, is taken over into
    m; the others keep what p does not show. AdamW: 2 + 4 + 4 + 4 bytes per parameter.

    Args:
        seed: of random numbers.
    """

    narrow_state = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._masters: dict[int, Tensor] = {}

    def widen(self, index: int, narrow: Tensor) -> Tensor:
        """The copy, with what was changed from outside."""
        master = self._masters.get(index)
        if master is None:
            master = self._masters[index] = narrow.float()
        else:
            torch.where(master.to(narrow.dtype) == narrow, master, narrow.float(), out=master)
        return master

    def keep(self, index: int, narrow: Tensor, wide: Tensor, bits: Tensor) -> None:
        """To the nearest."""
        narrow.copy_(wide)

    def state_dict(self) -> dict[str, Any]:
        """The copies."""
        masters = {index: master.clone() for index, master in self._masters.items()}
        return {**super().state_dict(), "masters": masters}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state, device)
        masters = state["masters"].items()
        self._masters = {index: master.to(device, copy=True) for index, master in masters}


class WideStep:
    """Lets an optimizer work in float32 on parameters of 16 bits.

    ``step`` takes the parameters some at a time: each becomes float32 for the moment, with its
    gradient and its state, the optimizer's own ``step`` is called, which skips those without a
    gradient, and all become 16 bits again. So any optimizer will do that treats every parameter by
    itself, as all of ``torch.optim`` do but LBFGS, and LARS and LAMB unless they clip a norm over
    all tensors or work on shards, when all are widened at once; its groups, learning rates and
    fused kernels are as usual. Parameters of 32 bits are left alone.

    The memory for float32 is that of ``n_at_once`` numbers at a time, or of the largest tensor if
    that is larger. A crash loses what is not saved: ``state_dict`` holds what the optimizer's own
    does not.

    Args:
        optimizer: of the parameters.
        rounding: of these.
        n_at_once: numbers that are widened together; None: 2^20 on a CPU, whose caches they are to
            fit, and 2^24 on a GPU, which has little to do for fewer.

    Example:
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
        for some in _portions(parameters, list(gradients), self._most_at_once()):
            narrow = {i: parameters[i].data for i in some if parameters[i].dtype in _HALF}
            for i in some:
                if i in narrow:
                    self._widen(parameters[i], i)
                parameters[i].grad = gradients[i].to(parameters[i].dtype)
            self._optimizer.step()
            for i in some:
                parameters[i].grad = None
                if i in narrow:
                    self._narrow(parameters[i], i, narrow[i])
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
        return _AT_ONCE if device.type == "cpu" else _AT_ONCE_ON_A_GPU

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _widen(self, parameter: nn.Parameter, index: int) -> None:
        narrow = parameter.data
        parameter.data = self._rounding.widen(index, narrow)
        for key, value in self._state_of(parameter):
            if value.dtype == narrow.dtype:
                self._optimizer.state[parameter][key] = value.float()

    def _narrow(self, parameter: nn.Parameter, index: int, narrow: Tensor) -> None:
        bits = self._rounding.bits(narrow)
        self._rounding.keep(index, narrow, parameter.data, bits)
        if self._rounding.narrow_state and narrow.dtype == torch.bfloat16:
            for key, value in self._state_of(parameter):
                if value.dtype == torch.float32:
                    out = torch.empty_like(value, dtype=narrow.dtype)
                    self._optimizer.state[parameter][key] = stochastic_round(value, bits, out)
        parameter.data = narrow

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
            for key, value in self._state_of(parameter):
                exact = of_optimizer["state"][i][key]
                self._optimizer.state[parameter][key] = exact.to(value.device, copy=True)


def _portions(
    parameters: list[nn.Parameter], indices: list[int], n_at_once: float
) -> list[list[int]]:
    """Indices in order, of at most so many numbers together or of one tensor; never no list."""
    portions: list[list[int]] = [[]]
    n = 0
    for index in indices:
        numel = parameters[index].numel()
        if portions[-1] and n + numel > n_at_once:
            portions.append([])
            n = 0
        portions[-1].append(index)
        n += numel
    return portions
