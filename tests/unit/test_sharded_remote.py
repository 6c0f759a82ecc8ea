"""Sharded data at a URL: read, written, resumed."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaledtrain import tasks
from scaledtrain.data import Remote, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.commands import run
from scaledtrain.errors import ConfigError, DataError
from tests.remote_sets import QUICK, URL, copies, fail_first, leftovers, read, write_to
from tests.sharded_samples import TOKENS, assert_is_sample, sample, shard, write


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
            (lambda: ShardedDataset("gopher://x"), "gopher://x is no URL that fsspec can open"),
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
            writer.sync()
            fail_first(monkeypatch, "pipe_file", 100)
            for i in range(4, 8):
                writer.write(sample(i))
        assert writer.samples_written == 4
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


class TestLookedAt:
    def test_statistics_are_stored_at_the_url_and_all_is_checked(
        self, ten: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert run(["stats", ten, "--columns", "label"]) == 0
        computed = capsys.readouterr().out
        assert run(["inspect", ten]) == 0
        assert computed.strip() in capsys.readouterr().out
        assert run(["verify", ten]) == 0
        assert "0 of 3 shards damaged" in capsys.readouterr().out
