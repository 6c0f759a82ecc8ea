"""The header of a shard file: a safetensors header, and the checksums of the data behind it.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON), and the
tensors' bytes without gaps. The header's ``__metadata__`` has a key for every tensor: the XXH3
checksums (64 bit) of each `CHUNK_BYTES` of it, so that only what is read need be checked. The
manifest has the checksum of the header. Of compressed columns, see `compression`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from scaledtrain.data.sharded.columns import Array, Column
from scaledtrain.data.sharded.compression import Blocks, Compression, parse_blocks
from scaledtrain.data.sharded.manifest import load_json

__all__ = [
    "CHUNK_BYTES",
    "ITEM_BYTES",
    "TensorInfo",
    "Tensors",
    "build_header",
    "checksum",
    "chunk_sums",
    "header_bytes",
    "parse_header",
]

CHUNK_BYTES = 65_536  # shorter ones cost more than the arithmetic of their checksums
ALIGNMENT = 64  # of the first tensor; as they come by falling item size, the others' follows
PREFIX_BYTES = 8
METADATA = "__metadata__"
SUMS = f"xxh3_64/{CHUNK_BYTES}:"  # before a tensor's name, in the metadata

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a file."""

    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the beginning of the file."""
    sums: Array
    """uint64: the checksum of each of its chunks."""
    blocks: Blocks | None = None
    """Of a compressed one; then dtype and shape are those of its frames."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def checksum(data: bytes | memoryview) -> int:
    """XXH3, 64 bit: some gigabytes a second; against accidents, not against forgery."""
    return xxhash.xxh3_64_intdigest(data)


def chunk_sums(data: memoryview) -> Array:
    """The checksums of each `CHUNK_BYTES` of some bytes, uint64."""
    starts = range(0, len(data), CHUNK_BYTES)
    return np.array([checksum(data[i : i + CHUNK_BYTES]) for i in starts], np.uint64)


Tensors = dict[str, tuple[str, tuple[int, ...], memoryview]]


def header_bytes(file_bytes: int) -> int:
    """About as many bytes as the header of a file of this size has: 16 digits for each chunk."""
    return 16 * (file_bytes // CHUNK_BYTES) + 4_096


def build_header(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """The header, with its length before it.

    Args:
        tensors: name -> (safetensors dtype, shape, bytes), in the order in which they will follow:
            by falling size of their items.
        metadata: what else it tells.
    """
    told: dict[str, Any] = {METADATA: dict(metadata or {})}
    begin = 0
    for name, (dtype, shape, data) in tensors.items():
        end = begin + len(data)
        told[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        told[METADATA][SUMS + name] = chunk_sums(data).astype(">u8").tobytes().hex()
        begin = end
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def parse_header(
    header: bytes,
    file_bytes: int,
    columns: Mapping[str, Column],
    samples: int,
    compression: Compression | None = None,
) -> dict[str, TensorInfo]:
    """Where everything is that the manifest promises, and that nothing else is there.

    Args:
        header: with its length before it.
        file_bytes: size of the whole file.
        columns: that the shard must have.
        samples: in it.
        compression: of its columns.

    Raises:
        ValueError: it is anything but the header of such a shard. What is returned lies inside the
            file and does not overlap, whatever the header says.
    """
    length = int.from_bytes(header[:PREFIX_BYTES], "little")
    if length != len(header) - PREFIX_BYTES:
        raise ValueError(f"its header is {length} bytes long, as it says, but there are others")
    told = load_json(header[PREFIX_BYTES:])
    if not isinstance(told, dict):
        raise ValueError("its header is no JSON object")
    sums = told.pop(METADATA, None)
    expected = {
        tensor: "U8" if compression and tensor == name else code
        for name, column in columns.items()
        for tensor, code in column.tensors(name).items()
    }
    if told.keys() != expected.keys():
        raise ValueError(f"it has the tensors {sorted(told)} instead of {sorted(expected)}")
    if not isinstance(sums, dict):
        raise ValueError("its header has no checksums")
    found = {}
    for name, code in expected.items():
        begin, shape = _place(name, told[name], code)
        found[name] = TensorInfo(
            code, shape, len(header) + begin, _sums(name, sums, told[name]["data_offsets"])
        )
    if compression:
        for name, column in columns.items():
            rows = None if column.ragged else samples
            blocks = parse_blocks(name, sums, found[name].nbytes, column.nbytes, rows)
            found[name] = replace(found[name], blocks=blocks)
    _check_shapes(found, columns, samples)
    _check_places(found, len(header), file_bytes)
    return found


def _place(name: str, told: Any, code: str) -> tuple[int, tuple[int, ...]]:
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header does not say dtype, shape and data_offsets of {name!r}")
    if told["dtype"] != code:
        raise ValueError(f"tensor {name!r} is {told['dtype']!r} instead of {code!r}")
    shape, place = told["shape"], told["data_offsets"]
    if not _are_counts(shape) or not _are_counts(place) or len(place) != 2:
        raise ValueError(f"tensor {name!r} has shape {shape!r} at {place!r}")
    begin, end = place
    if end - begin != math.prod(shape) * ITEM_BYTES[code]:
        raise ValueError(f"tensor {name!r} of shape {shape} has {end - begin} bytes")
    return begin, tuple(shape)


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


def _sums(name: str, sums: Mapping[str, Any], place: tuple[int, int]) -> Array:
    text = sums.get(SUMS + name)
    chunks = -(-(place[1] - place[0]) // CHUNK_BYTES)
    if not isinstance(text, str) or len(text) != 16 * chunks:
        raise ValueError(f"its header has no checksums of all {chunks} chunks of {name!r}")
    found = bytes.fromhex(text)
    if len(found) != 8 * chunks:  # there were blanks
        raise ValueError(f"its header has checksums of {name!r} that are no hexadecimal numbers")
    return np.frombuffer(found, ">u8")


def _check_shapes(
    found: Mapping[str, TensorInfo], columns: Mapping[str, Column], samples: int
) -> None:
    for name, column in columns.items():
        for tensor in column.tensors(name):
            shape = found[tensor].shape
            if tensor != name:
                expected: tuple[int, ...] = (samples + 1,)
            elif found[tensor].blocks is not None:
                expected = (found[tensor].nbytes,)
            else:
                elements = shape[0] if column.ragged and shape else samples
                expected = (elements, *column.shape)
            if shape != expected:
                raise ValueError(f"tensor {tensor!r} has shape {shape} instead of {expected}")


def _check_places(found: Mapping[str, TensorInfo], begin: int, end: int) -> None:
    """The tensors lie one behind the other, from the header to the end of the file."""
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != begin:
            raise ValueError(f"tensor {name!r} begins at byte {info.start} instead of {begin}")
        if info.start % ITEM_BYTES[info.dtype]:
            raise ValueError(f"tensor {name!r} is not aligned to its items")
        begin += info.nbytes
    if begin != end:
        raise ValueError(f"the file has {end} bytes, its tensors end at {begin}")
