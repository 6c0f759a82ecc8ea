"""A replica laid out over several ranks: each has a piece of it."""

from scaledtrain.parallel.layout import Layout, lay_out
from scaledtrain.parallel.pipeline.pipeline import Pipeline
from scaledtrain.parallel.shard import FullyShard

__all__ = ["FullyShard", "Layout", "Pipeline", "lay_out"]
