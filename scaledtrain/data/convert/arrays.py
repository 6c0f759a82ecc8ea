"""Arrays in memory, and NumPy's files of them, which are mapped and never loaded whole."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, final

import numpy as np
from numpy.lib import format as npy

from scaledtrain.data.convert.source import Batch, Source, Spans, names_and_sizes
from scaledtrain.data.sharded import Column
from scaledtrain.data.sharded.columns import Array, as_array
from scaledtrain.errors import ConfigError, DataError

__all__ = ["Arrays"]

LOCAL_HEADER_BYTES = 30  # of a member of a zip archive, before its name (APPNOTE.TXT, 4.3.7)


@final
class Arrays(Source):
    """One array for each column; row i of each is sample i.

    Args:
        arrays: column -> an array or tensor ``[n, *shape]``, or the path of a ``.npy`` file; or the
            path of a ``.npz`` file, whose arrays are the columns. It must not be compressed
            (``np.savez``): only then can it be mapped.

    Raises:
        ConfigError: there is no such file, an array is of objects or text, or they have different
            lengths.
        DataError: a file is damaged.

    Example:
        >>> source = Arrays({"x": np.zeros((10, 3), np.float32), "y": np.arange(10)})
        >>> source.columns
        {'x': Column(dtype='float32', shape=(3,), ragged=False), 'y': Column(dtype='int64', ...)}
    """

    def __init__(self, arrays: Mapping[str, Any] | str | Path) -> None:
        if isinstance(arrays, (str, Path)):
            self._arrays = _map_npz(Path(arrays))
            files = [Path(arrays)]
        else:
            self._arrays = {
                name: _map_npy(Path(value)) if isinstance(value, (str, Path)) else value
                for name, value in arrays.items()
            }
            files = [Path(value) for value in arrays.values() if isinstance(value, (str, Path))]
        if not self._arrays:
            raise ConfigError("there is no array to write; give at least one")
        lengths = {name: _length(name, array) for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"the arrays have different lengths: {lengths}; row i is sample i")
        self.columns = {name: _column(name, array) for name, array in self._arrays.items()}
        nbytes = sum(column.nbytes for column in self.columns.values())
        self._spans = Spans.of_bytes(next(iter(lengths.values())), nbytes)
        self.parts = self._spans.parts
        self.identity = f"arrays {self.columns} {self._spans.samples} {names_and_sizes(files)}"

    def read(self, part: int) -> Iterator[Batch]:
        """Some rows of each array."""
        span = self._spans.span(part)
        yield {name: _rows(array, span) for name, array in self._arrays.items()}


def _rows(array: Any, span: range) -> Any:
    rows = array[span.start : span.stop]
    return np.asarray(rows) if isinstance(rows, np.ndarray) else rows  # no longer a memmap


def _length(name: str, array: Any) -> int:
    if not getattr(array, "ndim", 0):
        raise ConfigError(f"{name!r} is no array of samples, but {type(array).__name__}: {array!r}")
    return len(array)


def _column(name: str, array: Any) -> Column:
    try:
        return Column(as_array(array[:0])[1], tuple(array.shape[1:]))
    except ConfigError as error:
        raise ConfigError(f"array {name!r}: {error}") from error


def _map_npy(path: Path) -> Array:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a .npy file: {error}") from error


def _map_npz(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            return {
                member.filename.removesuffix(".npy"): _map_member(path, file, member)
                for member in archive.infolist()
            }
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(f"{path} cannot be read as a .npz file: {error}") from error


def _map_member(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> Array:
    """Map an array of an archive in which it lies as it is."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ConfigError(
            f"{member.filename} in {path} is compressed, so that it cannot be mapped into memory; "
            "save it with np.savez, or each array as a .npy file"
        )
    file.seek(member.header_offset)
    local = file.read(LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    file.seek(member.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes)
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ConfigError(f"{member.filename} in {path} is a pickle of objects: never read")
    if not all(shape):
        return np.empty(shape, dtype)
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", file.tell(), shape, order)  # type: ignore[call-overload,no-any-return]
