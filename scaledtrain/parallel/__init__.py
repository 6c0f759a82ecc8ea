"""A replica laid out over several ranks: each has a piece of it."""

from scaledtrain.parallel.deepspeed import DeepSpeed
from scaledtrain.parallel.layout import Layout, lay_out
from scaledtrain.parallel.shard import FullyShard

__all__ = ["DeepSpeed", "FullyShard", "Layout", "lay_out"]
