"""Reads all of a data set against its checksums."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from scaledtrain.data.sharded.columns import OFFSETS, Array, Column
from scaledtrain.data.sharded.manifest import Manifest, ShardInfo
from scaledtrain.data.sharded.shard import Shard
from scaledtrain.errors import DataError

__all__ = ["verify"]


def verify(
    folder: str | os.PathLike[str], on_shard: Callable[[ShardInfo], object] | None = None
) -> dict[str, str]:
    """Read every byte of a data set, and compare it with its checksum.

    Args:
        folder: of the data set.
        on_shard: called after each shard.

    Returns:
        File -> what is wrong with it, of each shard that is damaged or missing.

    Raises:
        ConfigError: the folder holds no data set.
        DataError: the manifest is damaged.

    Example:
        >>> import tempfile
        >>> from scaledtrain.data import ShardWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ShardWriter(folder.name) as writer:
        ...     writer.write_batch({"x": [1, 2, 3]})
        >>> file = Path(folder.name) / "shard-00000.safetensors"
        >>> verify(folder.name), file.write_bytes(file.read_bytes()[:-1] + b"!") > 0
        ({}, True)
        >>> print(*verify(folder.name).values())
        shard ... is damaged: bytes 128 to 152, of tensor 'x', were altered; restore ...
        >>> folder.cleanup()
    """
    path = Path(folder)
    manifest = Manifest.load(path)
    damaged = {}
    for info in manifest.shards:
        try:
            _check(path, info, manifest.columns)
        except DataError as error:
            damaged[info.file] = str(error)
        if on_shard is not None:
            on_shard(info)
    return damaged


def _check(folder: Path, info: ShardInfo, columns: Mapping[str, Column]) -> None:
    checked: dict[str, Array] = {}
    shard = Shard(folder / info.file, info, columns, checked)
    for name, column in columns.items():
        if column.ragged:
            shard.check(name + OFFSETS, np.array([0]), np.array([8 * (info.samples + 1)]))
            shard.bounds(name, np.arange(info.samples))
        shard.check(name, np.array([0]), np.array([shard.rows(name).nbytes]))
