"""MDS: the shards of MosaicML Streaming.

A folder has an ``index.json``, which says of each shard its file, its samples, and its columns with
their encodings. A shard is uint32 ``n``, uint32 ``[n + 1]`` offsets from the beginning of the file,
a header that repeats the index, and the samples; a sample is the uint32 size of each column whose
encoding has none, and then the columns' bytes. Everything is little-endian.
(docs.mosaicml.com/projects/streaming, "Dataset Format"; version 2.)
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import xxhash

from scaledtrain.data.convert.images import ImageDecoder
from scaledtrain.data.convert.source import Batch, Source
from scaledtrain.data.convert.torch_dataset import collate
from scaledtrain.data.sharded.columns import Array
from scaledtrain.errors import ConfigError, DataError

__all__ = ["Mds"]

INDEX = "index.json"
SAMPLES_PER_READ = 64

SCALARS = {
    "int": "<i8", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "uint8": "u1",
    "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "float16": "<f2", "float32": "<f4",
    "float64": "<f8",
}  # fmt: skip
BYTES = frozenset({"bytes", "str", "json", "jpeg", "jpeg_array", "png"})
IMAGES = frozenset({"jpeg", "jpeg_array", "png"})
ARRAY_DTYPES = {
    8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 18: "<f2", 32: "<u4", 33: "<i4", 34: "<f4",
    64: "<u8", 65: "<i8", 66: "<f8",
}  # fmt: skip

Decode = Callable[[bytes], Any]


@final
class Mds(Source):
    """A folder of MDS shards, as ``streaming.MDSWriter`` writes them.

    Numbers and arrays keep their dtype and shape; text, bytes and JSON are ragged uint8, as are
    images, unless there is a decoder. Pickles are refused. Shards may be compressed with gzip or
    bz2, or, where the package zstandard is there, with Zstandard. A shard is a part; a compressed
    one is in memory as a whole. Hashes in the index are checked.

    Args:
        folder: with the ``index.json``.
        columns: which to read, in this order; None: all.
        ragged: columns of arrays that have different lengths.
        decoder: makes arrays of images; None: keep the bytes of their files.

    Raises:
        ConfigError: there is no index, no such column, or one whose encoding is not read.
        DataError: the index or (when read) a shard is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        columns: Sequence[str] | None = None,
        ragged: Sequence[str] = (),
        decoder: ImageDecoder | None = None,
    ) -> None:
        self._folder = Path(folder)
        path = self._folder / INDEX
        if not path.is_file():
            raise ConfigError(f"{self._folder} holds no MDS data set: there is no {path}")
        text = path.read_bytes()
        try:
            index = json.loads(text)
            if index["version"] != 2 or any(shard["format"] != "mds" for shard in index["shards"]):
                raise ValueError("it is not of version 2, or has shards that are not MDS")
            self._shards = [_Shard(self._folder, shard) for shard in index["shards"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(f"{path} is no index of MDS shards: {error!r}") from error
        if not self._shards:
            raise ConfigError(f"{path} names no shards")
        encodings = self._shards[0].encodings
        wanted = list(encodings) if columns is None else list(columns)
        self.identity = f"mds {wanted} {ragged} {decoder} {text.decode()}"
        for name in wanted:
            if name not in encodings:
                raise ConfigError(f"there is no column {name!r}, only {', '.join(encodings)}")
        self._encodings = {name: encodings[name] for name in wanted}
        self._images = decoder
        self._decoders()  # so that an encoding that is not read is told now
        self._ragged = tuple(ragged)
        self.parts = len(self._shards)

    def read(self, part: int) -> Iterator[Batch]:
        """The samples of a shard."""
        shard = self._shards[part]
        data, decoders = shard.load(), self._decoders()
        for low in range(0, shard.samples, SAMPLES_PER_READ):
            high = min(low + SAMPLES_PER_READ, shard.samples)
            samples = []
            for i in range(low, high):
                try:
                    stored = shard.sample(data, i)
                    samples.append({n: decode(stored[n]) for n, decode in decoders.items()})
                except (ValueError, IndexError, KeyError) as error:
                    raise DataError(f"sample {i} of {shard.path} is damaged: {error!r}") from error
            yield collate(samples, self._ragged, f"{shard.path}, samples {low} to {high - 1}")

    def _decoders(self) -> dict[str, Decode]:
        return {n: _decoder(n, encoding, self._images) for n, encoding in self._encodings.items()}


class _Shard:
    """One shard as the index describes it."""

    def __init__(self, folder: Path, told: Mapping[str, Any]) -> None:
        self.samples = int(told["samples"])
        names = told["column_names"]
        self.encodings: dict[str, str] = dict(zip(names, told["column_encodings"], strict=True))
        self._sizes: dict[str, int | None] = dict(zip(names, told["column_sizes"], strict=True))
        self._bytes = int(told["raw_data"]["bytes"])
        self._hashes: dict[str, str] = dict(told["raw_data"].get("hashes") or {})
        self._compression = str(told["compression"] or "").partition(":")[0]
        self.path = _inside(folder, told["raw_data"]["basename"])
        if self._compression and not self.path.exists():
            self.path = _inside(folder, told["zip_data"]["basename"])
        else:
            self._compression = ""

    def load(self) -> Array:
        """The bytes of the shard, mapped where it is not compressed."""
        try:
            if not self._compression:
                data: Array = np.memmap(self.path, np.uint8, "r")
            else:
                data = np.frombuffer(_decompress(self._compression, self.path), np.uint8)
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(f"MDS shard {self.path} cannot be read: {error}") from error
        head = data[:4].tobytes()
        if len(data) != self._bytes or np.frombuffer(head, "<u4").tolist() != [self.samples]:
            raise DataError(
                f"MDS shard {self.path} is damaged: it has {len(data)} bytes instead of "
                f"{self._bytes}, or not {self.samples} samples"
            )
        for name, digest in self._hashes.items():
            if (found := _hash(name, data)) not in (None, digest):
                raise DataError(
                    f"MDS shard {self.path} is damaged: its {name} is {found} instead of {digest}"
                )
        return data

    def sample(self, data: Array, number: int) -> dict[str, bytes]:
        """The encoded columns of a sample."""
        place = 4 * (1 + number)
        start, stop = map(int, np.frombuffer(data[place : place + 8].tobytes(), "<u4"))
        sample = data[start:stop].tobytes()
        sizes = dict(self._sizes)
        at = 0
        for name, size in sizes.items():
            if size is None:
                sizes[name] = int.from_bytes(sample[at : at + 4], "little")
                at += 4
        stored = {}
        for name, size in sizes.items():
            stored[name] = sample[at : at + (size or 0)]
            at += size or 0
        if at != len(sample):
            raise ValueError(f"its columns have {at} bytes, but it has {len(sample)}")
        return stored


def _hash(name: str, data: Array) -> str | None:
    """The hash of some bytes, if there is an algorithm of that name."""
    if name in hashlib.algorithms_available:
        return hashlib.new(name, data.data).hexdigest()
    algorithm = getattr(xxhash, name, None) if name.startswith("xxh") else None
    return None if algorithm is None else str(algorithm(data.data).hexdigest())


def _inside(folder: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"a shard is called {name!r}, which lies outside the folder")
    return folder / name


def _decompress(compression: str, path: Path) -> bytes:
    packed = path.read_bytes()
    if compression == "gz":
        return gzip.decompress(packed)
    if compression == "bz2":
        return bz2.decompress(packed)
    if compression == "zstd":
        try:
            import zstandard  # type: ignore[import, unused-ignore]
        except ImportError as error:
            raise ConfigError(
                f"{path} is compressed with Zstandard: pip install zstandard, or unpack the shards "
                "(zstd -d)"
            ) from error
        try:
            return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(packed))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
    raise ConfigError(f"{path} is compressed with {compression!r}; unpack the shards first")


def _decoder(name: str, encoding: str, images: ImageDecoder | None) -> Decode:
    """What makes a value of the bytes of a column.

    Raises:
        ConfigError: the encoding is none that is read.
    """
    kind, _, options = encoding.partition(":")
    if kind in SCALARS:
        return lambda data: np.frombuffer(data, SCALARS[kind]).reshape(())
    if kind == "ndarray":
        dtype, _, shape = options.partition(":")
        fixed = tuple(map(int, shape.split(","))) if shape else None
        return lambda data: _array(data, dtype, fixed)
    if kind in IMAGES and images is not None:
        return lambda data: images(data, f"an image of column {name!r}")
    if kind in BYTES:
        return lambda data: data
    if kind == "str_int":
        return lambda data: np.int64(int(data))
    if kind == "str_float":
        return lambda data: np.float64(float(data))
    if kind == "pil":
        return lambda data: _raw_image(data, images or ImageDecoder())
    why = ", and pickles are never read" if kind == "pkl" else ""
    raise ConfigError(
        f"column {name!r} has the encoding {encoding!r}, which is not read{why}; read the others: "
        "columns=[...]"
    )


def _array(data: bytes, dtype: str, shape: tuple[int, ...] | None) -> Array:
    """An ndarray: its dtype and its shape come first, each if the encoding does not fix it."""
    at = 0
    if not dtype:
        dtype, at = ARRAY_DTYPES[data[0]], 1
    if shape is None:
        dims, width = data[at] >> 2, 1 << (data[at] & 3)
        stop = at + 1 + dims * width
        shape = tuple(map(int, np.frombuffer(data[at + 1 : stop], f"<u{width}")))
        at = stop
    return np.frombuffer(data[at:], np.dtype(dtype).newbyteorder("<")).reshape(shape)


def _raw_image(data: bytes, decoder: ImageDecoder) -> Array:
    """An image that is not encoded: width, height, length of its mode, mode, pixels."""
    from PIL import Image

    width, height, length = map(int, np.frombuffer(data[:12], "<u4"))
    mode = data[12 : 12 + length].decode()
    return decoder.to_array(Image.frombytes(mode, (width, height), data[12 + length :]))
