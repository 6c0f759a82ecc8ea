"""Memory for batches: page-locked, or used again when nobody looks at it any more."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from scaledtrain.data.sharded.columns import DTYPES, Array, Column

__all__ = ["Memory"]

LEAST_BYTES = 2**20  # smaller pieces are used again by the allocator itself
MOST_FREE = 3  # pieces of each size that wait for their next use


class Memory:
    """Makes empty tensors.

    The system gives memory of many megabytes as new pages full of zeros, whose making takes about
    as long as filling them with data. So a piece is kept, and given anew when the last tensor that
    shares it is gone.

    Args:
        pin: page-locked memory (which torch keeps and gives anew by itself).

    Example:
        >>> memory = Memory()
        >>> tensor, _ = memory.empty(Column("float32"), 2**20)
        >>> place, view = tensor.data_ptr(), tensor[:10]
        >>> del tensor, _
        >>> memory.empty(Column("float32"), 2**20)[0].data_ptr() == place  # the view is there
        False
        >>> del view
        >>> memory.empty(Column("int64"), 2**19)[0].data_ptr() == place
        True
    """

    def __init__(self, pin: bool = False) -> None:
        self._pin = pin
        # By size. A deque's pop and append need no lock, which a finalizer could not wait for.
        self._free: dict[int, deque[Array]] = {}

    def empty(self, column: Column, *shape: int) -> tuple[Tensor, Array]:
        """A tensor of a column's dtype, and the same memory as an array of its stored dtype."""
        dtype = DTYPES[column.dtype]
        if self._pin:
            tensor = torch.empty(shape, dtype=dtype.torch, pin_memory=True)
            bits = tensor.view(torch.uint16) if column.dtype == "bfloat16" else tensor
            return tensor, bits.numpy()
        n_bytes = math.prod(shape) * dtype.stored.itemsize
        if n_bytes < LEAST_BYTES:
            array = np.empty(shape, dtype.stored)
            return column.to_torch(array), array
        size = 1 << (n_bytes - 1).bit_length()
        free = self._free.setdefault(size, deque(maxlen=MOST_FREE))
        try:
            piece = free.pop()
        except IndexError:
            piece = np.empty(size, np.uint8)
        array = piece[:n_bytes].view(dtype.stored).reshape(shape)
        # The tensor, and whatever shares its memory, holds this object.
        weakref.finalize(array, free.append, piece).atexit = False
        return column.to_torch(array), array
