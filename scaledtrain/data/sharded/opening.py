"""The shards of a data set that a process has open."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.header import header_bytes
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.shard import Shard
from scaledtrain.data.sharded.storage import Folder, OpenFile
from scaledtrain.data.sharded.storage.retry import in_daemon
from scaledtrain.errors import ConfigError, DataError

__all__ = ["OpenShards"]

MAX_OPEN = 256  # shards at a time, beside those of a batch: each takes two file descriptors
MOST_FILES = 65_536  # of a process, as far as the system lets it


class OpenShards:
    """Opens shards when they are needed, and closes those that were not needed for longest.

    Any number of threads share it. A copy in another process opens its files anew.

    Args:
        folder: where they are.
        manifest: what they are.
        verify: check what is read against its checksums.
    """

    def __init__(self, folder: Folder, manifest: Manifest, verify: bool) -> None:
        self._folder = folder
        self._manifest = manifest
        self._verify = verify
        self._begin()

    def _begin(self) -> None:
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._checked: dict[int, dict[str, Array]] = {}
        self._ahead: tuple[int, Future[Shard]] | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def _begin_if_forked(self) -> None:
        if self._process != os.getpid():  # perhaps while a thread held the lock
            self._begin()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_open", "_checked", "_ahead", "_lock")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def get(self, number: int) -> Shard:
        """A shard, opened.

        Raises:
            DataError: it is damaged, or cannot be read.
            ConfigError: the process has too many files open.
        """
        self._begin_if_forked()
        ahead: Future[Shard] | None = None
        with self._lock:
            if self._ahead is not None and self._ahead[0] == number:
                ahead, self._ahead = self._ahead[1], None
            shard = self._usable(number)
            if shard is not None:
                self._open.move_to_end(number)
                shard.file.touch()
                return shard
        return self._open_now(number) if ahead is None else ahead.result()

    def _open_now(self, number: int) -> Shard:
        with self._lock:
            checked = self._checked.setdefault(number, {}) if self._verify else None
        shard = self._opened(number, checked)
        with self._lock:
            for other in [n for n, known in self._open.items() if known.file.is_evicted]:
                del self._open[other]  # else it would go on taking room in the cache
            self._open[number] = shard
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return shard

    def get_all(self, numbers: Sequence[int]) -> list[Shard | DataError]:
        """Several shards, or what is wrong with them; remote ones are fetched side by side."""
        self._begin_if_forked()
        jobs: dict[int, Future[Shard]] = {}
        if len(numbers) > 1:
            with self._lock:
                missing = [number for number in numbers if self._usable(number) is None]
            if self._folder.is_remote:
                jobs = {number: in_daemon(self.get, number) for number in missing}
            elif len(missing) > 1:
                for number in missing:
                    info = self._manifest.shards[number]
                    self._folder.expect(info.file, header_bytes(info.bytes))
        found: list[Shard | DataError] = []
        for number in numbers:
            try:
                found.append(jobs[number].result() if number in jobs else self.get(number))
            except DataError as error:
                found.append(error)
        return found

    def fetch_ahead(self, number: int) -> None:
        """Begin to fetch a remote shard that will be needed; what goes wrong is told then."""
        if not self._folder.is_remote or number >= len(self._manifest.shards):
            return
        self._begin_if_forked()
        with self._lock:
            if self._usable(number) is None:
                self._ahead = number, in_daemon(self._open_now, number)

    def _usable(self, number: int) -> Shard | None:
        shard = self._open.get(number)
        if shard is not None and shard.damage is not None and self._folder.is_remote:
            return None  # its copy was deleted: another may be good
        return shard

    def _opened(self, number: int, checked: dict[str, Array] | None) -> Shard:
        while True:
            try:
                return self._mapped(number, checked)
            except OSError as error:
                where = f"{self._folder}/{self._manifest.shards[number].file}"
                if error.errno != errno.EMFILE:
                    raise DataError(f"shard {where} cannot be read: {error}") from error
                if not _allow_more_files():
                    raise ConfigError(
                        f"shard {where} cannot be opened, since this process has too many files "
                        "open, two for each shard that a batch needs: raise their limit (ulimit "
                        "-n), write larger shards (scaledtrain data reshard), or mix fewer: "
                        'shuffle="block", a smaller buffer_bytes'
                    ) from error

    def _mapped(self, number: int, checked: dict[str, Array] | None) -> Shard:
        info, manifest = self._manifest.shards[number], self._manifest

        def make(file: OpenFile, checked: dict[str, Array] | None) -> Shard:
            return Shard(file, info, manifest.columns, checked, manifest.compression)

        def check(file: OpenFile) -> None:
            found: dict[str, Array] | None = None if checked is None else {}
            make(file, found).check_all()
            if checked is not None and found is not None:
                checked.update(found)

        return make(self._folder.open(info.file, info.bytes, info.checksum, check), checked)


def _allow_more_files() -> bool:
    """Raise this process's limit of open files, which is low for the sake of old programs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft >= most:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        return False
    return True
