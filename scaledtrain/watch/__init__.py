"""Watching a run: ranks that hang, ranks that are slow, numbers that are not in order."""

from scaledtrain.watch.dump import BadBatch, load_batch
from scaledtrain.watch.locate import Found, find_nonfinite
from scaledtrain.watch.policy import Reaction, Watch

__all__ = ["BadBatch", "Found", "Reaction", "Watch", "find_nonfinite", "load_batch"]
