"""Data sets: small ones that need no download, and any that do not fit into memory."""

from __future__ import annotations

from scaledtrain.data.digits import digits
from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded import (
    ClassBalance,
    Column,
    Normalization,
    ShardedDataset,
    ShardedLoader,
    ShardWriter,
    Statistics,
    class_weights,
    compute_statistics,
)
from scaledtrain.data.stdlib_text import StdlibText, stdlib_text

__all__ = [
    "ClassBalance",
    "Column",
    "Normalization",
    "Ragged",
    "ShardWriter",
    "ShardedDataset",
    "ShardedLoader",
    "Statistics",
    "StdlibText",
    "class_weights",
    "compute_statistics",
    "digits",
    "stdlib_text",
]
