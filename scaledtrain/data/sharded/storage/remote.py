"""A data set at a URL that fsspec knows: s3, gs, http, memory, ..."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from scaledtrain.data.sharded.storage.cache import Cache
from scaledtrain.data.sharded.storage.folder import Folder, OpenFile
from scaledtrain.data.sharded.storage.retry import (
    Remote,
    UnansweredError,
    in_daemon,
    is_permanent,
)
from scaledtrain.errors import ConfigError, DataError

__all__ = ["RemoteFolder"]

_DOWNLOADS = 8  # at a time, of one data set in one process
_LOOK_SECONDS = 0.1  # how often it is looked at how far a download has come


class RemoteFolder(Folder):
    """A folder whose shards are copied into a cache, and mapped there.

    Args:
        url: of the folder.
        remote: how it is reached.
        cache: where the copies go.

    Raises:
        ConfigError: the URL needs a package that is not installed, or is of no kind that is known.
    """

    is_remote = True

    def __init__(self, url: str, remote: Remote, cache: Cache) -> None:
        self.url = url.rstrip("/")
        self._remote = remote
        self._cache = cache
        self._connect()

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_remote": self._remote, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def _connect(self) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ConfigError(
                f"{self.url} is a URL, which is read through fsspec, which is not installed here: "
                "pip install 'scaledtrain[remote]'"
            ) from error
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url, **self._remote.options)
        except ImportError as error:  # it says which package
            raise ConfigError(f"{self.url} cannot be read here: {error}") from error
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.url} is no URL that fsspec can open: {error}") from error
        self._downloads = threading.BoundedSemaphore(_DOWNLOADS)
        self._process = os.getpid()

    def _place(self, name: str) -> tuple[Any, str]:
        if self._process != os.getpid():  # its connections are the parent's
            self._connect()
        return self._fs, f"{self._root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """The whole file, however often it has to be tried."""
        fs, path = self._place(name)
        read: bytes = self._remote.persist(
            f"reading {self.url}/{name}",
            lambda deadline: self._remote.within_timeout(fs.cat_file, path),
        )
        return read

    def open(
        self, name: str, n_bytes: int, checksum: str, check: Callable[[OpenFile], None]
    ) -> OpenFile:
        """A copy in the cache, which is fetched if there is none."""
        place = self._place(name)
        url = f"{self.url}/{name}"
        copy = self._cache.path(url, n_bytes, checksum)

        def fill(part: Path, deadline: float) -> None:
            self._download(*place, part, n_bytes, deadline)
            check(OpenFile(os.open(part, os.O_RDONLY | os.O_CLOEXEC), url))

        def attempt(deadline: float) -> int:
            return self._cache.fetch(copy, n_bytes, lambda part: fill(part, deadline), deadline)

        try:
            handle = self._cache.find(copy, n_bytes)
            if handle is None:
                with self._downloads:  # each of which ends, and its time begins with its turn
                    handle = self._remote.persist(f"fetching shard {url}", attempt)
        except OSError as error:
            too_many_open = error.errno == errno.EMFILE
            if isinstance(error, FileNotFoundError) or too_many_open or not is_permanent(error):
                raise
            raise DataError(
                f"shard {url} cannot be copied into the cache {self._cache.folder}: {error}; see "
                "that it may be read, and that there is room in the cache, or give another cache, "
                "or fewer cache_bytes"
            ) from error
        return OpenFile(handle, url, copy)

    def _download(self, fs: Any, path: str, part: Path, n_bytes: int, deadline: float) -> None:
        """Copy a file; given up when it stands still, or is longer than it may be."""
        # Of this attempt alone: should it be given up and come to life again, it writes there.
        job = in_daemon(fs.get_file, path, str(part))
        size, came = 0, time.monotonic()
        while not wait([job], _LOOK_SECONDS).done:
            now, before = time.monotonic(), size
            with suppress(FileNotFoundError):
                size = part.stat().st_size
            if size > n_bytes:
                raise DataError(f"it has more than the {n_bytes} bytes that the manifest tells")
            if size != before:
                came = now
            if now > min(deadline, came + self._remote.timeout_seconds):
                raise TimeoutError(f"stood still after {size} of {n_bytes} bytes")
        job.result()

    def lock(self) -> Callable[[], None]:
        """Keeps nobody out: such stores have no locks."""
        return lambda: None

    def names(self) -> list[str]:
        """What a fresh listing has; none where there is no such folder."""
        fs, root = self._place("")

        def look(deadline: float) -> list[str]:
            fs.invalidate_cache()
            try:
                found = self._remote.within_timeout(lambda: fs.ls(root, detail=False))
            except FileNotFoundError:
                return []
            return [path.rstrip("/").rpartition("/")[2] for path in found]

        return self._remote.persist(f"listing {self.url}", look)

    def begin(self, name: str, parts: Iterable[memoryview]) -> _Upload:
        """Copy the parts, to write the object in one request, where the store has such."""
        return _Upload(self, name, b"".join(parts))

    def upload(self, name: str, content: bytes) -> None:
        """Write an object.

        What does not answer is not tried again: it could still arrive, and replace a later one.
        """
        fs, path = self._place(name)

        def attempt(deadline: float) -> None:
            job = in_daemon(fs.pipe_file, path, content)
            if not wait([job], deadline - time.monotonic()).done:
                raise UnansweredError(f"no answer within {self._remote.total_seconds:g} s")
            job.result()

        try:
            self._remote.persist(f"writing {self.url}/{name}", attempt)
        except NotImplementedError as error:
            raise ConfigError(
                f"fsspec cannot write to {self.url}; write to a folder, and copy that there"
            ) from error

    def delete(self, names: Iterable[str]) -> None:
        """Delete those objects that are there."""
        for name in names:
            with suppress(FileNotFoundError):
                self._delete(name)

    def _delete(self, name: str) -> None:
        fs, path = self._place(name)
        self._remote.persist(
            f"deleting {self.url}/{name}",
            lambda deadline: self._remote.within_timeout(fs.rm_file, path),
        )


class _Upload:
    def __init__(self, folder: RemoteFolder, name: str, content: bytes) -> None:
        self._folder, self._name, self._content = folder, name, content
        self.size = len(content)

    def finish(self) -> None:
        self._folder.upload(self._name, self._content)

    def discard(self) -> None:
        """Nothing of it is there before it is finished."""
