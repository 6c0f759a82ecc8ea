"""Data sets: small ones that need no download, and any that do not fit into memory."""

from __future__ import annotations

from scaledtrain.data.digits import digits
from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded import Column, ShardedDataset, ShardedLoader, ShardWriter, verify
from scaledtrain.data.stdlib_text import StdlibText, stdlib_text

__all__ = [
    "Column",
    "Ragged",
    "ShardWriter",
    "ShardedDataset",
    "ShardedLoader",
    "StdlibText",
    "digits",
    "stdlib_text",
    "verify",
]
