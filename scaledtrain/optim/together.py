"""Many tensors widened or rounded together: on a GPU what takes time is to start a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaledtrain.optim.rounding import stochastic_round

__all__ = [
    "AT_ONCE_ON_A_GPU",
    "flat",
    "portions",
    "round_all",
    "rounded_as_one",
    "spread",
    "widened",
]

AT_ONCE_ON_A_GPU = 2**24  # numbers


def widened(narrow: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float32."""
    wide = [torch.empty_like(t, dtype=torch.float32) for t in narrow]
    torch._foreach_copy_(wide, list(narrow))
    return wide


def rounded_as_one(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of those that are rounded as one: on a CPU each by itself, which takes no memory."""
    on_cpu = tensors[0].device.type == "cpu"
    return portions(tensors, range(len(tensors)), 0 if on_cpu else AT_ONCE_ON_A_GPU)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other; one by itself as it is."""
    parts = [t.reshape(-1) for t in tensors]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def spread(together: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write what `flat` has put together."""
    parts = torch.split(together, [t.numel() for t in tensors])
    values = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(list(tensors), values)


def round_all(wide: Sequence[Tensor], bits: Tensor, out: Sequence[Tensor]) -> None:
    """`stochastic_round` of several tensors, with as many bits as they have entries together."""
    for some in rounded_as_one(wide):
        n = sum(wide[place].numel() for place in some)
        own, bits = bits[:n], bits[n:]
        if len(some) == 1:
            stochastic_round(wide[some[0]], own, out[some[0]])
        else:
            values = flat([wide[place] for place in some])
            rounded = torch.empty(n, dtype=torch.bfloat16, device=values.device)
            spread(stochastic_round(values, own, rounded), [out[place] for place in some])


def portions(
    parameters: Sequence[Tensor], indices: Sequence[int], n_at_once: float
) -> list[list[int]]:
    """Indices in order, of at most so many numbers together or of one tensor; at least one list."""
    found: list[list[int]] = [[]]
    n = 0
    for index in indices:
        numel = parameters[index].numel()
        if found[-1] and n + numel > n_at_once:
            found.append([])
            n = 0
        found[-1].append(index)
        n += numel
    return found
