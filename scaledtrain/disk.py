"""Small files and names that are on the disk, whole, when a function returns."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["replace_file", "sync_folder"]


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file, also in place of one that is there: it is the old one or the new one."""
    new = path.with_name(f".new-{path.name}")
    new.unlink(missing_ok=True)  # of one that was killed
    try:
        with new.open("xb", buffering=0) as file:
            rest = memoryview(content)
            while rest:  # a raw file may take less than it is given
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What was made, renamed or removed in a folder is so on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
