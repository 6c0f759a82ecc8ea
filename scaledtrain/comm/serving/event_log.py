"""The order of events of an asynchronous run, on disk: with it the run can be made again.

A file begins with `MAGIC` and the moment at which it was begun, on the clock of the host; then come
records of 32 bytes, each with its own checksum. A record is
written at once and whole, so a run that is killed leaves a log that can be read up to its last
event; what a crash of the machine cuts in half is left out by the reader.
"""

from __future__ import annotations

import itertools
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scaledtrain.errors import ConfigError
from scaledtrain.server.operations import Kind, Operation

__all__ = ["MAGIC", "Event", "EventLog", "begun_at", "read_events"]

_logger = logging.getLogger(__name__)

MAGIC = b"scaledtrain events 1\n".ljust(24, b"\0")
_BEGIN = struct.Struct("<d")  # seconds on the clock of the spans of time of the same run
_RECORD = struct.Struct("<BBHiiqd")  # kind, accepted, unused, worker, staleness, version, seconds
_CHECKSUM = struct.Struct("<I")
_BYTES = _RECORD.size + _CHECKSUM.size
_KINDS = {int(kind) for kind in Kind}


class Event(NamedTuple):
    """What happened to the server, and when."""

    operation: Operation
    seconds: float
    """Since the log was begun."""
    accepted: bool = False
    """Whether a pushed gradient was used."""
    staleness: int = -1
    """Of a pushed gradient; -1 for other events."""


class EventLog:
    """Writes the events of one run; 32 bytes and one system call each.

    On a disk that is full the log ends, which is told: a log with a gap could not be made again.

    Args:
        path: a new file. One that is there, of an earlier part of a run that goes on, becomes
            ``events-1.bin``, or the next number that is free.
        now: the clock, in seconds.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.perf_counter) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                earlier = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))
                path.rename(next(name for name in earlier if not name.exists()))
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"the event log {path} cannot be written: {error}; choose another run_dir"
            ) from error
        self._now = now
        self._begin = now()
        self._write(MAGIC + _BEGIN.pack(self._begin))

    def add(self, operation: Operation, accepted: bool = False, staleness: int = -1) -> None:
        """Write one event down."""
        kind, worker, version = operation
        seconds = self._now() - self._begin
        record = _RECORD.pack(kind, accepted, 0, worker, staleness, version, seconds)
        self._write(record + _CHECKSUM.pack(zlib.crc32(record)))

    def _write(self, content: bytes) -> None:
        if self._file < 0:
            return
        try:
            written = os.write(self._file, content)
            if written < len(content):  # the reader leaves out what is cut off
                raise OSError(ENOSPC, os.strerror(ENOSPC))
        except OSError as error:
            _logger.warning("the event log ends here: %s; training goes on", error)
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_events(path: Path) -> Iterator[Event]:
    """The events of a log, in their order; a last one that was cut off is left out.

    Raises:
        ConfigError: the file is no event log, or one of its records is damaged.
    """
    with open(path, "rb") as file:
        _read_head(file, path)
        number = 0
        while len(record := file.read(_BYTES)) == _BYTES:
            number += 1
            yield _parse(record, f"event {number} of {path}")


def begun_at(path: Path) -> float:
    """When a log was begun: seconds on the clock that its rank's `Timeline` used, too.

    Raises:
        ConfigError: the file is no event log.
    """
    with open(path, "rb") as file:
        return _read_head(file, path)


def _read_head(file: BinaryIO, path: Path) -> float:
    head = file.read(len(MAGIC) + _BEGIN.size)
    if len(head) < len(MAGIC) + _BEGIN.size or not head.startswith(MAGIC):
        raise ConfigError(f"{path} is no event log of this version; it begins with other bytes")
    (begin,) = _BEGIN.unpack_from(head, len(MAGIC))
    return float(begin)


def _parse(record: bytes, which: str) -> Event:
    head, (checksum,) = record[: _RECORD.size], _CHECKSUM.unpack(record[_RECORD.size :])
    kind, accepted, _, worker, staleness, version, seconds = _RECORD.unpack(head)
    if zlib.crc32(head) != checksum or kind not in _KINDS:
        raise ConfigError(f"{which} is damaged (wrong checksum); nothing after it can be used")
    return Event(Operation(Kind(kind), worker, version), seconds, bool(accepted), staleness)
