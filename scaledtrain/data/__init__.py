"""Data sets: small ones that need no download, and any that do not fit into memory."""

from __future__ import annotations

from scaledtrain.data.digits import digits
from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded import (
    ClassBalance,
    Column,
    Mixture,
    Normalization,
    Remote,
    ShardedDataset,
    ShardedLoader,
    ShardWriter,
    Statistics,
    class_weights,
    compute_statistics,
    verify,
)
from scaledtrain.data.stdlib_text import StdlibText, stdlib_text

__all__ = [
    "ClassBalance",
    "Column",
    "Mixture",
    "Normalization",
    "Ragged",
    "Remote",
    "ShardWriter",
    "ShardedDataset",
    "ShardedLoader",
    "Statistics",
    "StdlibText",
    "class_weights",
    "compute_statistics",
    "digits",
    "stdlib_text",
    "verify",
]
