"""A data set in a folder of this host, or of a file system that is mounted here."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from scaledtrain.data.sharded.files import Unfinished
from scaledtrain.data.sharded.storage.folder import Folder, OpenFile
from scaledtrain.disk import sync_folder
from scaledtrain.errors import ConfigError

__all__ = ["LocalFolder"]

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # nobody waits for a pipe's other end


class LocalFolder(Folder):
    """A folder whose files are mapped where they are.

    Args:
        path: of the folder.
    """

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        """The whole file, where it lies."""
        return (self.path / name).read_bytes()

    def expect(self, name: str, n_bytes: int) -> None:
        """Ask the kernel to read them in the background."""
        if not hasattr(os, "posix_fadvise"):  # macOS has none
            return
        with suppress(OSError):  # whoever opens it is told
            file = os.open(self.path / name, _FLAGS)
            try:
                os.posix_fadvise(file, 0, n_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def open(
        self, name: str, n_bytes: int, checksum: str, check: Callable[[OpenFile], None]
    ) -> OpenFile:
        """A file of the folder itself."""
        path = self.path / name
        return OpenFile(os.open(path, _FLAGS), str(path))

    def lock(self) -> Callable[[], None]:
        """A lock of the system, which ends with the process."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"no data set can be written to {self.path}: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(
                f"another ShardWriter is at work in {self.path}, or compute_statistics; let it "
                "end, or give another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        return lambda: os.close(lock)

    def names(self) -> list[str]:
        """All names, also hidden ones."""
        return os.listdir(self.path)

    def begin(self, name: str, parts: Iterable[memoryview]) -> Unfinished:
        """Under another name until it is on the disk."""
        return Unfinished(self.path / name, parts)

    def delete(self, names: Iterable[str]) -> None:
        """And wait until that is on the disk."""
        for name in names:
            (self.path / name).unlink()
        sync_folder(self.path)
