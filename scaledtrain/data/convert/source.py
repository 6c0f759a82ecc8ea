"""What a converter reads: an input that is cut into parts, each of which can be read alone."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaledtrain.data.ragged import Ragged
from scaledtrain.data.sharded import Column
from scaledtrain.errors import ConfigError

__all__ = [
    "PART_BYTES",
    "Batch",
    "Paths",
    "Source",
    "Spans",
    "find_files",
    "load_object",
    "names_and_sizes",
    "samples_of",
    "without_first",
]

PART_BYTES = 4 * 2**20  # of what is read at once: a few of them are in memory for every process

Batch = Mapping[str, Any]
Paths = str | Path | Sequence[str | Path]


class Source(ABC):
    """An input that `convert` writes as a sharded data set.

    It is cut into ``parts``, in an order that depends on nothing but the input. Worker processes
    read different parts of it at the same time, so ``read`` keeps no state between parts; where
    processes are not forked (macOS, Windows), the source is pickled.
    """

    parts: int
    """How many parts there are."""

    identity: str
    """Text that is another one where the input would give other samples.

    Writing is resumed only from a source of the same identity.
    """

    columns: Mapping[str, Column] = {}
    """Columns that are known before anything is read; the others follow from the first sample."""

    classes: Mapping[str, Sequence[str]] = {}
    """Column -> the names of its classes 0, 1, ..."""

    input_folder: Path | None = None
    """Folder that is read, where it must not be written to."""

    sequence_length: int | None = None
    """None: ``read`` gives samples. Otherwise tokens, which are packed into samples of so many."""

    @abstractmethod
    def read(self, part: int) -> Iterator[Batch]:
        """The samples of a part, in their order.

        Returns:
            Batches for `ShardWriter.write_batch`, each of a few megabytes; with a
            ``sequence_length``, column -> one token after the other, ``[n]``.
        """


class Spans(NamedTuple):
    """Numbered samples, so many in each part."""

    samples: int
    per_part: int

    @property
    def parts(self) -> int:
        """How many parts that makes."""
        return -(-self.samples // self.per_part)

    def span(self, part: int) -> range:
        """The samples of a part."""
        start = part * self.per_part
        return range(start, min(start + self.per_part, self.samples))

    @classmethod
    def of_bytes(cls, samples: int, sample_bytes: float) -> Spans:
        """Parts of about `PART_BYTES`."""
        return cls(samples, max(1, int(PART_BYTES // max(sample_bytes, 1))))


def samples_of(batch: Batch) -> int:
    """How many samples (or tokens) a batch has."""
    values = next(iter(batch.values()))
    return values.samples if isinstance(values, Ragged) else len(values)


def without_first(batch: Batch, n: int) -> Batch:
    """A batch without its first n samples."""
    return {k: (v.unbind() if isinstance(v, Ragged) else v)[n:] for k, v in batch.items()}


def find_files(paths: Paths, pattern: str) -> list[Path]:
    """The files that are meant: those given, and of each folder those below it, sorted by name.

    Raises:
        ConfigError: there is no such file, or a folder without any that matches.
    """
    found: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, (str, Path)) else map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob(pattern) if file.is_file())
            if not inside:
                raise ConfigError(f"the folder {path} holds no file that is called {pattern}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ConfigError(f"there is no file or folder {path}")
    if not found:
        raise ConfigError("no file was given to read")
    return found


def names_and_sizes(files: Iterable[Path]) -> str:
    """What tells one list of files from another: names and sizes."""
    return " ".join(f"{file.name!r}:{file.stat().st_size}" for file in files)


def load_object(name: str) -> Any:
    """What ``"module:name"`` means.

    Raises:
        ConfigError: it is written otherwise, or there is no such thing.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{name!r} is no Python object; write module:name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"there is no {name}: {error}") from error
