"""A sharded data set itself, to be written in another way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

from scaledtrain.data.convert.classes import class_names
from scaledtrain.data.convert.source import Batch, Source, Spans
from scaledtrain.data.sharded import Order, ShardedDataset
from scaledtrain.data.sharded.loader import BLOCK_BYTES, BUFFER_BYTES
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.order import Shuffle
from scaledtrain.data.sharded.storage import open_folder
from scaledtrain.errors import ConfigError

__all__ = ["Shards"]


@final
class Shards(Source):
    """A sharded data set, in another order, with fewer columns, or for shards of another size.

    Args:
        folder: of the data set, which must be complete.
        columns: which to keep, in this order; None: all.
        shuffle: ``"none"``: samples stay in order. ``"full"``: they are drawn from everywhere, once
            and for all, so that later runs can read in order. ``"block"``: blocks of 1 MiB are,
            64 of which are mixed at a time, which reads a disk in long pieces (see `Order`).
        seed: of the shuffle.

    Raises:
        ConfigError: the folder holds no data set that is complete, or no such column.
        DataError: (when read) a shard is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        columns: Sequence[str] | None = None,
        shuffle: Shuffle = "none",
        seed: int = 0,
    ) -> None:
        path = Path(folder)
        if not Manifest.load(open_folder(path)).complete:
            raise ConfigError(f"the data set in {path} is not finished; go on with it first")
        self.input_folder = path
        self._dataset = ShardedDataset(path, columns)
        self.columns = dict(self._dataset.columns)
        kept = class_names(path)
        self.classes = {name: kept[name] for name in self.columns if name in kept}
        self._sample_bytes = self._dataset.sample_bytes
        self._shuffle, self._seed = shuffle, seed
        _ = self._order  # so that an option that cannot be is told now
        self._spans = Spans.of_bytes(len(self._dataset), self._sample_bytes)
        self.parts = self._spans.parts
        options = (list(self.columns), shuffle, seed)
        self.identity = f"shards {options} {self._dataset.manifest.shards}"

    def read(self, part: int) -> Iterator[Batch]:
        """Samples at some positions of the order."""
        span = self._spans.span(part)
        drawn = self._order.indices(0, span.start, span.stop)
        yield self._dataset.gather(drawn)[0]

    @cached_property
    def _order(self) -> Order:
        """Each process has its own, as its caches are not sent to another."""
        block = max(1, int(BLOCK_BYTES // max(self._sample_bytes, 1)))
        shards = [shard.samples for shard in self._dataset.manifest.shards]
        return Order(shards, block, BUFFER_BYTES // BLOCK_BYTES, self._shuffle, self._seed)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}
