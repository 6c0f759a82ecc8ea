"""What a column of a data set holds: its dtype, and the shape of a sample's value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaledtrain.errors import ConfigError

__all__ = ["DTYPES", "OFFSETS", "Column", "as_array", "as_column", "check_columns", "wrong_shape"]

OFFSETS = ".offsets"  # the tensor beside a ragged column's values

Array = np.ndarray[Any, Any]


class DType(NamedTuple):
    """One kind of number, as safetensors, NumPy and torch call it."""

    code: str
    stored: np.dtype[Any]
    torch: torch.dtype


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "float64": DType("F64", np.dtype("<f8"), torch.float64),
        "float32": DType("F32", np.dtype("<f4"), torch.float32),
        "float16": DType("F16", np.dtype("<f2"), torch.float16),
        "bfloat16": DType("BF16", np.dtype("<u2"), torch.bfloat16),  # NumPy has none: its bits
        "int64": DType("I64", np.dtype("<i8"), torch.int64),
        "int32": DType("I32", np.dtype("<i4"), torch.int32),
        "int16": DType("I16", np.dtype("<i2"), torch.int16),
        "int8": DType("I8", np.dtype("i1"), torch.int8),
        "uint64": DType("U64", np.dtype("<u8"), torch.uint64),
        "uint32": DType("U32", np.dtype("<u4"), torch.uint32),
        "uint16": DType("U16", np.dtype("<u2"), torch.uint16),
        "uint8": DType("U8", np.dtype("u1"), torch.uint8),
        "bool": DType("BOOL", np.dtype("?"), torch.bool),
    }
)


@dataclass(frozen=True)
class Column:
    """One column of a data set.

    Args:
        dtype: ``"float32"``, ``"bfloat16"``, ``"uint8"``, ... (see `DTYPES`).
        shape: of a sample's value; of a ragged column, that of one of its elements: tokens have
            ``()``, the points of a cloud ``(3,)``.
        ragged: a sample's value is ``[length, *shape]``, and every sample has its own length.

    Raises:
        ConfigError: no such dtype, or a dimension that is not >= 1.

    Example:
        >>> Column("uint16", ragged=True).tensors("tokens")
        {'tokens': 'U16', 'tokens.offsets': 'I64'}
    """

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it is one of {', '.join(DTYPES)}")
        for dim in self.shape:
            if type(dim) is not int or dim < 1:
                raise ConfigError(
                    f"shape is {self.shape}, which has a dimension {dim!r}; each is a whole number "
                    ">= 1 (where samples differ in length, make the column ragged and leave the "
                    "length out of its shape)"
                )
        if self.nbytes >= 2**62:
            raise ConfigError(f"shape is {self.shape}: no sample has that many elements")
        if type(self.ragged) is not bool:
            raise ConfigError(f"ragged is {self.ragged!r}; it is true or false")

    @property
    def stored(self) -> np.dtype[Any]:
        """The NumPy dtype of what is in the file."""
        return DTYPES[self.dtype].stored

    @property
    def nbytes(self) -> int:
        """Bytes of a sample's value; of a ragged column, of one of its elements."""
        return math.prod(self.shape) * self.stored.itemsize

    def tensors(self, name: str) -> dict[str, str]:
        """The tensors that hold a column of that name in a shard, and their safetensors dtypes."""
        codes = {name: DTYPES[self.dtype].code}
        return {**codes, name + OFFSETS: "I64"} if self.ragged else codes

    def rounded(self, number: float) -> float:
        """With what its values are to be compared: where they are bfloat16, -9984 for -9999.

        NumPy does so for the floats that it has.
        """
        if self.dtype != "bfloat16":
            return number
        return torch.tensor(number, dtype=torch.bfloat16).item()

    def to_torch(self, stored: Array) -> Tensor:
        """A tensor of the same memory as an array of this column's stored dtype."""
        tensor = torch.from_numpy(stored)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor


def check_columns(columns: Mapping[str, Column]) -> None:
    """Raise ConfigError if these names cannot be the columns of one data set."""
    for name in columns:
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise ConfigError(f"a column is called {name!r}; give it a name that is a word")
        owner = name.removesuffix(OFFSETS)
        if owner != name and owner in columns:
            raise ConfigError(
                f"columns {owner!r} and {name!r} would share the name of a tensor in the files; "
                f"rename {name!r}"
            )


def as_array(value: Any) -> tuple[Array, str]:
    """The value as an array in C order of a stored dtype, and the name of its dtype.

    Args:
        value: a tensor, an array, bytes (uint8), a number, or nested lists of numbers.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            return value.contiguous().view(torch.uint16).numpy(), "bfloat16"
        try:
            value = value.numpy()
        except TypeError as error:  # sparse, or of 8 bits
            raise ConfigError(f"a value is no array: {error}") from error
    elif isinstance(value, (bytes, bytearray, memoryview)):
        return np.frombuffer(value, np.uint8), "uint8"
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ConfigError(f"a value is no array: {error}") from error
    name = array.dtype.name
    if name not in DTYPES or name == "bfloat16":
        raise ConfigError(
            f"a value is {type(value).__name__} (of {array.dtype}), which has no dtype of a tensor "
            f"({', '.join(DTYPES)}); turn it into numbers first: text.encode() is bytes, and bytes "
            "are uint8"
        )
    return np.asarray(array, DTYPES[name].stored, order="C"), name


def as_column(array: Array, dtype: str, name: str, column: Column, given: Any) -> Array:
    """The array, of the dtype and the trailing shape that a column has.

    Args:
        array: one value of a column, or many of them, as `as_array` made it.
        dtype: the name that `as_array` told.
        name: the column's, for messages.
        column: what it has to be.
        given: what the array was made of: numbers of Python's take the column's dtype.

    Raises:
        ConfigError: it is of another shape, or does not go into the dtype without loss.
    """
    dims = len(column.shape)
    if array.ndim < dims or array.shape[array.ndim - dims :] != column.shape:
        raise wrong_shape(name, column, array)
    if dtype == column.dtype:
        return array
    if not array.size:  # an empty list has no dtype of its own
        return array.astype(column.stored)
    bits = "bfloat16" in (dtype, column.dtype)
    if not bits and np.can_cast(array.dtype, column.stored, "safe"):
        return array.astype(column.stored)
    if not bits and isinstance(given, (bool, int, float, Sequence)):
        cast = array.astype(column.stored)
        exact = cast == array if array.dtype.kind in "biu" else column.stored.kind == "f"
        if np.all(exact):
            return cast
    raise ConfigError(
        f"column {name!r} is {column.dtype}, but got a value of {dtype}, which does not go into it "
        f"without loss; convert it first, or declare the column: columns={{{name!r}: "
        f"Column({dtype!r}, ...)}}"
    )


def wrong_shape(name: str, column: Column, array: Array) -> ConfigError:
    """The error for a value that does not have a column's dims."""
    dims = [*(["length"] if column.ragged else []), *map(str, column.shape)]
    return ConfigError(
        f"column {name!r} got a value of shape {list(array.shape)}, but its values are "
        f"[{', '.join(dims)}]; reshape it, or, where samples differ in length, give "
        f"columns={{{name!r}: Column({column.dtype!r}, ragged=True)}}"
    )
