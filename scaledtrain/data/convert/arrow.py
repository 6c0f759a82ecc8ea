"""Apache Arrow's tables as batches: CSV, Parquet and Hugging Face data sets come as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaledtrain.data.convert.source import Batch
from scaledtrain.data.sharded import Column
from scaledtrain.data.sharded.columns import DTYPES, Array
from scaledtrain.errors import ConfigError

__all__ = ["Categories", "arrow_batch", "arrow_columns", "require_pyarrow"]

Categories = Mapping[str, Sequence[str]]


def require_pyarrow(what: str) -> Any:
    """The package ``pyarrow``.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        import pyarrow
        import pyarrow.compute  # noqa: F401 - a part that pyarrow does not load by itself
    except ImportError as error:
        raise ConfigError(
            f"{what} is read with pyarrow, which cannot be imported here: "
            "pip install 'scaledtrain[data]'"
        ) from error
    return pyarrow


def arrow_columns(schema: Any, categories: Categories, where: str) -> dict[str, Column]:
    """What the fields of a schema are stored as.

    Raises:
        ConfigError: a field holds something that is no tensor, or there is no such category.
    """
    if unknown := categories.keys() - set(schema.names):
        raise ConfigError(
            f"categories are given for {', '.join(sorted(unknown))}, but {where} has the columns "
            f"{', '.join(schema.names)}"
        )
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise ConfigError(f"column {name!r} of {where} is there twice; rename one of them")
    return {
        field.name: Column("int64")
        if field.name in categories
        else _column(field.name, field.type, where)
        for field in schema
    }


def arrow_batch(table: Any, categories: Categories, where: str) -> Batch:
    """The rows of a table or record batch.

    Args:
        table: ``pyarrow.Table`` or ``RecordBatch``.
        categories: column -> its values' names; a value becomes its number.
        where: what messages call the place where the rows come from.

    Raises:
        ConfigError: a value is missing that has to be there, or is of no category.
    """
    batch: dict[str, Any] = {}
    for name in table.schema.names:
        column = table.column(name)
        chunks = getattr(column, "chunks", [column])
        parts = [
            _numbered(chunk, categories[name], name, where)
            if name in categories
            else _values(chunk, name, where)
            for chunk in chunks
        ]
        if parts and isinstance(parts[0], list):
            batch[name] = [value for part in parts for value in part]
        else:
            batch[name] = np.concatenate(parts) if len(parts) != 1 else parts[0]
    return batch


def _column(name: str, kind: Any, where: str) -> Column:
    pa = require_pyarrow(where)
    kind = _plain(kind)
    if _is_text(kind) or _encoded(kind):
        return Column("uint8", ragged=True)
    if (dtype := _dtype(kind)) is not None:
        return Column(dtype)
    if isinstance(kind, pa.BaseExtensionType) and (shape := _array_shape(kind)):
        return Column(kind.value_type, shape)
    if pa.types.is_fixed_size_list(kind) and (dtype := _dtype(kind.value_type)) is not None:
        return Column(dtype, (kind.list_size,))
    if _is_list(kind) and (dtype := _dtype(kind.value_type)) is not None:
        return Column(dtype, ragged=True)
    if pa.types.is_null(kind):
        raise ConfigError(
            f"column {name!r} of {where} has no values where they begin, and so no dtype; declare "
            "one (of a CSV file: dtypes={column: dtype}), or read the others alone: columns=[...]"
        )
    raise ConfigError(
        f"column {name!r} of {where} is {kind}, which is no tensor; turn it into numbers, lists of "
        "numbers, text or bytes first, or read the others alone: columns=[...]"
    )


def _values(array: Any, name: str, where: str) -> Array | list[bytes] | list[Array]:
    """The values of one column, as `_column` said."""
    pa = require_pyarrow(where)
    kind = _plain(array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _encoded(kind):  # an image or a sound, and the name of its file
        _no_nulls(array, name, where)
        array = array.field("bytes")
        kind = array.type
    if not pa.types.is_floating(kind):
        _no_nulls(array, name, where)
    if _is_text(kind):
        binary = pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
        texts: list[bytes] = array.cast(binary).to_pylist()
        return texts
    if isinstance(kind, pa.BaseExtensionType):
        shape = _array_shape(kind)
        nested = array.storage
        for _ in shape:
            nested = nested.flatten()
        _no_nulls(nested, name, where)
        return _numbers(nested).reshape(len(array), *shape)
    if pa.types.is_fixed_size_list(kind) or _is_list(kind):
        inside = array.flatten()
        if not pa.types.is_floating(inside.type):
            _no_nulls(inside, name, where)
        numbers = _numbers(inside)
        if pa.types.is_fixed_size_list(kind):
            return numbers.reshape(len(array), kind.list_size)
        lengths = _numbers(pa.compute.list_value_length(array))
        return np.split(numbers, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return _numbers(array)


def _numbers(array: Any) -> Array:
    numbers: Array = array.to_numpy(zero_copy_only=False)  # a missing float is NaN
    return numbers


def _numbered(array: Any, names: Sequence[str], column: str, where: str) -> Array:
    """The number of each value among these names."""
    pa = require_pyarrow(where)
    _no_nulls(array, column, where)
    found = pa.compute.index_in(array.cast(pa.string()), pa.array(list(names), pa.string()))
    if found.null_count:
        unknown = array.filter(pa.compute.is_null(found))[0]
        raise ConfigError(
            f"column {column!r} of {where} has {unknown.as_py()!r}, which is none of its "
            f"categories {', '.join(names)}"
        )
    return _numbers(found).astype(np.int64)


def _no_nulls(array: Any, name: str, where: str) -> None:
    if array.null_count:
        raise ConfigError(
            f"column {name!r} of {where} lacks {array.null_count} of {len(array)} values, and "
            f"{array.type} has none that says so; fill them in, declare the column as float64, "
            "where a missing value is NaN, or read the others alone: columns=[...]"
        )


def _plain(kind: Any) -> Any:
    """A dictionary's values have the type of its words."""
    pa = require_pyarrow("a table")
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _dtype(kind: Any) -> str | None:
    pa = require_pyarrow("a table")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return None
    name = np.dtype(kind.to_pandas_dtype()).name
    return name if name in DTYPES else None


def _is_text(kind: Any) -> bool:
    types = require_pyarrow("a table").types
    return any(
        check(kind)
        for check in (
            types.is_string,
            types.is_large_string,
            types.is_binary,
            types.is_large_binary,
        )
    )


def _is_list(kind: Any) -> bool:
    types = require_pyarrow("a table").types
    return bool(types.is_list(kind) or types.is_large_list(kind))


def _encoded(kind: Any) -> bool:
    """Whether it is what Hugging Face keeps images and sounds as."""
    pa = require_pyarrow("a table")
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _array_shape(kind: Any) -> tuple[int, ...]:
    """The shape of Hugging Face's Array2D to Array5D; () where a dim is not fixed."""
    shape = getattr(kind, "shape", ())
    return tuple(shape) if all(isinstance(dim, int) for dim in shape) else ()
