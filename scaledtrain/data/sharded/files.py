"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["sync_folder", "write_whole"]


def write_whole(path: Path, parts: Iterable[memoryview]) -> int:
    """Write a file such that a crash at any moment leaves the old one, or none, or the new one.

    Args:
        path: of the file; until it is whole it is called ``.<name>.unfinished``.
        parts: one after the other, of bytes.

    Returns:
        Its size; when this returns, file and name are on the disk.

    Raises:
        OSError: the disk is full, or something else is wrong with it; nothing is left.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb", buffering=0) as file:
            for left in parts:
                while left:  # the system may take only some of it at a time
                    left = left[file.write(left) :]
            size = file.tell()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    sync_folder(path.parent)
    return size


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
