"""A bad batch in a file: safetensors, without pickle, to be loaded and run again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from scaledtrain.checkpoint.tensor_file import write_tensors
from scaledtrain.checkpoint.tree import flatten, restore
from scaledtrain.disk import sync_folder
from scaledtrain.errors import CheckpointError

__all__ = ["BadBatch", "load_batch", "save_batch"]

_KEY = "scaledtrain.bad_batch"


class BadBatch(NamedTuple):
    """What `load_batch` finds."""

    microbatches: list[Any]
    """As the loader gave them, on the CPU."""
    facts: dict[str, Any]
    """Rank, step, epoch, sample indices, and what was wrong: as in the record of the metrics."""


def save_batch(path: Path, batch: BadBatch) -> None:
    """Write a batch whole, or not at all.

    Raises:
        ConfigError: it holds objects that are not tensors, numbers, texts, lists or dicts.
        OSError: it cannot be written.
    """
    skeleton, tensors = flatten(batch.microbatches)
    text = json.dumps({"skeleton": skeleton, "facts": batch.facts})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    named = [(name, tensor.contiguous()) for name, tensor in tensors.items()]
    try:
        write_tensors(unfinished, named, {_KEY: text})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_batch(path: str | Path) -> BadBatch:
    """Read a batch that a run with ``Watch(dump=True)`` has written.

    Args:
        path: of the file.

    Returns:
        The microbatches, and what was known of the step.

    Raises:
        CheckpointError: it is missing, damaged, or another kind of file.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     batch = BadBatch([(torch.tensor([1.0, torch.nan]), "a")], {"step": 7})
        ...     save_batch(Path(folder, "bad.safetensors"), batch)
        ...     load_batch(Path(folder, "bad.safetensors"))
        BadBatch(microbatches=[(tensor([1., nan]), 'a')], facts={'step': 7})
    """
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no batch that a watch has written: {error}") from error
    return BadBatch(restore(header["skeleton"], tensors), header["facts"])
