"""Writes any source as a sharded data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from scaledtrain.data.convert.classes import save_class_names
from scaledtrain.data.convert.ledger import Ledger
from scaledtrain.data.convert.source import Batch, Source, samples_of, without_first
from scaledtrain.data.convert.workers import read_parts
from scaledtrain.data.sharded import ShardWriter
from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.manifest import MANIFEST, Manifest
from scaledtrain.data.sharded.storage import open_folder
from scaledtrain.data.sharded.writer import SHARD_BYTES
from scaledtrain.errors import ConfigError, DataError

__all__ = ["convert"]


def convert(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    timeout_seconds: float = 1_800.0,
    on_part: Callable[[int, int], None] | None = None,
) -> int:
    """Write a source as a sharded data set.

    With several workers, each process reads and decodes other parts of the input, and this one
    writes what they read, in the order of the input. So the files are the same, bit for bit,
    whatever the number of workers. They pay where reading means work (images, tokenizers): arrays
    are copied faster than they are handed over. In memory are a shard, and a batch or two for each
    worker.

    A crash, a kill or a full disk loses the samples since the last shard on the disk; with
    ``resume=True`` writing goes on behind it, and reads again only the part of the input that it
    was in. A worker that dies ends the whole.

    Args:
        source: what to read: `Arrays`, `Csv`, `Parquet`, `Images`, `Text`, `HuggingFace`,
            `TorchDataset`, `Mds`, `WebDataset`, `Shards`, or a `Source` of your own.
        folder: where to; is made if it is not there.
        workers: processes that read; 1: this one does it all.
        shard_bytes: a shard is full when its samples have at least so many bytes ...
        shard_samples: ... or when it has so many samples; None: only bytes count.
        resume: go on with what a run that was ended has left, from the same source; begin if there
            is nothing; do nothing if the data set is complete.
        overwrite: delete the data set that is in the folder, if there is one.
        timeout_seconds: for the next batch of a worker.
        on_part: called after each part with how many there were until then, and the samples
            written.

    Returns:
        The samples that the data set has now.

    Raises:
        ConfigError: there is nothing in the source, or something that fits into no column; or the
            folder holds a data set already.
        DataError: an input is damaged, a worker died, or the disk is full.
        WaitTimeoutError: a worker took too long.

    Example:
        >>> import tempfile
        >>> from scaledtrain.data.convert import Arrays, convert
        >>> folder = tempfile.TemporaryDirectory()
        >>> convert(Arrays({"x": np.arange(6.0).reshape(3, 2), "y": np.arange(3)}), folder.name)
        3
        >>> sorted(os.listdir(folder.name))
        ['manifest.json', 'shard-00000.safetensors']
        >>> folder.cleanup()
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it is a number of processes, >= 1")
    path = Path(folder)
    if source.input_folder is not None and path.resolve() == source.input_folder.resolve():
        raise ConfigError(f"{path} is read and cannot be written to; give another folder")
    begun = resume and (path / MANIFEST).exists()
    if begun and (there := Manifest.load(open_folder(path))).complete:
        return there.samples
    with ShardWriter(
        path,
        source.columns,
        shard_bytes=shard_bytes,
        shard_samples=shard_samples,
        resume=resume,
        overwrite=overwrite,
    ) as writer:
        ledger = Ledger(path, source.identity, resume=begun)
        complete = False
        try:
            save_class_names(path, source.classes)
            _fill(writer, source, ledger, workers, timeout_seconds, on_part)
            writer.close()
            complete = True
        finally:
            with suppress(DataError):  # it was told, or another error is
                writer.sync()
            begun = (path / MANIFEST).exists()
            ledger.close(delete=complete or not begun)
            if not begun:
                save_class_names(path, {})
    return writer.samples_written


def _fill(
    writer: ShardWriter,
    source: Source,
    ledger: Ledger,
    workers: int,
    timeout_seconds: float,
    on_part: Callable[[int, int], None] | None,
) -> None:
    pack = _Packer(source.sequence_length) if source.sequence_length is not None else None
    position = writer.samples_written * (source.sequence_length or 1)
    first, skip = ledger.find(position)
    position -= skip
    with closing(read_parts(source, first, workers, timeout_seconds)) as batches:
        for part, batch in batches:
            if batch is None:
                ledger.add(part, position)
                if on_part is not None:
                    on_part(part + 1, writer.samples_written)
                continue
            n = samples_of(batch)
            position += n
            if skip:  # written before
                batch = without_first(batch, min(skip, n))
                skip -= min(skip, n)
            writer.write_batch(batch if pack is None else pack(batch))
    if not writer.samples_written:
        what = f"only {position} tokens, which fill no sequence of {source.sequence_length}"
        raise ConfigError(f"the input has {what if position else 'no samples'}")


class _Packer:
    """Cuts a stream of tokens into sequences; what fills none waits for the next tokens."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._rest: dict[str, Array] = {}

    def __call__(self, batch: Batch) -> Batch:
        packed = {}
        for name, tokens in batch.items():
            if name in self._rest:
                tokens = np.concatenate([self._rest[name], tokens])
            whole = len(tokens) - len(tokens) % self._length
            packed[name] = tokens[:whole].reshape(-1, self._length)
            self._rest[name] = tokens[whole:].copy()
        return packed
