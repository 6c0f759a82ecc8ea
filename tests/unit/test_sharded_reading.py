"""Sharded data sets: what is written is read, whole or a part of it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch.utils.data import BatchSampler, DataLoader

from scaledtrain.data import Column, Ragged, ShardedDataset, ShardWriter
from scaledtrain.data.sharded import opening
from scaledtrain.data.sharded.crop import crop_ranges, normalise
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import assert_is_sample, damage, shard, write


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten samples in shards of 4, 4 and 2."""
    return write(tmp_path / "ten", 10)


class TestReading:
    def test_every_sample_by_index_and_by_iteration(self, ten: Path) -> None:
        data = ShardedDataset(ten)
        assert len(data) == 10
        assert [info.samples for info in data.manifest.shards] == [4, 4, 2]
        for i, found in enumerate(data):
            assert_is_sample(found, i)
            assert_is_sample(data[i], i)
            assert_is_sample(data[i - 10], i)
        for outside in (10, -11):
            with pytest.raises(IndexError):
                data[outside]
            with pytest.raises(IndexError):
                data[[0, outside]]

    def test_a_batch_has_the_order_that_was_asked_for(self, ten: Path) -> None:
        batch = ShardedDataset(ten)[[9, 0, 7, 0, -7]]
        assert batch["label"].tolist() == [9, 0, 7, 0, 3]
        assert batch["x"].tolist() == [[9, 9.5], [0, 0.5], [7, 7.5], [0, 0.5], [3, 3.5]]
        # Lengths i % 4: 1, 0, 3, 0, 3.
        assert batch["tokens"].offsets.tolist() == [0, 1, 1, 4, 4, 7]
        assert batch["tokens"].values.tolist() == [9, 7, 8, 9, 3, 4, 5]
        assert [t.tolist() for t in batch["tokens"].unbind()] == [[9], [], [7, 8, 9], [], [3, 4, 5]]

    def test_slices_arrays_and_tensors_are_batches_too(self, ten: Path) -> None:
        data = ShardedDataset(ten, ["label"])
        assert data[3:9:2]["label"].tolist() == [3, 5, 7]
        assert data[::-3]["label"].tolist() == [9, 6, 3, 0]
        assert data[np.array([5, 1])]["label"].tolist() == [5, 1]
        assert data[torch.tensor([5, 1])]["label"].tolist() == [5, 1]
        assert data[[]]["label"].shape == (0,)
        with pytest.raises(ConfigError, match="shape \\[2\\] and dtype float64"):
            data[[0.5, 1.0]]

    def test_columns_can_be_chosen_and_be_tuples(self, ten: Path) -> None:
        data = ShardedDataset(ten, ["label", "x"], as_tuple=True)
        label, x = data[6]
        assert (label.item(), x.tolist()) == (6, [6, 6.5])
        labels, _ = data[[2, 1]]
        assert labels.tolist() == [2, 1]
        with pytest.raises(ConfigError, match="no column 'y', only x, tokens, label"):
            ShardedDataset(ten, ["y"])

    def test_tensors_may_be_written_to_and_views_may_not(self, ten: Path) -> None:
        data = ShardedDataset(ten)
        data[5]["x"].zero_()
        data[[5]]["x"].zero_()
        assert_is_sample(data[5], 5)
        view = data.view(5, "x")
        assert view.tolist() == [5, 5.5]
        assert np.shares_memory(view, data.view(5, "x")), "no copy"
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_a_data_loader(self, ten: Path, workers: int) -> None:
        data = ShardedDataset(ten, ["x", "label"], as_tuple=True)
        data[0]  # a shard is open when the workers begin
        loader: DataLoader[Any] = DataLoader(data, batch_size=4, num_workers=workers)
        assert [labels.tolist() for _, labels in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        whole = ShardedDataset(ten)  # with its ragged column, in an order of its own
        batches = BatchSampler([9, 3, 4, 0, 8, 8], 4, drop_last=False)
        loader = DataLoader(whole, sampler=batches, batch_size=None, num_workers=workers)
        for batch, expected in zip(loader, [[9, 3, 4, 0], [8, 8]], strict=True):
            assert batch["label"].tolist() == expected
            for row, i in enumerate(expected):
                tokens = batch["tokens"].unbind()[row]
                assert_is_sample(
                    {"x": batch["x"][row], "tokens": tokens, "label": batch["label"][row]}, i
                )

    def test_pickled_it_opens_its_files_anew(self, ten: Path) -> None:
        data = ShardedDataset(ten)
        data[0]
        copy = pickle.loads(pickle.dumps(data))
        assert_is_sample(copy[9], 9)

    def test_forked_while_a_thread_held_the_lock(self, ten: Path) -> None:
        data = ShardedDataset(ten)
        with data._lock:
            child = os.fork()
            if not child:
                os._exit(0 if data[9]["label"].item() == 9 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_more_shards_than_may_be_open(self, ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(opening, "MAX_OPEN", 1)
        data = ShardedDataset(ten)
        view = data.view(0, "x")
        for i in (9, 0, 5, 9):
            assert_is_sample(data[i], i)
        assert view.tolist() == [0, 0.5]  # of a shard that was closed since

    def test_safetensors_reads_a_shard(self, ten: Path) -> None:
        tensors = load_file(shard(ten, 1))  # samples 4 to 7, with 0, 1, 2 and 3 tokens
        assert tensors["label"].tolist() == [4, 5, 6, 7]
        assert tensors["tokens"].tolist() == [5, 6, 7, 7, 8, 9]
        assert tensors["tokens.offsets"].tolist() == [0, 0, 1, 3, 6]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "uint8", "bool", "int8"])
    def test_dtypes(self, tmp_path: Path, dtype: str) -> None:
        values = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).to(getattr(torch, dtype))
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"x": values})
        data = ShardedDataset(tmp_path)
        assert data.columns == {"x": Column(dtype, (2,))}
        assert data[[1, 0]]["x"].dtype == values.dtype
        assert torch.equal(data[[1, 0]]["x"], values[[1, 0]])
        assert torch.equal(data[1]["x"], values[1])

    def test_large_rows_and_long_runs(self, tmp_path: Path) -> None:
        """Each way of copying: of runs, of large rows, of small rows; ragged ones, too."""
        large = torch.arange(24 * 1500).view(24, 1500)  # 12,000 bytes a sample
        with ShardWriter(tmp_path, {"r": Column("int64", ragged=True)}, shard_samples=20) as writer:
            writer.write_batch({"large": large, "small": large[:, 0], "r": list(large)})
        data = ShardedDataset(tmp_path)
        for order in (list(range(24)), [*range(10, 22), *range(9)], [3, 21, 1, 8], [23, 2, 1, 0]):
            batch = data[order]
            assert torch.equal(batch["large"], large[order])
            assert torch.equal(batch["small"], large[order, 0])
            assert torch.equal(batch["r"].values.view(-1, 1500), large[order])


