"""Copies of remote files in a local folder, of limited size, shared by the processes of a host."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from scaledtrain.errors import ConfigError

__all__ = ["Cache", "default_folder", "mark_used"]

_LOCKS = 64  # files to lock: of copies that share one, one is fetched at a time
_POLL_SECONDS = 0.05
_COPY = re.compile(r"([0-9a-f]{32})\.shard\Z")
_PART = re.compile(r"\.([0-9a-f]{32})\.(\d{1,18})\.[0-9a-f]{8}\.part\Z")


def default_folder() -> Path:
    """Of the user's cache, which the environment may place elsewhere."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "scaledtrain" / "shards"


def mark_used(file: int) -> None:
    """Note the time in an open copy, for the choice of those to delete."""
    with suppress(PermissionError):  # another user's
        os.utime(file)


class Cache:
    """A folder of copies. When there is no room for another, those unused for longest go.

    Any number of processes and threads share it. Each copy is fetched once: whoever fetches it
    holds a lock of the system, which ends with the process, however it ends. A copy gets its name
    when all of it is there; what a process that was killed has left is deleted by the next one that
    needs room. A copy that is deleted while it is mapped stays readable there.

    Args:
        folder: is made when it is needed; other files in it are left alone.
        limit_bytes: of all copies in it, those that are being fetched included. Copies that were
            deleted while they are mapped are not counted; the system frees them when they are
            closed.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise ConfigError(f"cache_bytes is {limit_bytes}; it is >= 1")
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._room = folder / "lock-room"  # whoever counts what there is, or changes it

    def path(self, url: str, n_bytes: int, checksum: str) -> Path:
        """Where the copy of a file is, if there is one: its content decides, too."""
        key = hashlib.sha256(f"{url}\n{n_bytes}\n{checksum}".encode()).hexdigest()[:32]
        return self.folder / f"{key}.shard"

    def find(self, path: Path, n_bytes: int) -> int | None:
        """Open a copy; None if there is none."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != n_bytes:  # someone has cut it
            os.close(file)
            path.unlink(missing_ok=True)
            return None
        mark_used(file)
        return file

    def fetch(self, path: Path, n_bytes: int, fill: Callable[[Path], None], deadline: float) -> int:
        """Open a copy; if there is none, make it.

        Args:
            path: of the copy, see ``path``.
            n_bytes: its size.
            fill: writes a file of that size at the path it is given.
            deadline: of the waits for other processes, by the monotonic clock.

        Returns:
            A file descriptor, which stays good whatever happens to the copy.

        Raises:
            ConfigError: the copy is larger than the cache.
            TimeoutError: another process held a lock, or all the room, until the deadline.
            OSError: it cannot be made; nothing is left of it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock_of(path.stem)
        with self._locked(lock, deadline):
            file = self.find(path, n_bytes)
            if file is not None:  # the one who held the lock has made it
                return file
            part = self._reserve(path.stem, n_bytes, lock, deadline)
            try:
                fill(part)
                file = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(file)
                    with self._locked(self._room, deadline):  # or it might be counted as neither
                        os.replace(part, path)
                except BaseException:
                    os.close(file)
                    raise
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return file

    def _lock_of(self, key: str) -> Path:
        return self.folder / f"lock-{int(key[:8], 16) % _LOCKS:02d}"

    @contextmanager
    def _locked(self, file: Path, deadline: float) -> Iterator[None]:
        while (handle := _try_lock(file)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"another process has held {file}, which it does while it fetches a shard, for "
                    "too long (fuser tells which process)"
                )
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            _unlock(handle)

    def _reserve(self, key: str, n_bytes: int, mine: Path, deadline: float) -> Path:
        """Make room; the empty file that is returned counts as one of its full size."""
        if n_bytes > self.limit_bytes:
            raise ConfigError(
                f"a shard of {n_bytes} bytes does not go into a cache of {self.limit_bytes}; give "
                "a larger cache_bytes"
            )
        while True:
            with self._locked(self._room, deadline):
                if self._make_room(n_bytes, mine):
                    name = f".{key}.{n_bytes}.{secrets.token_hex(4)}.part"
                    part = self.folder / name
                    part.touch(exist_ok=False)
                    return part
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"other downloads took all {self.limit_bytes} bytes of the cache in "
                    f"{self.folder} for too long; give a larger cache_bytes"
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, n_bytes: int, mine: Path) -> bool:
        copies, taken = self._scan(mine)
        excess = taken + n_bytes - self.limit_bytes
        for copy in sorted(copies):
            if excess <= 0:
                break
            copy.path.unlink(missing_ok=True)
            excess -= copy.n_bytes
        return excess <= 0

    def _scan(self, mine: Path) -> tuple[list[_Copy], int]:
        """The copies, and what they and the downloads that are under way take."""
        copies: list[_Copy] = []
        taken = 0
        for entry in list(os.scandir(self.folder)):
            path = Path(entry.path)
            if part := _PART.match(entry.name):
                lock = self._lock_of(part[1])
                if lock == mine or _is_free(lock):  # whoever was at it has died
                    path.unlink(missing_ok=True)
                else:
                    taken += int(part[2])
            elif _COPY.match(entry.name):
                with suppress(FileNotFoundError):
                    told = entry.stat()
                    copies.append(_Copy(told.st_mtime_ns, told.st_size, path))
                    taken += told.st_size
        return copies, taken


class _Copy(NamedTuple):
    used_ns: int
    n_bytes: int
    path: Path


def _try_lock(file: Path) -> int | None:
    """Lock a file, for `_unlock` or the end of the process; None: another one has it."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _is_free(lock: Path) -> bool:
    handle = _try_lock(lock)
    if handle is None:
        return False
    _unlock(handle)
    return True


def _unlock(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was forked meanwhile has the handle, too
    os.close(handle)
