"""Data sets that do not fit into memory: written once, read by any number of ranks."""

from __future__ import annotations

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded.balance import ClassBalance, class_weights
from scaledtrain.data.sharded.columns import Column
from scaledtrain.data.sharded.compute_statistics import compute_statistics
from scaledtrain.data.sharded.dataset import ShardedDataset
from scaledtrain.data.sharded.loader import ShardedLoader
from scaledtrain.data.sharded.mixture import Mixture
from scaledtrain.data.sharded.normalize import Normalization
from scaledtrain.data.sharded.order import Order
from scaledtrain.data.sharded.statistics import ColumnStatistics, Statistics
from scaledtrain.data.sharded.storage import Remote
from scaledtrain.data.sharded.verification import verify
from scaledtrain.data.sharded.writer import ShardWriter

__all__ = [
    "ClassBalance",
    "Column",
    "ColumnStatistics",
    "Mixture",
    "Normalization",
    "Order",
    "Ragged",
    "Remote",
    "ShardWriter",
    "ShardedDataset",
    "ShardedLoader",
    "Statistics",
    "class_weights",
    "compute_statistics",
    "verify",
]
