"""Sharded data at a URL: read, written, resumed, and what a remote that fails does."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaledtrain import tasks
from scaledtrain.data import Remote, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.sharded.storage.retry import is_permanent
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import TOKENS, assert_is_sample, sample, shard, write
from tests.unit.test_sharded_writing import file_size_limit

QUICK = Remote(retries=3, timeout_seconds=0.3, total_seconds=5, backoff_seconds=0.01)
URL = "memory://bucket/ten"


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's store in memory, empty."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()


@pytest.fixture
def ten(memory: MemoryFileSystem) -> str:
    """Ten samples in shards of 4, 4 and 2."""
    write_to(URL, 10)
    return URL


def write_to(url: str, n: int, **options: Any) -> None:
    with ShardWriter(url, TOKENS, **{"shard_samples": 4, "remote": QUICK, **options}) as writer:
        for i in range(writer.samples_written, n):
            writer.write(sample(i))


def read(url: str, cache: Path, **options: Any) -> ShardedDataset:
    return ShardedDataset(url, cache=cache, **{"remote": QUICK, **options})


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.shard"))


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob(".*"))


class TestReading:
    def test_all_of_it_once(self, ten: str, tmp_path: Path) -> None:
        data = read(ten, tmp_path)
        for i, found in enumerate(data):
            assert_is_sample(found, i)
        assert i == 9
        assert data[[9, 0, 5]]["label"].tolist() == [9, 0, 5]
        assert data.view(6, "x").tolist() == [6, 6.5]
        assert len(copies(tmp_path)) == 3
        assert leftovers(tmp_path) == []

    def test_only_what_is_needed_is_fetched(self, ten: str, tmp_path: Path) -> None:
        data = read(ten, tmp_path)
        assert not tmp_path.exists() or copies(tmp_path) == []
        assert_is_sample(data[5], 5)
        assert len(copies(tmp_path)) == 1
        data[[0, 9]]
        assert len(copies(tmp_path)) == 3

    def test_copies_are_used_again(
        self, ten: str, tmp_path: Path, memory: MemoryFileSystem
    ) -> None:
        list(read(ten, tmp_path))
        for number in range(3):
            memory.rm(f"/bucket/ten/shard-0000{number}.safetensors")
        assert len(list(read(ten, tmp_path))) == 10

    def test_a_data_set_that_was_written_anew_is_not_read_from_old_copies(
        self, ten: str, tmp_path: Path
    ) -> None:
        assert read(ten, tmp_path)[0]["label"].item() == 0
        with ShardWriter(ten, TOKENS, shard_samples=4, overwrite=True) as writer:
            for i in range(10, 20):
                writer.write(sample(i))
        assert read(ten, tmp_path)[0]["label"].item() == 10

    def test_a_loader(self, ten: str, tmp_path: Path) -> None:
        write(tmp_path / "local", 10)
        options: dict[str, Any] = {"batch_size": 3, "block_bytes": 100, "buffer_bytes": 500}
        local = ShardedLoader(ShardedDataset(tmp_path / "local"), **options)
        remote = ShardedLoader(read(ten, tmp_path / "cache"), **options)
        expected = [batch["label"].tolist() for batch in local]
        assert [batch["label"].tolist() for batch in remote] == expected

    def test_other_processes_connect_by_themselves(self, ten: str, tmp_path: Path) -> None:
        data = read(ten, tmp_path)
        data[0]
        assert pickle.loads(pickle.dumps(data))[9]["label"].item() == 9
        child = os.fork()
        if not child:
            os._exit(0 if data[5]["label"].item() == 5 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_a_file_url_is_a_local_folder(self, tmp_path: Path) -> None:
        write_to(f"file://{tmp_path}/a%20set", 10)
        assert shard(tmp_path / "a set", 2).exists()
        data = ShardedDataset(f"file://{tmp_path}/a%20set", cache=tmp_path / "cache")
        assert_is_sample(data[7], 7)
        assert not (tmp_path / "cache").exists()

    def test_from_the_config(self, memory: MemoryFileSystem, tmp_path: Path) -> None:
        with ShardWriter("memory://xy") as writer:
            writer.write_batch({"x": [[1.0, 2.0], [3.0, 4.0]], "y": [0, 1]})
        task = tasks.sharded("memory://xy", n_classes=2, cache=str(tmp_path), cache_bytes="1MiB")
        inputs, targets = task.train[[1]]
        assert (inputs.tolist(), targets.tolist()) == ([[3.0, 4.0]], [1])
        assert len(str(task.facts["train_sha256"])) == 64

    def test_the_default_cache_is_the_users(
        self, ten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        ShardedDataset(ten)[0]
        assert len(copies(tmp_path / "scaledtrain" / "shards")) == 1

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: ShardedDataset("memory://nowhere"), "memory://nowhere holds no data set"),
            (lambda: ShardedDataset("gopher://x"), "gopher://x is no URL that fsspec knows"),
            (lambda: ShardedDataset(URL, cache_bytes="10 apples"), "cache_bytes of '10 apples'"),
            (lambda: ShardedDataset(URL, cache_bytes=0), "cache_bytes is 0"),
            (lambda: Remote(retries=-1), "retries is -1"),
            (lambda: Remote(timeout_seconds=0), "timeout_seconds is 0"),
        ],
    )
    def test_a_mistake_is_told(
        self, make: Callable[[], Any], told: str, memory: MemoryFileSystem
    ) -> None:
        with pytest.raises(ConfigError, match=told):
            make()

    @pytest.mark.parametrize(
        ("missing", "url", "told"),
        [
            ("fsspec", "memory://x", "pip install 'scaledtrain\\[remote\\]'"),
            ("s3fs", "s3://bucket/x", "s3://bucket/x cannot be read here: .*[sS]3"),
        ],
    )
    def test_a_package_that_is_not_installed(
        self, missing: str, url: str, told: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ConfigError, match=told):
            ShardedDataset(url)

    def test_a_local_folder_needs_no_fsspec(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "fsspec", None)
        assert_is_sample(ShardedDataset(write(tmp_path, 4))[0], 0)


class TestWriting:
    def test_resumes_and_overwrites(self, memory: MemoryFileSystem, tmp_path: Path) -> None:
        with (
            pytest.raises(RuntimeError, match="power"),
            ShardWriter(URL, TOKENS, shard_samples=4) as writer,
        ):
            for i in range(7):
                writer.write(sample(i))
            raise RuntimeError("power")
        memory.pipe_file("/bucket/ten/shard-00001.safetensors", b"that no manifest names yet")
        with pytest.raises(ConfigError, match=f"{URL} holds a data set already"):
            ShardWriter(URL)
        write_to(URL, 10, resume=True)
        assert [s["label"].item() for s in read(URL, tmp_path)] == list(range(10))
        write_to(URL, 4, overwrite=True)
        assert sorted(memory.ls("/bucket/ten", detail=False)) == [
            "/bucket/ten/manifest.json",
            "/bucket/ten/shard-00000.safetensors",
        ]

    def test_is_tried_again(
        self, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        fail_first(monkeypatch, "pipe_file", 2)
        write_to(URL, 10)
        assert len(list(read(URL, tmp_path))) == 10

    def test_a_failure_leaves_a_prefix(
        self, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with (
            pytest.raises(
                DataError, match="shard-00001.*: 4 of 4 attempts failed .* 4 samples before it"
            ),
            ShardWriter(URL, TOKENS, shard_samples=4, remote=QUICK) as writer,
        ):
            for i in range(4):
                writer.write(sample(i))
            fail_first(monkeypatch, "pipe_file", 100)
            for i in range(4, 8):
                writer.write(sample(i))
        with pytest.warns(UserWarning, match="these are its first 4 samples"):
            assert len(list(read(URL, tmp_path))) == 4

    def test_what_does_not_answer_is_not_tried_again(
        self, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        end = threading.Event()
        calls = []
        monkeypatch.setattr(
            MemoryFileSystem, "pipe_file", lambda *a, **o: (calls.append(a), end.wait(20))
        )
        brief = Remote(total_seconds=0.1)
        with pytest.raises(DataError, match="no answer within 0.1 s"):
            write_to(URL, 4, remote=brief)
        end.set()
        assert len(calls) == 1

    def test_where_nothing_can_be_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def cannot(*arguments: Any, **options: Any) -> None:
            raise NotImplementedError

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", cannot)
        with pytest.raises(ConfigError, match="fsspec cannot write to memory://bucket/ten"):
            write_to(URL, 4)


def fail_first(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[str]:
    """Let the first calls of a method of the store in memory fail; the calls are noted."""
    real = getattr(MemoryFileSystem, name)
    calls: list[str] = []

    def call(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        calls.append(path)
        if len(calls) <= times:
            raise ConnectionResetError(f"no. {len(calls)}")
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, name, call)
    return calls


class TestFaults:
    def test_two_failures_are_logged_and_the_third_attempt_works(
        self,
        ten: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        data = read(ten, tmp_path)
        calls = fail_first(monkeypatch, "get_file", 2)
        with caplog.at_level(logging.WARNING):
            assert_is_sample(data[5], 5)
        assert len(calls) == 3
        assert [record.getMessage().partition("; the")[0] for record in caplog.records] == [
            f"fetching shard {ten}/shard-00001.safetensors: attempt {n} of 4 failed with "
            f"ConnectionResetError: no. {n}"
            for n in (1, 2)
        ]

    def test_the_manifest_is_tried_again_too(
        self, ten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail_first(monkeypatch, "cat_file", 2)
        assert len(read(ten, tmp_path)) == 10

    def test_in_the_end_the_error_says_what_was_tried(
        self, ten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = fail_first(monkeypatch, "get_file", 100)
        told = f"fetching shard {ten}/shard-00002.safetensors: 4 of 4 attempts failed .* no. 4"
        with pytest.raises(DataError, match=told):
            read(ten, tmp_path)[9]
        assert len(calls) == 4
        assert leftovers(tmp_path) == []

    def test_total_time_is_limited(
        self, ten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pauses are at least half of 1, 2, 4, ... s: the first does not fit into 0.4 s."""
        calls = fail_first(monkeypatch, "get_file", 100)
        remote = Remote(retries=100, total_seconds=0.4, backoff_seconds=1)
        with pytest.raises(DataError, match="1 of 101 attempts failed within .* s \\(of 0.4 s\\)"):
            read(ten, tmp_path, remote=remote)[9]
        assert len(calls) == 1

    def test_what_hangs_is_given_up_and_what_it_does_later_has_no_effect(
        self, ten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = MemoryFileSystem.get_file
        woken, wrote = threading.Event(), threading.Event()
        calls: list[str] = []

        def get_file(self: Any, path: str, part: str, **options: Any) -> None:
            calls.append(part)
            if len(calls) > 1:
                return real(self, path, part, **options)
            with open(part, "wb") as file:
                file.write(b"half")
                file.flush()
                woken.wait(20)
                file.write(b"garbage")
            Path(part).write_bytes(b"by name")
            wrote.set()

        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        data = read(ten, tmp_path)
        assert_is_sample(data[0], 0)
        woken.set()
        assert wrote.wait(10)
        assert len(set(calls)) == 2
        assert_is_sample(read(ten, tmp_path)[3], 3)
        assert len(leftovers(tmp_path)) == 1
        data[9]  # whoever needs room next cleans up
        assert leftovers(tmp_path) == []

    def test_kill_9_in_the_middle_of_a_download(
        self, ten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def get_file(self: Any, path: str, part: str, **options: Any) -> None:
            Path(part).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if not child:
            monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
            read(ten, tmp_path)[0]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert [part.read_bytes() for part in leftovers(tmp_path)] == [b"half"]
        assert copies(tmp_path) == []
        assert_is_sample(read(ten, tmp_path)[0], 0)
        assert leftovers(tmp_path) == []
        assert len(copies(tmp_path)) == 1

    def test_a_missing_shard_is_not_tried_again(
        self, ten: str, tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory.rm("/bucket/ten/shard-00001.safetensors")
        calls = fail_first(monkeypatch, "get_file", 0)
        with pytest.raises(DataError, match=f"{ten}/shard-00001.safetensors cannot be read"):
            read(ten, tmp_path)[5]
        assert len(calls) == 1

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda content: content[:-5], "bytes instead of"),
            (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "were altered"),
            (lambda content: content[:40] + b"\0" + content[41:], "checksum that the manifest"),
            (lambda content: content * 1_000, "bytes instead of|more than the"),
            (lambda content: b"", "0 bytes instead of"),
        ],
        ids=["short", "data", "header", "long", "empty"],
    )
    def test_a_damaged_shard_is_fetched_twice_and_then_told_or_skipped(
        self,
        ten: str,
        tmp_path: Path,
        memory: MemoryFileSystem,
        monkeypatch: pytest.MonkeyPatch,
        damage: Callable[[bytes], bytes],
        told: str,
    ) -> None:
        path = "/bucket/ten/shard-00001.safetensors"
        memory.pipe_file(path, damage(memory.cat_file(path)))
        calls = fail_first(monkeypatch, "get_file", 0)
        with pytest.raises(DataError, match=f"shard-00001.safetensors: 2 of 2 attempts.*({told})"):
            read(ten, tmp_path)[5]
        assert calls == [path, path]
        data = read(ten, tmp_path, on_damage="skip")
        assert [s["label"].item() for s in data] == [0, 1, 2, 3, 8, 9]
        assert data.samples_skipped == 4
        assert len(copies(tmp_path)) == 2
        assert leftovers(tmp_path) == []

    def test_damage_on_the_way_heals(
        self, ten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls = MemoryFileSystem.get_file, []

        def get_file(self: Any, path: str, part: str, **options: Any) -> None:
            real(self, path, part, **options)
            calls.append(part)
            if len(calls) == 1:
                with open(part, "r+b") as file:
                    file.seek(-3, os.SEEK_END)
                    file.write(b"\xee")

        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        assert_is_sample(read(ten, tmp_path)[7], 7)
        assert len(calls) == 2

    def test_a_copy_that_was_altered_is_told_deleted_and_fetched_anew(
        self, ten: str, tmp_path: Path
    ) -> None:
        read(ten, tmp_path)[5]
        (copy,) = copies(tmp_path)
        content = copy.read_bytes()
        copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        data = read(ten, tmp_path)
        with pytest.raises(DataError, match=f"{ten}/shard-00001.safetensors is damaged"):
            data[7]
        assert_is_sample(data[7], 7)
        copy.write_bytes(content[:-1])  # cut off
        assert_is_sample(read(ten, tmp_path)[7], 7)

    def test_no_room_for_copies(self, memory: MemoryFileSystem, tmp_path: Path) -> None:
        with ShardWriter(URL) as writer:
            writer.write({"x": bytes(30_000)})
        data = read(URL, tmp_path)
        with (
            file_size_limit(10_000),
            pytest.raises(
                DataError, match=f"{URL}/shard-00000.* the cache {tmp_path}.*room in the cache"
            ),
        ):
            data[0]
        assert leftovers(tmp_path) == []
        assert copies(tmp_path) == []
        assert len(data[0]["x"]) == 30_000

    def test_what_is_permanent(self) -> None:
        assert is_permanent(FileNotFoundError())
        assert is_permanent(OSError(28, "No space left on device"))
        assert not is_permanent(ConnectionResetError(104, "reset"))
        assert not is_permanent(TimeoutError())


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; what `faults` has for a file happens first."""

    faults: list[str]
    release: threading.Event

    def do_GET(self) -> None:
        fault = self.faults.pop(0) if self.faults and "shard" in self.path else ""
        if fault == "error":
            self.send_error(503)
        elif fault == "hang":
            self.release.wait(20)
        elif fault == "half":
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:100])
        else:
            super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[Handler]]]:
    """The URL of ten samples, and the handler, which can be told what goes wrong."""
    write(tmp_path / "served", 10)
    handler = type("Faulty", (Handler,), {"faults": [], "release": threading.Event()})
    make = partial(handler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), make) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", handler
        handler.release.set()
        http.shutdown()
        thread.join()


class TestHttp:
    def test_all_of_it(self, server: tuple[str, type[Handler]], tmp_path: Path) -> None:
        data = read(server[0], tmp_path / "cache")
        for i, found in enumerate(data):
            assert_is_sample(found, i)
        with pytest.raises(ConfigError, match="holds no data set"):
            read(f"{server[0]}/nowhere", tmp_path / "cache")

    def test_errors_cuts_and_silence(
        self, server: tuple[str, type[Handler]], tmp_path: Path
    ) -> None:
        url, handler = server
        handler.faults[:] = ["error", "half", "hang"]
        assert_is_sample(read(url, tmp_path / "cache")[5], 5)
        assert handler.faults == []
        assert leftovers(tmp_path / "cache") == []
