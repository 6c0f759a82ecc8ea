"""``manifest.json``: which columns a data set has, and which shards, in their order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from scaledtrain.data.sharded.columns import Column, check_columns
from scaledtrain.data.sharded.compression import Compression
from scaledtrain.data.sharded.statistics import Statistics
from scaledtrain.data.sharded.storage import Folder
from scaledtrain.errors import ConfigError, DataError

__all__ = ["MANIFEST", "Manifest", "ShardInfo", "load_json", "shard_name"]

MANIFEST = "manifest.json"
FORMAT = "scaledtrain-shards"
VERSION = 2  # 1 is the same without compression; such sets are still written as 1

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")  # a file of the folder itself, never outside
_CHECKSUM = re.compile(r"[0-9a-f]{16}\Z")
_MOST = 2**48  # samples or bytes of one shard: sums of many still fit into int64


def shard_name(number: int) -> str:
    """The file of a shard, counted from 0."""
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard.

    Args:
        file: its name in the folder.
        samples: how many are in it.
        bytes: the size of the file.
        checksum: XXH3 (64 bit, hexadecimal) of the file's header, which in turn holds those of all
            its parts.
        raw_bytes: what its columns' values take when they are not compressed; None: as they are.

    Raises:
        ConfigError: no shard can be like this.
    """

    file: str
    samples: int
    bytes: int
    checksum: str
    raw_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not _NAME.match(self.file):
            raise ConfigError(f"a shard's file is {self.file!r}, which is no name in the folder")
        for name in ("samples", "bytes"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < _MOST:
                raise ConfigError(f"shard {self.file} has {name} {value!r}, no count >= 1")
        if not isinstance(self.checksum, str) or not _CHECKSUM.match(self.checksum):
            raise ConfigError(
                f"shard {self.file} has checksum {self.checksum!r}, not 16 hex digits"
            )
        raw = self.raw_bytes
        if raw is not None and (type(raw) is not int or not 0 <= raw < _MOST):
            raise ConfigError(f"shard {self.file} has raw_bytes {raw!r}, no count")

    @property
    def memory_bytes(self) -> int:
        """What its samples take in memory, as far as the manifest tells."""
        return self.bytes if self.raw_bytes is None else self.raw_bytes


@dataclass(frozen=True)
class Manifest:
    """What is known of a data set without opening a shard.

    Args:
        columns: by name.
        shards: in order; their samples are numbered through.
        complete: whether the writer was closed. If not, it died or is still at work, and what is
            here is a prefix of the data.
        statistics: as `compute_statistics` stored them; None: it did not yet.
        compression: of the columns' values; None: there is none.

    Raises:
        ConfigError: columns whose names cannot be together, or a shard that is named twice.
    """

    columns: Mapping[str, Column]
    shards: tuple[ShardInfo, ...] = ()
    complete: bool = False
    statistics: Statistics | None = field(default=None, compare=False)
    compression: Compression | None = None
    samples: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        check_columns(self.columns)
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ConfigError("a shard is named twice")
        if type(self.complete) is not bool:
            raise ConfigError(f"complete is {self.complete!r}; it is true or false")
        if self.compression not in (None, "zstd"):
            raise ConfigError(f"compression is {self.compression!r}; it is 'zstd', or none")
        object.__setattr__(self, "samples", sum(shard.samples for shard in self.shards))

    @property
    def stale(self) -> bool:
        """The statistics are of fewer samples than there are now."""
        told = self.statistics
        return told is not None and (told.samples, told.shards) != (self.samples, len(self.shards))

    def current_statistics(self, folder: object) -> Statistics:
        """The statistics.

        Args:
            folder: of the data set, for messages.

        Raises:
            ConfigError: there are none, or samples were added since.
        """
        if self.statistics is None:
            raise ConfigError(
                f"the data set in {folder} has no statistics; compute them once: "
                f"scaledtrain.data.compute_statistics({str(folder)!r})"
            )
        if self.stale:
            raise ConfigError(
                f"the statistics of the data set in {folder} are of {self.statistics.samples} "
                f"samples in {self.statistics.shards} shards, but now there are {self.samples} in "
                f"{len(self.shards)}; compute them again: "
                f"scaledtrain.data.compute_statistics({str(folder)!r}, ...)"
            )
        return self.statistics

    def to_json(self) -> str:
        """The text of the file: a shard on a line."""
        columns = {name: asdict(column) for name, column in self.columns.items()}
        shards = ",\n  ".join(json.dumps(_told(shard)) for shard in self.shards)
        statistics = compression = ""
        if self.statistics is not None:
            told = json.dumps(self.statistics.to_json(), allow_nan=False)
            statistics = f' "statistics": {told},\n'
        if self.compression is not None:
            compression = f' "compression": {json.dumps(self.compression)},\n'
        return (
            f'{{"format": "{FORMAT}", "version": {2 if compression else 1},\n'
            f' "columns": {json.dumps(columns)},\n{compression}'
            f' "complete": {json.dumps(self.complete)},\n'
            f"{statistics}"
            f' "shards": [\n  {shards}\n]}}\n'
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST) -> Manifest:
        """Read what ``to_json`` wrote.

        Raises:
            DataError: it is anything else; the message says what, and ``where``.
        """
        try:
            return cls._parse(load_json(text))
        except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{where} is no manifest of a data set that this version reads ({FORMAT} version 1 "
                f"to {VERSION}): {error}; write the data set again, or restore the file"
            ) from error

    @classmethod
    def _parse(cls, told: Any) -> Manifest:
        if not isinstance(told, dict):
            raise ConfigError(f"it holds a {type(told).__name__}")
        version = told.get("version")
        if told.get("format") != FORMAT or version not in range(1, VERSION + 1):
            raise ConfigError(f"format is {told.get('format')!r}, version {version!r}")
        keys = {"format", "version", "columns", "complete", "shards"}
        if told.keys() - {"statistics"} != keys | (
            {"compression"} if version == VERSION else set()
        ):
            raise ConfigError(f"its keys are {', '.join(sorted(told))}")
        columns = {
            name: Column(**{**told_of, "shape": tuple(told_of["shape"])})
            for name, told_of in told["columns"].items()
        }
        shards = tuple(ShardInfo(**told_of) for told_of in told["shards"])
        statistics = Statistics.from_json(told["statistics"]) if "statistics" in told else None
        return cls(columns, shards, told["complete"], statistics, told.get("compression"))

    @classmethod
    def load(cls, folder: Folder) -> Manifest:
        """The manifest of the data set in a folder.

        Raises:
            ConfigError: there is no data set.
            DataError: the file is damaged, or cannot be read.
        """
        path = f"{folder}/{MANIFEST}"
        try:
            text = folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                f"{folder} holds no data set: there is no {path}; give the folder that a "
                "ShardWriter wrote into"
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return cls.from_json(text, path)

    def save(self, folder: Folder) -> None:
        """Put this in place of the folder's manifest: whoever reads sees the old one or this."""
        folder.write(MANIFEST, [memoryview(self.to_json().encode())])


def _told(shard: ShardInfo) -> dict[str, Any]:
    told = asdict(shard)
    if shard.raw_bytes is None:
        del told["raw_bytes"]
    return told


def load_json(text: str | bytes) -> Any:
    """Parse JSON in which no key is repeated.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be any of ours.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is repeated")
    return found
