"""Sharded data at a URL that fails, hangs, or gives something else than was written."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaledtrain.data import Remote, ShardWriter
from scaledtrain.data.sharded.storage.retry import is_permanent
from scaledtrain.errors import ConfigError, DataError
from tests.remote_sets import URL, copies, fail_first, leftovers, read
from tests.sharded_samples import assert_is_sample, write
from tests.unit.test_sharded_writing import file_size_limit


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
