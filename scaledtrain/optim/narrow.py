"""Updates of parameters that have only 16 bits, by any optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
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
    """How parameters of 16 bits hold values that the optimizer sees in float32.

    It is asked for some parameters at a time, which on a GPU it rounds as one, since what takes
    time there is to start a kernel.

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
    def widen(self, indices: Sequence[int], narrow: Sequence[Tensor]) -> list[Tensor]:
        """The values in float32, for the optimizer to change in place.

        Args:
            indices: of the parameters.
            narrow: their 16 bits, which somebody else may have written to since the last step.
        """

    @abstractmethod
    def keep(
        self,
        indices: Sequence[int],
        narrow: Sequence[Tensor],
        wide: Sequence[Tensor],
        bits: Tensor,
    ) -> None:
        """Write values back.

        Args:
            indices: of the parameters.
            narrow: their 16 bits, to write to.
            wide: what ``widen`` returned, changed.
            bits: random, as many as the parameters have entries.
        """

    def bits(self, like: Sequence[Tensor]) -> Tensor:
        """As many as the tensors have entries, on their device; none if nothing needs them."""
        if not self.narrow_state:
            return torch.empty(0, dtype=torch.int16)
        if self._generator is None:
            self._generator = torch.Generator(like[0].device).manual_seed(self._seed)
        return random_bits(sum(t.numel() for t in like), self._generator)

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

    def widen(self, indices: Sequence[int], narrow: Sequence[Tensor]) -> list[Tensor]:
        """As they are."""
        return _wide(narrow)

    def keep(
        self,
        indices: Sequence[int],
        narrow: Sequence[Tensor],
        wide: Sequence[Tensor],
        bits: Tensor,
    ) -> None:
        """Round at random."""
        _round_all(wide, bits, narrow)


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

    def widen(self, indices: Sequence[int], narrow: Sequence[Tensor]) -> list[Tensor]:
        """Parameters and compensations."""
        wide = _wide(narrow)
        for i, values in zip(indices, wide, strict=True):
            if i in self._compensation:
                values.add_(self._compensation[i])
        return wide

    def keep(
        self,
        indices: Sequence[int],
        narrow: Sequence[Tensor],
        wide: Sequence[Tensor],
        bits: Tensor,
    ) -> None:
        """To the nearest, and what is left over."""
        for i, like in zip(indices, narrow, strict=True):
            if i not in self._compensation:
                self._compensation[i] = torch.empty_like(like)
        for some in _as_one(wide):
            values = _flat([wide[place] for place in some])
            nearest = values.to(narrow[0].dtype)
            # Of an overflow the rest would be no number.
            rest = values.sub_(nearest.float()).masked_fill_(~nearest.isfinite(), 0.0)
            _spread(nearest, [narrow[place] for place in some])
            _spread(rest, [self._compensation[indices[place]] for place in some])

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

    def widen(self, indices: Sequence[int], narrow: Sequence[Tensor]) -> list[Tensor]:
        """The copies, with what was changed from outside."""
        for i, values in zip(indices, narrow, strict=True):
            master = self._masters.get(i)
            if master is None:
                self._masters[i] = values.float()
            else:
                torch.where(master.to(values.dtype) == values, master, values.float(), out=master)
        return [self._masters[i] for i in indices]

    def keep(
        self,
        indices: Sequence[int],
        narrow: Sequence[Tensor],
        wide: Sequence[Tensor],
        bits: Tensor,
    ) -> None:
        """To the nearest."""
        torch._foreach_copy_(list(narrow), list(wide))

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
        return _AT_ONCE if device.type == "cpu" else _AT_ONCE_ON_A_GPU

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _widen(self, parameters: Sequence[nn.Parameter], narrow: Mapping[int, Tensor]) -> None:
        values = self._rounding.widen(list(narrow), list(narrow.values()))
        for i, wide in zip(narrow, values, strict=True):
            dtype, parameters[i].data = parameters[i].dtype, wide
            state = {k: v for k, v in self._state_of(parameters[i]) if v.dtype == dtype}
            if state:
                widened = _wide(list(state.values()))
                self._optimizer.state[parameters[i]].update(zip(state, widened, strict=True))

    def _narrow(self, parameters: Sequence[nn.Parameter], narrow: Mapping[int, Tensor]) -> None:
        bits = self._rounding.bits(list(narrow.values()))
        wide = [parameters[i].data for i in narrow]
        self._rounding.keep(list(narrow), list(narrow.values()), wide, bits)
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
            _round_all(wide, some, out)
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


def _wide(narrow: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float32."""
    wide = [torch.empty_like(t, dtype=torch.float32) for t in narrow]
    torch._foreach_copy_(wide, list(narrow))
    return wide


def _as_one(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of those that are rounded as one: on a CPU each by itself, which takes no memory."""
    on_cpu = tensors[0].device.type == "cpu"
    return _portions(tensors, range(len(tensors)), 0 if on_cpu else _AT_ONCE_ON_A_GPU)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other; one by itself as it is."""
    parts = [t.reshape(-1) for t in tensors]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write what `_flat` has put together."""
    parts = torch.split(flat, [t.numel() for t in tensors])
    values = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(list(tensors), values)


def _round_all(wide: Sequence[Tensor], bits: Tensor, out: Sequence[Tensor]) -> None:
    """`stochastic_round` of several tensors, with as many bits as they have entries together."""
    for some in _as_one(wide):
        n = sum(wide[place].numel() for place in some)
        own, bits = bits[:n], bits[n:]
        if len(some) == 1:
            stochastic_round(wide[some[0]], own, out[some[0]])
        else:
            values = _flat([wide[place] for place in some])
            flat = torch.empty(n, dtype=torch.bfloat16, device=values.device)
            _spread(stochastic_round(values, own, flat), [out[place] for place in some])


def _portions(
    parameters: Sequence[Tensor], indices: Sequence[int], n_at_once: float
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
