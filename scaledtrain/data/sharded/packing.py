"""Arrays in JSON, every bit of them: short ones as a list, long ones as base64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.errors import ConfigError

__all__ = ["pack", "unpack"]

LONGEST_LIST = 256


def pack(array: Array) -> Any:
    """A flat list of numbers, NaN as null; or the bytes, little-endian, in base64.

    Args:
        array: int64 or float64, of any shape, which the JSON does not say.

    Example:
        >>> pack(np.array([0.5, np.nan]))
        [0.5, None]
        >>> pack(np.zeros(1_000))["base64"][:8]
        'AAAAAAAA'
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size > LONGEST_LIST or np.isinf(flat).any():
        flat = flat.astype(flat.dtype.newbyteorder("<"))
        return {"dtype": flat.dtype.name, "base64": base64.b64encode(flat.tobytes()).decode()}
    return [None if number != number else number for number in flat.tolist()]


def unpack(told: Any, dtype: type[np.generic], size: int | None = None) -> Array:
    """The array, flat.

    Args:
        told: what ``pack`` made.
        dtype: that it has.
        size: how many numbers it has; None: any.

    Raises:
        ConfigError, ValueError, TypeError, KeyError: it is anything else.
    """
    if isinstance(told, list):
        numbers = [float("nan") if number is None else number for number in told]
        kinds = (int,) if np.issubdtype(dtype, np.integer) else (int, float)
        if any(type(number) not in kinds for number in numbers):
            raise ConfigError(f"{told!r} holds something else than numbers of {dtype.__name__}")
        try:
            found = np.array(numbers, dtype)
        except OverflowError as error:
            raise ConfigError(f"{told!r} holds a number beyond 64 bits") from error
    else:
        if told["dtype"] != np.dtype(dtype).name:
            raise ConfigError(f"numbers are {told['dtype']!r} instead of {np.dtype(dtype).name}")
        content = base64.b64decode(told["base64"], validate=True)
        found = np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    if size is not None and found.size != size:
        raise ConfigError(f"{found.size} numbers are where {size} should be")
    return found
