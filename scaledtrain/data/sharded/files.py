"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from scaledtrain.disk import sync_folder

__all__ = ["Unfinished", "write_whole"]


class Unfinished:
    """A file that is written, but is not there yet under its name, nor for certain on the disk.

    Args:
        path: that it will have; until then it is called ``.<name>.unfinished``.
        parts: one after the other, of bytes.

    Attributes:
        size: in bytes.

    Raises:
        OSError: the disk is full, or something else is wrong with it; nothing is left.
    """

    def __init__(self, path: Path, parts: Iterable[memoryview]) -> None:
        self._path = path
        self._unfinished = path.with_name(f".{path.name}.unfinished")
        self._file = open(self._unfinished, "wb", buffering=0)  # noqa: SIM115 closed by either end
        try:
            for left in parts:
                while left:  # the system may take only some of it at a time
                    left = left[self._file.write(left) :]
            self.size = self._file.tell()
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Wait until it is on the disk, and give it its name.

        Raises:
            OSError: it does not get there; nothing is left.
        """
        try:
            os.fsync(self._file.fileno())
            os.replace(self._unfinished, self._path)
        except BaseException:
            self.discard()
            raise
        self._file.close()
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Delete it."""
        self._file.close()
        with suppress(OSError):
            self._unfinished.unlink()


def write_whole(path: Path, parts: Iterable[memoryview]) -> int:
    """Write a file such that a crash at any moment leaves the old one, or none, or the new one.

    Args:
        path: of the file.
        parts: one after the other, of bytes.

    Returns:
        Its size; when this returns, file and name are on the disk.

    Raises:
        OSError: the disk is full, or something else is wrong with it; nothing is left.
    """
    file = Unfinished(path, parts)
    file.finish()
    return file.size
