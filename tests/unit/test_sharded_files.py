"""Sharded data sets: what is written is read, a crash leaves a prefix, damage is told by name."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from scaledtrain.data import Column, Ragged, ShardedDataset, ShardWriter
from scaledtrain.data.sharded import dataset as dataset_module
from scaledtrain.data.sharded.crop import crop_ranges, normalise
from scaledtrain.data.sharded.header import build_header, parse_header
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.errors import ConfigError, DataError

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
        batches = BatchSampler(SequentialSampler(data), 4, drop_last=True)
        loader = DataLoader(data, sampler=batches, batch_size=None, num_workers=workers)
        assert [labels.tolist() for _, labels in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]

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
        monkeypatch.setattr(dataset_module, "MAX_OPEN", 1)
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


class TestWriting:
    def test_shards_are_full_by_bytes(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path, shard_bytes=100) as writer:
            writer.write_batch({"x": np.zeros((30, 2))})  # 16 bytes each: 7 of them are 112
        assert [s.samples for s in ShardedDataset(tmp_path).manifest.shards] == [7, 7, 7, 7, 2]

    def test_batches_and_samples_write_the_same(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path / "batches", TOKENS, shard_samples=4) as writer:
            for low, high in ((0, 3), (3, 3), (3, 10)):
                samples = [sample(i) for i in range(low, high)]
                writer.write_batch(
                    {
                        "x": np.array([s["x"] for s in samples], np.float32).reshape(-1, 2),
                        "tokens": [s["tokens"] for s in samples],
                        "label": range(low, high),
                    }
                )
        write(tmp_path / "samples", 10)
        data = ShardedDataset(tmp_path / "samples")
        with ShardWriter(tmp_path / "copy", shard_samples=4) as writer:
            writer.write_batch(data[:])  # as it is read, with a Ragged
        assert data.manifest.shards == ShardedDataset(tmp_path / "copy").manifest.shards
        names = sorted(os.listdir(tmp_path / "samples"))
        assert names == sorted(os.listdir(tmp_path / "batches"))
        for name in names:
            one, other = (tmp_path / kind / name for kind in ("samples", "batches"))
            assert one.read_bytes() == other.read_bytes()

    def test_columns_are_those_of_the_first_sample(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write({"image": b"\xff\xd8\xff", "y": 3, "z": [1.5, 2.0]})
            writer.write({"image": b"", "y": True, "z": [1, 2]})
            for wrong, told in (
                ({"image": b"", "y": 3}, "sample 2 has the columns image, y, but"),
                ({"image": b"", "y": 3, "z": [1.0]}, "'z' got a value of shape \\[1\\], but its"),
                ({"image": b"", "y": [3], "z": [1.0, 2.0]}, "'y' got a value of shape \\[1\\]"),
                ({"image": b"", "y": 3.5, "z": [1.0, 2.0]}, "'y' is int64, but got .* float64"),
                ({"image": "a.jpg", "y": 3, "z": [1.0, 2.0]}, "text.encode\\(\\) is bytes"),
            ):
                with pytest.raises(ConfigError, match=told):
                    writer.write(wrong)
        data = ShardedDataset(tmp_path)
        assert data.columns["image"] == Column("uint8", ragged=True)
        assert bytes(data[0]["image"].numpy()) == b"\xff\xd8\xff"
        assert data[1]["z"].tolist() == [1.0, 2.0]

    def test_python_numbers_take_the_dtype_that_was_declared_if_they_fit(
        self, tmp_path: Path
    ) -> None:
        with ShardWriter(tmp_path, {"x": Column("uint8"), "y": Column("float32")}) as writer:
            writer.write({"x": 255, "y": 0.1})
            with pytest.raises(ConfigError, match="'x' is uint8"):
                writer.write({"x": 256, "y": 0})
            with pytest.raises(ConfigError, match="'y' is float32"):
                writer.write({"x": 0, "y": np.array(0.1)})
        assert ShardedDataset(tmp_path)[0]["x"].item() == 255

    def test_there_can_be_no_samples(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path):
            pass
        data = ShardedDataset(tmp_path)
        assert len(data) == 0
        assert list(data) == []

    def test_nothing_is_overwritten_unless_told(self, ten: Path) -> None:
        with pytest.raises(ConfigError, match="holds a data set already"):
            ShardWriter(ten)
        write(ten, 5, overwrite=True)
        assert sorted(os.listdir(ten)) == ["manifest.json", *(shard(ten, i).name for i in (0, 1))]
        assert [s["label"].item() for s in ShardedDataset(ten)] == [0, 1, 2, 3, 4]

    def test_one_writer_at_a_time(self, ten: Path) -> None:
        with (
            ShardWriter(ten, resume=True),
            pytest.raises(ConfigError, match="another ShardWriter is at work"),
        ):
            ShardWriter(ten, resume=True)
        write(ten, 12, resume=True)

    def test_a_finished_set_can_be_added_to(self, ten: Path) -> None:
        write(ten, 13, resume=True)
        data = ShardedDataset(ten)
        assert [s.samples for s in data.manifest.shards] == [4, 4, 2, 3]
        for i in range(13):
            assert_is_sample(data[i], i)
        with pytest.raises(ConfigError, match="'x' was declared as"):
            ShardWriter(ten, {"x": Column("int8")}, resume=True)


class TestCrashes:
    def test_an_error_leaves_the_whole_shards_and_writing_goes_on(self, tmp_path: Path) -> None:
        with (
            pytest.raises(RuntimeError, match="power"),
            ShardWriter(tmp_path, TOKENS, shard_samples=4) as writer,
        ):
            for i in range(7):
                writer.write(sample(i))
            raise RuntimeError("power")
        with pytest.warns(UserWarning, match="not finished: these are its first 4 samples"):
            assert len(ShardedDataset(tmp_path)) == 4
        with ShardWriter(tmp_path, shard_samples=4, resume=True) as writer:
            assert writer.samples_written == 4
        write(tmp_path, 10, resume=True)
        assert [s["label"].item() for s in ShardedDataset(tmp_path)] == list(range(10))

    def test_kill_9_leaves_a_readable_prefix_and_no_lock(self, tmp_path: Path) -> None:
        child = os.fork()
        if not child:
            try:
                writer = ShardWriter(tmp_path, shard_samples=3)
                writer.write_batch({"label": range(8)})
                (tmp_path / ".shard-00002.safetensors.unfinished").write_bytes(b"half")
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with pytest.warns(UserWarning, match="not finished"):
            data = ShardedDataset(tmp_path)
        assert data[:]["label"].tolist() == [0, 1, 2, 3, 4, 5]
        with ShardWriter(tmp_path, shard_samples=3, resume=True) as writer:
            writer.write_batch({"label": range(writer.samples_written, 8)})
        assert min(os.listdir(tmp_path)) == "manifest.json", "no half file is left"
        assert ShardedDataset(tmp_path)[:]["label"].tolist() == list(range(8))

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """No file may have more than 10,000 bytes: the second shard, of 16,000, has no room."""
        with (
            pytest.raises(DataError, match="shard-00001.* the 1 samples before .* resume=True"),
            file_size_limit(10_000),
            ShardWriter(tmp_path, {"x": Column("uint8", ragged=True)}, shard_samples=1) as writer,
        ):
            writer.write({"x": bytes(1_000)})
            writer.write({"x": bytes(16_000)})
        with pytest.raises(ConfigError, match="is closed, by you or by an error"):
            writer.write({"x": bytes(10)})  # else there would be a gap
        assert sorted(os.listdir(tmp_path)) == ["manifest.json", shard(tmp_path, 0).name]
        with ShardWriter(tmp_path, resume=True) as writer:
            writer.write({"x": bytes(16_000)})
        assert [len(s["x"]) for s in ShardedDataset(tmp_path)] == [1_000, 16_000]


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def damage(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


class TestDamage:
    @pytest.mark.parametrize(
        ("do", "told"),
        [
            (lambda file: file.unlink(), "cannot be read"),
            (lambda file: os.truncate(file, 300), "300 bytes instead of"),
            (lambda file: os.truncate(file, 0), "0 bytes instead of"),
            (lambda file: damage(file, -1), "were altered"),
            (lambda file: damage(file, 30), "the checksum that the manifest tells"),
            (lambda file: damage(file, 6), "header would be .* bytes long"),
            (lambda file: file.write_bytes(shard(file.parent, 2).read_bytes()), "instead of"),
        ],
        ids=["missing", "short", "empty", "data", "header", "length", "another"],
    )
    def test_is_told_by_name_or_skipped(self, ten: Path, do: Any, told: str) -> None:
        do(shard(ten, 1))
        data = ShardedDataset(ten)
        assert data[[0, 9]]["label"].tolist() == [0, 9]
        for read in (lambda: data[[0, 5]], lambda: [data[i] for i in range(4, 8)]):
            with pytest.raises(DataError, match=f"shard-00001.safetensors.*{told}"):
                read()
        data = ShardedDataset(ten, on_damage="skip")
        assert [s["label"].item() for s in data] == [0, 1, 2, 3, 8, 9]
        assert data[[5, 9, 6, 0]]["label"].tolist() == [9, 0]
        assert len(data) == 10
        assert list(data.damaged) == ["shard-00001.safetensors"]
        assert data.samples_skipped == 4 + 2

    def test_unverified_data_is_read_as_it_is(self, ten: Path) -> None:
        damage(shard(ten, 1), -1)
        assert len(list(ShardedDataset(ten, verify=False))) == 10

    def test_what_was_checked_is_not_checked_again(self, ten: Path) -> None:
        data = ShardedDataset(ten)
        data[5]
        with shard(ten, 1).open("r+b") as file:  # in place: the mapping sees it
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        data[5]
        with pytest.raises(DataError):
            ShardedDataset(ten)[[4, 5, 6, 7]]

    @pytest.mark.parametrize(
        ("edit", "told"),
        [
            (lambda m: m["shards"][0].update(samples=5), "shard-00000"),
            (lambda m: m["shards"][0].update(samples=-1), "manifest.json.*samples -1"),
            (lambda m: m["shards"][0].update(file="../x"), "no name in the folder"),
            (lambda m: m["shards"][0].update(file="/etc/passwd"), "no name in the folder"),
            (lambda m: m["shards"][0].update(bytes=10**30), "bytes 10000"),
            (lambda m: m["shards"][1].update(file=m["shards"][0]["file"]), "named twice"),
            (lambda m: m["columns"]["x"].update(shape=[3]), "shard-00000"),
            (lambda m: m["columns"]["x"].update(shape=[2**40, 2**40]), "no sample has that many"),
            (lambda m: m["columns"]["x"].update(dtype="float64"), "shard-00000"),
            (lambda m: m["columns"]["x"].update(dtype="complex7"), "dtype is 'complex7'"),
            (lambda m: m["columns"].pop("x"), "shard-00000"),
            (lambda m: m.update(version=2), "version 2"),
            (lambda m: m.update(shards={}), "manifest.json"),
            (lambda m: m.clear(), "manifest.json"),
        ],
    )
    def test_a_manifest_that_lies(self, ten: Path, edit: Any, told: str) -> None:
        manifest = json.loads((ten / "manifest.json").read_text())
        edit(manifest)
        (ten / "manifest.json").write_text(json.dumps(manifest))
        for verify in (True, False):
            if told == "manifest.json" and "shards" in manifest:  # an empty mapping is no list
                assert len(ShardedDataset(ten)) == 0
                continue
            with pytest.raises(DataError, match=told):
                ShardedDataset(ten, verify=verify)[:]

    def test_offsets_that_lie_outside_the_values(self, tmp_path: Path) -> None:
        write(tmp_path, 4)
        file = shard(tmp_path, 0)
        content = file.read_bytes()
        offsets = np.array([0, 0, 1, 3, 6]).tobytes()
        assert content.count(offsets) == 1
        for lie in ([0, 0, 1, 3, 7], [0, -1, 1, 3, 6], [0, 2, 1, 3, 6], [0, 0, 2**62, 3, 6]):
            file.write_bytes(content.replace(offsets, np.array(lie).tobytes()))
            with pytest.raises(DataError, match="'tokens' lie outside"):
                ShardedDataset(tmp_path, verify=False)[:]

    def test_no_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds no data set"):
            ShardedDataset(tmp_path / "nowhere")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
COLUMNS = {"x": Column("float32", (2,)), "t": Column("uint8", ragged=True)}


def a_header() -> bytes:
    """Of 3 samples, with 5 elements of ``t``."""
    return build_header(
        {
            "t.offsets": ("I64", (4,), memoryview(bytes(32))),
            "x": ("F32", (3, 2), memoryview(bytes(24))),
            "t": ("U8", (5,), memoryview(bytes(5))),
        }
    )


class TestFuzz:
    """Whatever the bytes are: an error of ours, or tensors inside the file that do not overlap."""

    def parse(self, header: bytes, size: int) -> None:
        try:
            tensors = parse_header(header, size, COLUMNS, 3)
        except ValueError:
            return
        places = sorted((t.start, t.start + t.nbytes) for t in tensors.values())
        assert places[0][0] == len(header)
        assert places[-1][1] == size
        assert all(a[1] == b[0] for a, b in pairwise(places))

    def test_a_header_is_read(self) -> None:
        header = a_header()
        tensors = parse_header(header, len(header) + 61, COLUMNS, 3)
        assert {name: t.start - len(header) for name, t in tensors.items()} == {
            "t.offsets": 0,
            "x": 32,
            "t": 56,
        }
        assert len(header) % 64 == 0

    @given(st.binary(max_size=200), st.integers(0, 2**63))
    def test_any_bytes(self, content: bytes, size: int) -> None:
        self.parse(content, size)
        self.parse(len(content).to_bytes(8, "little") + content, size)

    @given(st.data())
    @settings(max_examples=150)
    def test_a_changed_header(self, data: st.DataObject) -> None:
        likely = st.sampled_from([0, 5, 24, 32, 56, 61, 2**61, "F32", "U8"])
        told = json.loads(a_header()[8:])
        for _ in range(data.draw(st.integers(1, 3))):
            place: Any = told
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = data.draw(st.sampled_from(keys))
                inner = place[key]
                if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
                    break
                place = inner
            place[key] = data.draw(JSON | likely)
        text = json.dumps(told).encode()
        header = len(text).to_bytes(8, "little") + text
        self.parse(header, len(header) + data.draw(st.sampled_from([61, 0, 5, 2**62])))

    @given(st.data())
    def test_a_changed_manifest(self, data: st.DataObject) -> None:
        told: Any = {
            "format": "scaledtrain-shards",
            "version": 1,
            "columns": {"x": {"dtype": "float32", "shape": [2], "ragged": False}},
            "complete": True,
            "shards": [{"file": "shard-0", "samples": 3, "bytes": 9, "checksum": "0" * 16}],
        }
        assert Manifest.from_json(json.dumps(told)).samples == 3
        parts = [told, told["columns"], told["columns"]["x"], told["shards"][0]]
        part = data.draw(st.sampled_from(parts))
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
        with suppress(DataError):
            assert Manifest.from_json(json.dumps(told)).samples >= 0

    @given(st.binary(max_size=60))
    def test_any_bytes_as_a_manifest(self, content: bytes) -> None:
        with pytest.raises(DataError):
            Manifest.from_json(content)

    def test_deep_nesting(self) -> None:
        with pytest.raises(DataError, match="nested"):
            Manifest.from_json("[" * 100_000)
        with pytest.raises(ValueError, match="nested"):
            parse_header((10**5).to_bytes(8, "little") + b"[" * 10**5, 10**6, COLUMNS, 3)


def test_count_of_a_ragged_batch() -> None:
    from scaledtrain.data.replica_loader import count_samples

    ragged = Ragged(torch.zeros(7), torch.tensor([0, 3, 7]))
    assert count_samples(ragged) == 2
    assert count_samples({"tokens": ragged}) == 2
    assert count_samples((ragged, torch.zeros(2))) == 2