class TestCrops:
    def test_a_part_of_a_sample(self, tmp_path: Path) -> None:
        volumes = torch.arange(2 * 4 * 5 * 6).view(2, 4, 5, 6)
        with ShardWriter(tmp_path, {"t": Column("int64", (5,), ragged=True)}) as writer:
            for volume in volumes:
                writer.write({"v": volume, "t": volume[:, :, 0]})
        data = ShardedDataset(tmp_path)
        crop = (slice(1, 3), slice(None), slice(2, 6, 2))
        assert torch.equal(data.read(1, "v", crop), volumes[1][crop])
        assert torch.equal(data.read(-1, "v", (2, slice(4, 1, -1))), volumes[1][2].flip(0)[:3])
        assert torch.equal(data.read(1, "t", slice(1, 3)), volumes[1, 1:3, :, 0])
        assert data.read(0, "v", (slice(0), 0)).shape == (0, 6)
        assert torch.equal(data.read(0, "v"), volumes[0])
        with pytest.raises(ConfigError, match="a slice or an index"):
            data.read(0, "v", (0, 0, 0, 0))
        with pytest.raises(IndexError):
            data.read(0, "v", 4)

    @given(st.data())
    def test_ranges_are_the_bytes_of_the_crop(self, data: st.DataObject) -> None:
        shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
        parts = normalise([data.draw(st.integers(-n, n - 1) | st.slices(n)) for n in shape], shape)
        array = np.arange(int(np.prod(shape))).reshape(shape)
        wanted = set(np.asarray(array[parts]).reshape(-1).tolist())
        starts, stops = crop_ranges(parts, shape, 1)
        ranges = [range(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
        covered = {byte for r in ranges for byte in r}
        assert wanted <= covered <= set(range(array.size))
        if all(isinstance(p, int) or p.step in (None, 1) for p in parts):
            assert wanted == covered

    def test_the_rest_is_not_read(self, tmp_path: Path) -> None:
        """8 planes of 64 KiB: damage in plane 5 does not matter to a crop of planes 1 and 2."""
        with ShardWriter(tmp_path) as writer:
            writer.write({"v": np.zeros((8, 65_536), np.uint8)})
        damage(shard(tmp_path, 0), -65_536 * 2 - 9)
        data = ShardedDataset(tmp_path)
        assert data.read(0, "v", (slice(1, 3), slice(5))).tolist() == [[0] * 5] * 2
        with pytest.raises(DataError, match="altered"):
            data.read(0, "v", slice(4, 6))


def test_count_of_a_ragged_batch() -> None:
    from scaledtrain.data.cut import count_samples

    ragged = Ragged(torch.zeros(7), torch.tensor([0, 3, 7]))
    assert count_samples(ragged) == 2
    assert count_samples({"tokens": ragged}) == 2
    assert count_samples((ragged, torch.zeros(2))) == 2
