"""A replica laid out over several ranks: each has a piece of it."""

from scaledtrain.parallel.deepspeed import DeepSpeed
from scaledtrain.parallel.layout import Layout, lay_out
from scaledtrain.parallel.pipeline.pipeline import Pipeline
from scaledtrain.parallel.shard import FullyShard

__all__ = ["DeepSpeed", "FullyShard", "Layout", "Pipeline", "lay_out"]
