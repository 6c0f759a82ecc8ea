"""Compressed columns: zstd frames of 64 KiB each, so that any part can be read alone.

In a shard that is compressed, the values of each column are a uint8 tensor of frames, one behind
the other; a block that does not become smaller is stored as it is. The header's ``__metadata__``
has a key for each: the bytes of the whole tensor (16 hexadecimal digits), then those of each frame
(8 digits). The offsets of ragged columns are not compressed, nor is the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scaledtrain.data.sharded.columns import Array
from scaledtrain.errors import ConfigError

__all__ = ["BLOCK_BYTES", "Blocks", "Compression", "Compressor", "Decompressor", "parse_blocks"]

Compression = Literal["zstd"]

BLOCK_BYTES = 65_536
LEVELS = range(1, 23)
DEFAULT_LEVEL = 3
BLOCKS = "zstd:"  # before a tensor's name, in the metadata


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a compressed tensor lie.

    Args:
        nbytes: of the whole tensor, not compressed.
        rows: of the tensor.
        ends: int64 ``[blocks + 1]``: where each frame ends in the stored tensor; 0 comes first.
    """

    nbytes: int
    rows: int
    ends: Array

    def size(self, block: int) -> int:
        """Bytes of a block, not compressed."""
        return min(BLOCK_BYTES, self.nbytes - block * BLOCK_BYTES)


class Compressor:
    """Compresses tensors, block by block.

    Args:
        level: from 1, fast, to 22, small.

    Raises:
        ConfigError: no such level, or zstandard is not installed.
    """

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        if type(level) is not int or level not in LEVELS:
            raise ConfigError(f"level is {level!r}; zstd's are {LEVELS[0]} to {LEVELS[-1]}")
        self._zstd = _zstandard("written").ZstdCompressor(level=level)

    def compress(self, name: str, data: memoryview) -> tuple[memoryview, dict[str, str]]:
        """The stored bytes of a tensor, and what the metadata say of them."""
        stored = bytearray()
        sizes = []
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            frame = self._zstd.compress(block)
            smaller = frame if len(frame) < len(block) else block
            stored += smaller
            sizes.append(len(smaller))
        told = f"{len(data):016x}" + np.array(sizes, ">u4").tobytes().hex()
        return memoryview(stored), {BLOCKS + name: told}


class Decompressor:
    """Decompresses blocks; of one thread alone.

    Raises:
        ConfigError: zstandard is not installed.
    """

    def __init__(self) -> None:
        self._module = _zstandard("read")
        self._zstd = self._module.ZstdDecompressor()

    def block(self, frame: memoryview, size: int) -> bytes | memoryview:
        """A block of this size, and of no other: no more than that is ever allocated.

        Raises:
            ValueError: the frame is damaged, or tells another size.
        """
        if len(frame) == size:
            return frame
        try:
            told = self._module.frame_content_size(frame)
            if told != size:
                raise ValueError(f"a zstd frame of {size} bytes says that it has {told}")
            data: bytes = self._zstd.decompress(frame, max_output_size=size)
        except self._module.ZstdError as error:
            raise ValueError(f"a zstd frame is damaged: {error}") from error
        if len(data) != size:
            raise ValueError(f"a zstd frame of {size} bytes has {len(data)}")
        return data


def parse_blocks(
    name: str, metadata: Mapping[str, Any], stored_bytes: int, row_bytes: int, rows: int | None
) -> Blocks:
    """Where the blocks of a tensor lie.

    Args:
        name: of the tensor.
        metadata: of the file.
        stored_bytes: that it has in the file.
        row_bytes: that a row has, not compressed.
        rows: that it must have; None: any number.

    Raises:
        ValueError: anything but what ``Compressor`` tells of such a tensor. The blocks that are
            returned lie behind each other from its first stored byte to its last.
    """
    text = metadata.get(BLOCKS + name)
    if not isinstance(text, str) or len(text) < 16:
        raise ValueError(f"its header does not tell the blocks of {name!r}")
    told = bytes.fromhex(text)
    nbytes = int.from_bytes(told[:8], "big")
    if len(text) != 2 * len(told) or len(told) != 8 + 4 * -(-nbytes // BLOCK_BYTES):
        raise ValueError(f"its header tells {len(told) - 8} bytes of blocks of {name!r}")
    sizes = np.frombuffer(told, ">u4", offset=8).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    if ends[-1] != stored_bytes or not sizes.all():
        raise ValueError(f"the blocks of {name!r} do not fill its {stored_bytes} bytes")
    found, rest = divmod(nbytes, row_bytes)
    if rest or found != (found if rows is None else rows):
        raise ValueError(f"tensor {name!r} has {nbytes} bytes, of {row_bytes} in a row")
    return Blocks(nbytes, found, ends)


def _zstandard(what: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            f"a compressed data set is {what} with zstandard, which is not installed here: "
            "pip install 'scaledtrain[zstd]'"
        ) from error
    return zstandard
