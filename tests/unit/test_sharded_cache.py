"""The cache of remote shards: its limit, what goes first, and many processes at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaledtrain.data import Remote, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.sharded.storage.cache import Cache
from scaledtrain.errors import ConfigError, DataError

KB = 1_000


def fill(part: Path) -> None:
    part.write_bytes(bytes(KB))


def never(part: Path) -> None:
    raise AssertionError("it is there already")


def later() -> float:
    return time.monotonic() + 10


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if not path.name.startswith("lock-")}


def add(cache: Cache, number: int) -> Path:
    """A copy of 1 kB, last used at that second."""
    path = cache.path(f"memory://x/{number}", KB, "0" * 16)
    os.close(cache.fetch(path, KB, fill, later()))
    os.utime(path, (number, number))
    return path


class TestCache:
    def test_what_was_not_used_for_longest_goes(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path, 3 * KB)
        one, two, three = (add(cache, number) for number in (1, 2, 3))
        handle = cache.find(one, KB)  # used now
        assert handle is not None
        os.close(handle)
        four = add(cache, 4)
        assert names(cache) == {one.name, three.name, four.name}
        assert cache.find(two, KB) is None

    def test_a_copy_is_known_by_url_size_and_checksum(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path, KB)
        assert cache.path("a", 1, "0") == cache.path("a", 1, "0")
        others = {cache.path(*key) for key in [("a", 1, "0"), ("b", 1, "0"), ("a", 2, "0")]}
        assert len(others | {cache.path("a", 1, "1")}) == 4

    def test_other_files_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_bytes(bytes(5 * KB))
        (tmp_path / ".hidden.part").write_bytes(bytes(5 * KB))
        cache = Cache(tmp_path, KB)
        add(cache, 1)
        two = add(cache, 2)
        assert names(cache) == {"thesis.tex", ".hidden.part", two.name}

    def test_what_is_larger_than_the_cache(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="1000 bytes does not go into a cache of 999"):
            add(Cache(tmp_path, KB - 1), 1)

    def test_a_failure_leaves_nothing(self, tmp_path: Path) -> None:
        def fail(part: Path) -> None:
            part.write_bytes(b"half")
            raise ConnectionError

        cache = Cache(tmp_path, KB)
        with pytest.raises(ConnectionError):
            cache.fetch(cache.path("x", KB, "0"), KB, fail, later())
        assert names(cache) == set()

    def test_several_that_need_one_fetch_it_once(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path, 10 * KB)
        path = cache.path("x", KB, "0")
        calls = []

        def slowly(part: Path) -> None:
            calls.append(part)
            time.sleep(0.1)
            fill(part)

        def fetch() -> None:
            os.close(cache.fetch(path, KB, slowly, later()))

        threads = [threading.Thread(target=fetch) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1

    def test_a_wait_ends_and_tells_for_what(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path, KB)
        one, other = (cache.path(str(i), KB, "0") for i in (1, 2))

        def while_it_fetches(part: Path) -> None:
            with pytest.raises(TimeoutError, match="lock-.., which it does while it fetches"):
                cache.fetch(one, KB, never, time.monotonic())
            with pytest.raises(TimeoutError, match="other downloads took all 1000 bytes"):
                cache.fetch(other, KB, never, time.monotonic())
            fill(part)

        os.close(cache.fetch(one, KB, while_it_fetches, later()))

    def test_a_process_that_was_killed_leaves_no_lock_and_takes_no_room(
        self, tmp_path: Path
    ) -> None:
        cache = Cache(tmp_path, KB)

        def die(part: Path) -> None:
            part.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if not child:
            cache.fetch(cache.path("memory://x/1", KB, "0" * 16), KB, die, later())
        os.waitpid(child, 0)
        assert len(names(cache)) == 1
        two = add(cache, 2)
        assert names(cache) == {two.name}
        assert names(cache) != {add(cache, 1).name}

    def test_a_lock_does_not_go_to_a_process_that_was_forked_meanwhile(
        self, tmp_path: Path
    ) -> None:
        cache = Cache(tmp_path, 2 * KB)
        children = []

        def fork(part: Path) -> None:
            children.append(os.fork())
            if not children[-1]:
                signal.pause()
            fill(part)

        path = cache.path("memory://x/1", KB, "0" * 16)
        os.close(cache.fetch(path, KB, fork, later()))
        path.unlink()
        os.close(cache.fetch(path, KB, fill, time.monotonic() + 1))
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


N, SHARD_BYTES = 30, 4_000  # a sample is a shard of some 4 kB


@pytest.fixture
def url() -> Iterator[str]:
    store = fsspec.filesystem("memory")
    with ShardWriter("memory://cached", shard_samples=1) as writer:
        for i in range(N):
            writer.write({"i": i, "x": [i] * 450})
    yield "memory://cached"
    store.store.clear()


class TestDataset:
    def test_a_cache_that_is_smaller_than_the_data(self, url: str, tmp_path: Path) -> None:
        data = ShardedDataset(url, cache=tmp_path, cache_bytes=3 * SHARD_BYTES + 500)
        loader = ShardedLoader(data, batch_size=5, block_bytes=1, buffer_bytes=20_000)
        found = [i for batch in loader for i in batch["i"].tolist()]
        assert sorted(found) == list(range(N))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * SHARD_BYTES + 500

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at /proc")
    def test_what_was_evicted_is_closed_but_stays_readable_where_it_is_used(
        self, url: str, tmp_path: Path
    ) -> None:
        data = ShardedDataset(url, cache=tmp_path, cache_bytes=2 * SHARD_BYTES)
        view = data.view(0, "x")
        for i in range(1, 10):
            assert data[i]["i"].item() == i
        assert len(deleted_but_open(tmp_path)) == 1, "that of the view, and none of the others"
        assert view.tolist() == [0] * 450
        assert data[0]["i"].item() == 0

    def test_processes_that_share_a_small_cache(self, url: str, tmp_path: Path) -> None:
        def run(seed: int) -> bool:
            data = ShardedDataset(url, cache=tmp_path, cache_bytes=4 * SHARD_BYTES)
            loader = ShardedLoader(data, batch_size=4, shuffle="full", seed=seed)
            found = [(i, x) for b in loader for i, x in zip(b["i"].tolist(), b["x"], strict=True)]
            right = all(x.tolist() == [i] * 450 for i, x in found)
            return right and sorted(i for i, _ in found) == list(range(N))

        children = []
        for seed in range(3):
            child = os.fork()
            if not child:
                code = 1
                try:
                    code = 0 if run(seed) else 2
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0, 0]
        assert not list(tmp_path.glob(".*"))

    def test_shards_of_a_batch_are_fetched_side_by_side(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        meet = threading.Barrier(4, timeout=10)  # passed only if four are there at once
        real = MemoryFileSystem.get_file

        def get_file(self: Any, *arguments: Any, **options: Any) -> None:
            meet.wait()
            real(self, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        data = ShardedDataset(url, cache=tmp_path, remote=Remote(retries=0))
        assert data[[3, 12, 7, 0]]["i"].tolist() == [3, 12, 7, 0]

    def test_iteration_fetches_the_next_shard_ahead(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = threading.Event()
        real = MemoryFileSystem.get_file

        def get_file(self: Any, path: str, *arguments: Any, **options: Any) -> None:
            if path.endswith("shard-00001.safetensors"):
                asked.set()
            real(self, path, *arguments, **options)

        with ShardWriter("memory://two", shard_samples=100) as writer:
            writer.write_batch({"i": range(200)})
        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        iterator = iter(ShardedDataset("memory://two", cache=tmp_path))
        assert next(iterator)["i"].item() == 0
        assert asked.wait(10)
        assert [sample["i"].item() for sample in iterator] == list(range(1, 200))

    def test_a_dead_remote_is_told_once_per_shard_when_skipped(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def get_file(self: Any, path: str, *arguments: Any, **options: Any) -> None:
            calls.append(path)
            raise ConnectionError

        data = ShardedDataset(
            url, cache=tmp_path, on_damage="skip", remote=Remote(retries=1, backoff_seconds=0.01)
        )
        assert data[[0]]["i"].tolist() == [0]
        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        assert data[[0, 1, 2, 3]]["i"].tolist() == [0]
        assert len(calls) == 6  # two attempts for each of three
        assert len(data.damaged) == 3
        with pytest.raises(DataError, match="shard-00004.safetensors: 2 of 2 attempts failed"):
            data[4]


def deleted_but_open(folder: Path) -> set[str]:
    maps = Path("/proc/self/maps").read_text()
    return {
        line.split()[5] for line in maps.splitlines() if str(folder) in line and "deleted" in line
    }
