"""What a data set needs of the place where its files lie."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scaledtrain.data.sharded.storage.cache import mark_used

__all__ = ["Begun", "Folder", "OpenFile"]


@dataclass(frozen=True)
class OpenFile:
    """A shard's file, opened to be mapped; whoever has it closes ``handle``.

    Args:
        handle: its file descriptor.
        name: path or URL, for messages.
        cached: the path of a remote file's copy; None: it is the file itself.
    """

    handle: int
    name: str
    cached: Path | None = None

    def touch(self) -> None:
        """Say that the file is in use, so that its cache keeps it."""
        if self.cached is not None:
            mark_used(self.handle)

    def discard(self) -> None:
        """Delete the copy, which turned out to be damaged: it is fetched anew when needed."""
        if self.cached is not None:
            with suppress(OSError):
                self.cached.unlink()

    @property
    def is_evicted(self) -> bool:
        """Whether the copy has lost its name, and only takes room as long as it is open."""
        return self.cached is not None and not os.fstat(self.handle).st_nlink


class Begun(Protocol):
    """A file of a folder that was begun."""

    size: int
    """In bytes."""

    def finish(self) -> None:
        """Make it be there: as a whole or, if this raises, not at all.

        Raises:
            OSError: it cannot be written; nothing is left of it.
            DataError: the same, after all attempts.
        """

    def discard(self) -> None:
        """Leave nothing of it."""


class Folder(ABC):
    """A flat folder of files, each of which is there as a whole or not at all.

    Names are of files of the folder. ``str(folder)`` is its path or URL, for messages.
    """

    is_remote: bool
    """Whether opening a file may mean to fetch it."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
            DataError: it cannot be read, after all attempts.
        """

    def expect(self, name: str, n_bytes: int) -> None:  # noqa: B027
        """Say that a file will be opened, and so many bytes of its beginning read."""

    @abstractmethod
    def open(
        self, name: str, n_bytes: int, checksum: str, check: Callable[[OpenFile], None]
    ) -> OpenFile:
        """Open a shard's file.

        Args:
            name: of the file.
            n_bytes: its size, as the manifest says.
            checksum: with URL and size, what a copy of it is known by.
            check: raises DataError if a copy that was just fetched is not what it should be, and
                closes it.

        Raises:
            OSError: it cannot be opened.
            DataError: it cannot be fetched, after all attempts; the message names it.
        """

    @abstractmethod
    def lock(self) -> Callable[[], None]:
        """Make the folder, and keep other writers out of it; call what is returned to let them in.

        Raises:
            ConfigError: another one is at work, or there can be no such folder.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """The files that there are."""

    @abstractmethod
    def begin(self, name: str, parts: Iterable[memoryview]) -> Begun:
        """Begin to write a file: when this returns, the parts are not needed any more.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """

    def write(self, name: str, parts: Iterable[memoryview]) -> None:
        """Write a file; a crash at any moment leaves the old one, or none, or the new one.

        Raises:
            OSError: it cannot be written; nothing is left of it.
            DataError: the same, after all attempts.
        """
        self.begin(name, parts).finish()

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete files; when this returns, they stay deleted."""
