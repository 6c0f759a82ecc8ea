"""Data sets: small ones that need no download, and any that do not fit into memory."""

from __future__ import annotations

from scaledtrain.data.digits import digits
from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded import (
    Column,
    Remote,
    ShardedDataset,
    ShardedLoader,
    ShardWriter,
)
from scaledtrain.data.stdlib_text import StdlibText, stdlib_text

__all__ = [
    "Column",
    "Ragged",
    "Remote",
    "ShardWriter",
    "ShardedDataset",
    "ShardedLoader",
    "StdlibText",
    "digits",
    "stdlib_text",
]
