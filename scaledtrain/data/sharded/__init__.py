"""Data sets that do not fit into memory: written once, read by any number of ranks."""

from __future__ import annotations

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.columns import Column
from scaledtrain.data.sharded.dataset import ShardedDataset
from scaledtrain.data.sharded.loader import ShardedLoader
from scaledtrain.data.sharded.order import Order
from scaledtrain.data.sharded.storage import Remote
from scaledtrain.data.sharded.writer import ShardWriter

__all__ = [
    "Column",
    "Order",
    "Ragged",
    "Remote",
    "ShardWriter",
    "ShardedDataset",
    "ShardedLoader",
]
