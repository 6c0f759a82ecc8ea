"""Which bytes of an array a crop of it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.errors import ConfigError

__all__ = ["Slice", "crop_ranges", "normalise"]

Slice = int | slice


def normalise(slices: Slice | Sequence[Slice], shape: Sequence[int]) -> tuple[Slice, ...]:
    """One slice or index for every dim of an array.

    Raises:
        ConfigError: more of them than dims, or something else.
        IndexError: an index outside the array.
    """
    given = (slices,) if isinstance(slices, (int, slice)) else tuple(slices)
    if len(given) > len(shape) or not all(isinstance(part, (int, slice)) for part in given):
        raise ConfigError(
            f"slices are {given}, but the value has shape {list(shape)}; give a slice or an index "
            "for each of the first dims"
        )
    for part, size in zip(given, shape, strict=False):
        if isinstance(part, int) and not -size <= part < size:
            raise IndexError(f"index {part} of a dim of size {size}")
    return (*given, *(slice(None) for _ in shape[len(given) :]))


def crop_ranges(
    slices: Sequence[Slice], shape: Sequence[int], item_bytes: int
) -> tuple[Array, Array]:
    """The contiguous ranges of bytes that a crop of an array in C order consists of.

    Args:
        slices: one for each dim.
        shape: of the whole array.
        item_bytes: of one element.

    Returns:
        Starts and stops, int64 ``[ranges]``. With steps other than 1 in the last dim, what lies
        between the elements is within.

    Example:
        >>> crop_ranges([slice(1, 3), slice(0, 2)], [4, 5], 1)  # two of five, in rows 1 and 2
        (array([ 5, 10]), array([ 7, 12]))
    """
    picked = [
        range(size)[part : part + 1 or None] if isinstance(part, int) else range(size)[part]
        for part, size in zip(slices, shape, strict=True)
    ]
    strides = [math.prod(shape[dim + 1 :]) * item_bytes for dim in range(len(shape))]
    last = len(shape) - 1  # behind this dim the crop has everything
    while last > 0 and len(picked[last]) == shape[last]:
        last -= 1
    starts = np.zeros(1, np.int64)
    for indices, stride in zip(picked[:last], strides, strict=False):
        starts = np.add.outer(starts, np.array(indices, np.int64) * stride).reshape(-1)
    if not shape:
        return starts, starts + item_bytes
    if not picked[last]:
        return starts[:0], starts[:0]
    low, high = min(picked[last]), max(picked[last]) + 1
    return starts + low * strides[last], starts + high * strides[last]
