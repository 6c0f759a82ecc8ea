"""CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, final

import numpy as np

from scaledtrain.data.convert.arrow import (
    Categories,
    arrow_batch,
    arrow_columns,
    require_pyarrow,
)
from scaledtrain.data.convert.source import (
    PART_BYTES,
    Batch,
    Paths,
    Source,
    find_files,
    names_and_sizes,
)
from scaledtrain.errors import ConfigError, DataError

__all__ = ["Csv", "Parquet"]

MOST_ROWS = 8_192  # that are read at once


@final
class Csv(Source):
    r"""CSV files with a line of names; a column of the file is a column of the data set.

    Dtypes follow from the first megabytes of the first file: int64, float64, bool. Text is kept as
    its UTF-8 bytes (ragged uint8), unless its values are given as ``categories``. A missing number
    is NaN where the column is a float, and an error elsewhere. A file is a part: several workers
    read several files.

    Args:
        paths: files (also ``.csv.gz``), and folders of them.
        columns: which to read, in this order; None: all.
        dtypes: column -> dtype, where what follows from the values is not wanted; ``"string"``
            keeps the text of a date, say.
        categories: column -> its values; a value becomes its number, int64.
        delimiter: between values.
        pattern: which files of a folder are meant.

    Raises:
        ConfigError: there is no such file or column, a value does not go into its column's dtype,
            or pyarrow is not installed.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> (Path(folder.name) / "iris.csv").write_text("length,kind\n5.1,setosa\n6.3,other\n")
        33
        >>> source = Csv(folder.name, categories={"kind": ["setosa", "other"]})
        >>> next(source.read(0))
        {'length': array([5.1, 6.3]), 'kind': array([0, 1])}
        >>> folder.cleanup()
    """

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        dtypes: Mapping[str, str] | None = None,
        categories: Categories | None = None,
        delimiter: str = ",",
        pattern: str = "*.csv",
    ) -> None:
        pa = require_pyarrow("a CSV file")
        self._files = find_files(paths, pattern)
        if len(delimiter) != 1:
            raise ConfigError(f"delimiter is {delimiter!r}; it is one character")
        self._delimiter = delimiter
        self._wanted = list(columns or [])
        self.classes = dict(categories or {})
        self._types = {name: _arrow_type(name, dtype) for name, dtype in (dtypes or {}).items()}
        self._types |= {name: pa.string() for name in self.classes}
        with closing(self._open(self._files[0])) as reader:
            schema = reader.schema
        if unknown := self._types.keys() - set(schema.names):
            raise ConfigError(
                f"there is no column {', '.join(sorted(unknown))} in {self._files[0]}, only "
                f"{', '.join(schema.names)}"
            )
        self.columns = arrow_columns(schema, self.classes, str(self._files[0]))
        self._wanted = schema.names
        self._types = dict(zip(schema.names, schema.types, strict=True))
        self.parts = len(self._files)
        options = (self.columns, self.classes, delimiter)
        self.identity = f"csv {options} {names_and_sizes(self._files)}"

    def read(self, part: int) -> Iterator[Batch]:
        """The rows of a file, some megabytes at a time."""
        file = self._files[part]
        pa = require_pyarrow("a CSV file")
        with closing(self._open(file)) as reader:
            while True:
                try:
                    rows = reader.read_next_batch()
                except StopIteration:
                    return
                except (pa.ArrowInvalid, OSError) as error:
                    raise _unreadable(file, error) from error
                if rows.num_rows:
                    yield arrow_batch(rows, self.classes, str(file))

    def _open(self, file: Path) -> Any:
        pa = require_pyarrow("a CSV file")
        from pyarrow import csv

        try:
            return csv.open_csv(
                file,
                csv.ReadOptions(block_size=PART_BYTES),
                csv.ParseOptions(delimiter=self._delimiter),
                csv.ConvertOptions(include_columns=self._wanted, column_types=self._types),
            )
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{file} cannot be read as CSV: {error}. The dtype of a column follows from the first "
        "megabytes: give another one as dtypes={column: dtype}"
    )


def _arrow_type(name: str, dtype: str) -> Any:
    pa = require_pyarrow("a CSV file")
    try:
        return pa.string() if dtype == "string" else pa.from_numpy_dtype(np.dtype(dtype))
    except (TypeError, pa.ArrowNotImplementedError) as error:
        raise ConfigError(
            f"column {name!r} is to be {dtype!r}, which is no dtype of a CSV file's column; it is "
            "as in NumPy (float32, uint8, ...) or 'string'"
        ) from error


@final
class Parquet(Source):
    """Parquet files; a column of the file is a column of the data set.

    Numbers keep their dtype. Text and bytes are ragged uint8, unless the values of a text are given
    as ``categories``; lists of numbers are ragged, or, of a fixed size, have that shape. A missing
    number is NaN where the column is a float, and an error elsewhere. A row group is a part.

    Args:
        paths: files, and folders of them.
        columns: which to read; None: all.
        categories: column -> its values; a value becomes its number, int64.
        pattern: which files of a folder are meant.

    Raises:
        ConfigError: there is no such file or column, a column holds no tensors (dates, structs),
            the files have different columns, or pyarrow is not installed.
        DataError: a file is damaged.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        categories: Categories | None = None,
        pattern: str = "*.parquet",
    ) -> None:
        pa = require_pyarrow("a Parquet file")
        self._files = find_files(paths, pattern)
        self._wanted = None if columns is None else list(columns)
        self.classes = dict(categories or {})
        self._parts: list[tuple[Path, int]] = []
        for file in self._files:
            with self._open(file) as opened:
                schema = opened.schema_arrow
                groups = opened.metadata.num_row_groups
            for name in self._wanted or ():
                if name not in schema.names:
                    raise ConfigError(
                        f"there is no column {name!r} in {file}, only {', '.join(schema.names)}"
                    )
            if self._wanted is not None:
                schema = pa.schema([schema.field(name) for name in self._wanted])
            found = arrow_columns(schema, self.classes, str(file))
            if self.columns and found != self.columns:
                raise ConfigError(
                    f"{file} has the columns {found}, but {self._files[0]} has {self.columns}; "
                    "write them as two data sets, or read the columns that they share"
                )
            self.columns = found
            self._parts += [(file, group) for group in range(groups)]
        self.parts = len(self._parts)
        self.identity = f"parquet {self.columns} {self.classes} {names_and_sizes(self._files)}"

    def read(self, part: int) -> Iterator[Batch]:
        """The rows of a row group, some thousands at a time."""
        file, group = self._parts[part]
        pa = require_pyarrow("a Parquet file")
        with self._open(file) as opened:
            told = opened.metadata.row_group(group)
            some = PART_BYTES * told.num_rows // max(1, told.total_byte_size)
            rows = opened.iter_batches(
                min(max(some, 1), MOST_ROWS),
                row_groups=[group],
                columns=list(self.columns),
                use_threads=False,
            )
            while True:
                try:
                    batch = next(rows, None)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"row group {group} of {file} is damaged: {error}") from error
                if batch is None:
                    return
                where = f"{file}, row group {group}"
                yield arrow_batch(batch.select(list(self.columns)), self.classes, where)

    def _open(self, file: Path) -> Any:
        pa = require_pyarrow("a Parquet file")
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from error
