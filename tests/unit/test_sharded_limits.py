"""Sharded data where the process reaches a limit of the system, or was forked."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from scaledtrain.data import Remote, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.sharded.storage import open_folder
from scaledtrain.errors import ConfigError, DataError
from tests.remote_sets import memory, read, write_to  # noqa: F401 - a fixture
from tests.sharded_samples import shard, write

SHARDS = 100


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A sample in each of many shards."""
    with ShardWriter(tmp_path / "many", shard_samples=1) as writer:
        writer.write_batch({"x": np.arange(SHARDS)})
    return tmp_path / "many"


@pytest.fixture
def few_files() -> Iterator[int]:
    """The process may have some more files open, but not two for each shard."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + SHARDS
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_batch_of_many_shards_raises_the_limit_of_open_files(many: Path, few_files: int) -> None:
    batch = ShardedDataset(many)[list(range(SHARDS))]
    assert batch["x"].tolist() == list(range(SHARDS))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few_files


def test_too_many_open_files_are_no_damage_that_is_skipped(
    many: Path, few_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("not allowed to raise maximum limit")

    with monkeypatch.context() as patch:
        patch.setattr(resource, "setrlimit", refuse)
        data = ShardedDataset(many, on_damage="skip")
        with pytest.raises(ConfigError, match=r"too many files open.*ulimit -n.*reshard"):
            data[list(range(SHARDS))]
        assert data.damaged == {}


def test_a_lack_of_memory_is_told_though_damage_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ShardedDataset(write(tmp_path / "zipped", 4, compression="zstd"), on_damage="skip")

    def empty(*_: Any) -> None:
        raise MemoryError

    numpy = SimpleNamespace(empty=empty, uint8=np.uint8)
    monkeypatch.setattr("scaledtrain.data.sharded.unpack.np", numpy)
    with pytest.raises(DataError, match="there is no memory; write smaller shards"):
        data.gather(np.arange(4))


def test_a_process_that_was_forked_in_an_iteration_begins_its_own(many: Path) -> None:
    loader = ShardedLoader(ShardedDataset(many), 4, shuffle="none", timeout_seconds=10)
    iteration = iter(loader)
    next(iteration)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(
        target=lambda: sender.send([int(x) for batch in loader for x in batch["x"]])
    )
    process.start()
    sender.close()
    assert receiver.poll(30)
    assert receiver.recv() == list(range(SHARDS))
    process.join()
    receiver.close()
    assert sum(len(batch["x"]) for batch in iteration) == SHARDS - 4


def test_the_time_of_a_download_begins_with_its_turn(
    memory: MemoryFileSystem,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_to("memory://bucket/slow", 10, shard_samples=1)
    real = MemoryFileSystem.get_file

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.1)
        real(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    monkeypatch.setattr("scaledtrain.data.sharded.storage.remote._DOWNLOADS", 1)
    # One after the other the ten take a second, more than each may.
    remote = Remote(retries=0, total_seconds=0.7)
    data = read("memory://bucket/slow", tmp_path, remote=remote)
    assert data[list(range(10))]["label"].tolist() == list(range(10))


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(many: Path) -> None:
    shard(many, 1).unlink()
    os.mkfifo(shard(many, 1))
    with pytest.raises(DataError, match="0 bytes instead of"):
        ShardedDataset(many)[1]


def test_a_file_url_of_another_host_is_refused() -> None:
    assert str(open_folder("file://localhost/data")) == "/data"
    with pytest.raises(ConfigError, match="names a host, 'data'; .*file:///"):
        open_folder("file://data/set")
    with pytest.raises(ConfigError, match="no URL that fsspec can open: .*No such file"):
        open_folder("zip://inside::not-there.zip")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.array(1.0), "a single value .*write one sample with write"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "no array: .*Float8"),
        (torch.zeros(3, 2).to_sparse(), "no array: .*to_dense"),
    ],
)
def test_values_that_are_no_batch_are_refused(tmp_path: Path, values: Any, told: str) -> None:
    with ShardWriter(tmp_path / "odd") as writer, pytest.raises(ConfigError, match=told):
        writer.write_batch({"x": values})
