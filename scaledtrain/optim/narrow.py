"""How parameters that have only 16 bits take the updates of an optimizer that works in 32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scaledtrain.optim.rounding import random_bits
from scaledtrain.optim.together import flat, round_all, rounded_as_one, spread, widened

__all__ = [
    "KahanCompensation",
    "MasterWeights",
    "Narrow",
    "Rounding",
    "StochasticRounding",
]


class Narrow(NamedTuple):
    """Some parameters of 16 bits."""

    indices: Sequence[int]
    """Which of the optimizer's."""
    tensors: Sequence[Tensor]
    """Their values."""


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
    def widen(self, narrow: Narrow) -> list[Tensor]:
        """The values in float32, for the optimizer to change in place.

        Args:
            narrow: which somebody else may have written to since the last step.
        """

    @abstractmethod
    def keep(self, narrow: Narrow, wide: Sequence[Tensor], bits: Tensor) -> None:
        """Write values back.

        Args:
            narrow: to write to.
            wide: what ``widen`` returned, changed.
            bits: random, as many as the parameters have entries, or none.
        """

    def bits(self, like: Sequence[Tensor]) -> Tensor:
        """As many as the tensors have entries, on their device; none if no state is narrow."""
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

    def widen(self, narrow: Narrow) -> list[Tensor]:
        """As they are."""
        return widened(narrow.tensors)

    def keep(self, narrow: Narrow, wide: Sequence[Tensor], bits: Tensor) -> None:
        """Round at random."""
        round_all(wide, bits, narrow.tensors)


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

    def widen(self, narrow: Narrow) -> list[Tensor]:
        """Parameters and compensations."""
        wide = widened(narrow.tensors)
        for i, values in zip(narrow.indices, wide, strict=True):
            if i in self._compensation:
                values.add_(self._compensation[i])
        return wide

    def keep(self, narrow: Narrow, wide: Sequence[Tensor], bits: Tensor) -> None:
        """To the nearest, and what is left over."""
        for i, like in zip(*narrow, strict=True):
            if i not in self._compensation:
                self._compensation[i] = torch.empty_like(like)
        for some in rounded_as_one(wide):
            values = flat([wide[place] for place in some])
            nearest = values.to(narrow.tensors[0].dtype)
            # Of an overflow the rest would be no number.
            rest = values.sub_(nearest.float()).masked_fill_(~nearest.isfinite(), 0.0)
            spread(nearest, [narrow.tensors[place] for place in some])
            spread(rest, [self._compensation[narrow.indices[place]] for place in some])

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

    def widen(self, narrow: Narrow) -> list[Tensor]:
        """The copies, with what was changed from outside."""
        for i, values in zip(*narrow, strict=True):
            master = self._masters.get(i)
            if master is None:
                self._masters[i] = values.float()
            else:
                torch.where(master.to(values.dtype) == values, master, values.float(), out=master)
        return [self._masters[i] for i in narrow.indices]

    def keep(self, narrow: Narrow, wide: Sequence[Tensor], bits: Tensor) -> None:
        """To the nearest."""
        torch._foreach_copy_(list(narrow.tensors), list(wide))

    def state_dict(self) -> dict[str, Any]:
        """The copies."""
        masters = {index: master.clone() for index, master in self._masters.items()}
        return {**super().state_dict(), "masters": masters}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state, device)
        masters = state["masters"].items()
        self._masters = {index: master.to(device, copy=True) for index, master in masters}
