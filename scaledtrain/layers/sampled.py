"""Some values of a large tensor, to draw how they are distributed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sampled"]

_GOLDEN = (5**0.5 - 1) / 2  # its multiples less their whole parts fill 0 to 1 evenly


def sampled(tensor: Tensor, most: int) -> Tensor:
    """A copy of so many values of a tensor at most, from all over it.

    There is one of each of as many stretches of equal length, each at another place in its stretch:
    with equal distances all would be of the same few units, where a row is as long as a stretch. No
    generator is used, and nobody waits for the device.

    Args:
        tensor: of any shape.
        most: values.

    Example:
        >>> sampled(torch.arange(20).reshape(5, 4), 5)  # of each row one
        tensor([ 0,  6,  8, 15, 17])
    """
    flat = tensor.detach().flatten()
    if len(flat) <= most:
        return flat.clone()
    stretch = torch.arange(most, dtype=torch.float64, device=flat.device)
    places = (stretch + (stretch * _GOLDEN).frac()) * (len(flat) / most)
    return flat[places.long()]
