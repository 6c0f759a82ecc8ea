"""Sharded data at a URL, for tests: a store in memory, and what fails there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaledtrain.data import Remote, ShardedDataset, ShardWriter
from tests.sharded_samples import TOKENS, sample

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
