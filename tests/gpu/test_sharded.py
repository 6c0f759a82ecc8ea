"""Sharded data on their way to a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaledtrain.data import Column, Mixture, ShardedDataset, ShardedLoader, ShardWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_batches_are_pinned_and_arrive_whole(tmp_path: Path) -> None:
    """bfloat16 too, which NumPy does not have; every sample once, though memory is used again."""
    with ShardWriter(tmp_path, shard_samples=100) as writer:
        writer.write_batch({"i": range(1_000), "x": torch.arange(1_000).bfloat16()[:, None]})
    loader = ShardedLoader(ShardedDataset(tmp_path), 8, block_bytes=100, buffer_bytes=1_000)
    seen = []
    for batch in loader:
        assert batch["i"].is_pinned()
        assert batch["x"].is_pinned()
        i, x = (batch[name].to("cuda", non_blocking=True) for name in ("i", "x"))
        assert torch.equal(x[:, 0], i.bfloat16())
        seen.append(i)
    assert torch.equal(torch.cat(seen).sort().values.cpu(), torch.arange(1_000))


def test_mixed_and_padded_batches_are_pinned_too(tmp_path: Path) -> None:
    columns = {"tokens": Column("int32", ragged=True)}
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name, columns, shard_samples=100) as writer:
            for i in range(300):
                writer.write({"i": i, "tokens": [i] * (i % 7)})
    mixture = Mixture([(ShardedDataset(tmp_path / name), 1) for name in ("a", "b")])
    loader = ShardedLoader(mixture, 8, bucket_by="tokens", pad={"tokens": -1}, buffer_bytes=10_000)
    seen = []
    for batch in loader:
        assert batch["i"].is_pinned()
        assert batch["tokens"].is_pinned() or not batch["tokens"].numel()
        i, tokens = (batch[name].to("cuda", non_blocking=True) for name in ("i", "tokens"))
        lengths = i % 7
        assert torch.equal((tokens != -1).sum(1), lengths)
        assert torch.equal(tokens.clamp(min=0).sum(1), i * lengths)
        seen.append(i)
    assert torch.equal(torch.cat(seen).bincount().cpu(), torch.full((300,), 2))
