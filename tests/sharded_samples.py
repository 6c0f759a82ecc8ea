"""A small sharded data set for tests: two numbers, some tokens and a label in each sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaledtrain.data import Column, ShardWriter

TOKENS = {"tokens": Column("uint16", ragged=True)}


def sample(i: int) -> dict[str, Any]:
    """Sample i: two numbers, i % 4 tokens, a label."""
    return {
        "x": np.array([i, i + 0.5], np.float32),
        "tokens": np.arange(i % 4, dtype=np.uint16) + i,
        "label": i,
    }


def write(folder: Path, n: int, **options: Any) -> Path:
    with ShardWriter(folder, TOKENS, **{"shard_samples": 4, **options}) as writer:
        for i in range(writer.samples_written, n):
            writer.write(sample(i))
    return folder


def shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def assert_is_sample(found: Mapping[str, torch.Tensor], i: int) -> None:
    expected = sample(i)
    assert found["x"].tolist() == expected["x"].tolist()
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    assert found["label"].item() == i


def damage(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
