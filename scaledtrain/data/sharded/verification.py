"""Reads all of a data set against its checksums."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from scaledtrain.data.sharded.manifest import Manifest, ShardInfo
from scaledtrain.data.sharded.opening import OpenShards
from scaledtrain.data.sharded.storage import open_folder
from scaledtrain.data.sharded.unpack import reader_of
from scaledtrain.errors import DataError

__all__ = ["verify"]


def verify(
    folder: str | os.PathLike[str], on_shard: Callable[[ShardInfo], object] | None = None
) -> dict[str, str]:
    """Read every byte of a data set, and compare it with its checksum.

    Args:
        folder: of the data set, or its URL.
        on_shard: called after each shard.

    Returns:
        File -> what is wrong with it, of each shard that is damaged or missing.

    Raises:
        ConfigError: the folder holds no data set.
        DataError: the manifest is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
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
    where = open_folder(folder)
    manifest = Manifest.load(where)
    shards = OpenShards(where, manifest, verify=True)
    damaged = {}
    for number, info in enumerate(manifest.shards):
        try:
            shard = shards.get(number)
            shard.check_all()
            for name, column in manifest.columns.items():
                if column.ragged:
                    reader_of(shard).bounds(name, np.arange(info.samples))
        except DataError as error:
            damaged[info.file] = str(error)
        if on_shard is not None:
            on_shard(info)
    return damaged
