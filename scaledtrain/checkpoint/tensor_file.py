"""Writes tensors into a file of the safetensors format, with its checksum, in one pass."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError

__all__ = [
    "DTYPES",
    "Written",
    "sha256_of",
    "write_bytes",
    "write_tensors",
]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How the format calls them."""

_PIECE_BYTES = 2**22
_BEGIN_BYTES = 2**25


class Written(NamedTuple):
    """What is in a file that was written to the disk."""

    bytes: int
    sha256: str


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write tensors in order; the file is on the disk when this returns.

    Args:
        path: of the new file.
        tensors: names, each once, and contiguous tensors on the CPU.
        metadata: for the file's header.

    Raises:
        ConfigError: a tensor is of a dtype that the format does not have.
        OSError: the disk is full, or the file cannot be written.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"{name} is of {tensor.dtype}, which safetensors has no name for; keep it as "
                f"another type in the state ({', '.join(DTYPES.values())})"
            )
        end = begin + tensor.nbytes
        shape, offsets = list(tensor.shape), [begin, end]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, _pieces(len(text).to_bytes(8, "little") + text, tensors))


def write_bytes(path: Path, content: bytes | memoryview[int]) -> Written:
    """Write a small file; it is on the disk when this returns."""
    return _write(path, [memoryview(content)])


def _pieces(first: bytes, tensors: Sequence[tuple[str, Tensor]]) -> list[memoryview]:
    pieces = [memoryview(first)]
    for _, tensor in tensors:
        if tensor.nbytes:
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            begins = range(0, len(content), _PIECE_BYTES)
            pieces += [content[begin : begin + _PIECE_BYTES] for begin in begins]
    return pieces


def _write(path: Path, pieces: Sequence[memoryview]) -> Written:
    """The checksum is taken beside the writing: both let other threads go on."""
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1, "checksum") as beside:
        digest = beside.submit(_sha256, pieces)
        size = begun = 0
        for piece in pieces:
            size += len(piece)
            while piece:  # a raw file may take less than it is given
                piece = piece[file.write(piece) :]
            if size - begun >= _BEGIN_BYTES:
                _begin_to_store(file.fileno(), begun, size - begun)
                begun = size
        os.fsync(file.fileno())
        return Written(size, digest.result())


def _sha256(pieces: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _begin_to_store(descriptor: int, begin: int, n_bytes: int) -> None:
    """Let the disk begin with what is written, while more comes; it would wait for the fsync."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, n_bytes, os.POSIX_FADV_DONTNEED)


def sha256_of(path: Path) -> Written:
    """Size and checksum of a file as it is."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    size = 0
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            size += n
    return Written(size, digest.hexdigest())
