"""Writing sharded data sets: what is refused, and what a crash leaves."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from scaledtrain.data import Column, ShardedDataset, ShardWriter
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import TOKENS, assert_is_sample, sample, shard, write


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten samples in shards of 4, 4 and 2."""
    return write(tmp_path / "ten", 10)


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

    def test_a_forked_process_does_not_keep_the_folder(self, ten: Path) -> None:
        writer = ShardWriter(ten, resume=True)
        reader, hold = os.pipe()
        begun, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(hold)
                os.write(tell, b"1")
                with pytest.raises(ConfigError, match="is closed"):
                    writer.write(sample(10))
                os.read(reader, 1)  # until the parent closes it
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(reader)
        os.read(begun, 1)
        writer.close()
        write(ten, 12, resume=True)
        for end in (hold, begun, tell):
            os.close(end)
        assert os.waitpid(child, 0)[1] == 0

    def test_a_finished_set_can_be_added_to(self, ten: Path) -> None:
        write(ten, 13, resume=True)
        data = ShardedDataset(ten)
        assert [s.samples for s in data.manifest.shards] == [4, 4, 2, 3]
        for i in range(13):
            assert_is_sample(data[i], i)
        with pytest.raises(ConfigError, match="'x' was declared as"):
            ShardWriter(ten, {"x": Column("int8")}, resume=True)


class TestCrashes:
    def test_a_file_that_no_manifest_names_is_not_deleted_unasked(self, tmp_path: Path) -> None:
        other = tmp_path / "shard-00007.safetensors"
        other.write_bytes(b"of somebody else")
        with pytest.raises(ConfigError, match=r"shard-00007\.safetensors, which no manifest names"):
            ShardWriter(tmp_path)
        # A crash can have left only the first one.
        shard(tmp_path, 0).write_bytes(b"of a crash")
        write(tmp_path, 4, resume=True)
        assert len(ShardedDataset(tmp_path)) == 4
        assert other.read_bytes() == b"of somebody else"
        write(tmp_path, 4, overwrite=True)
        assert not other.exists()

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
                writer.sync()
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

    def test_what_the_disk_does_not_take_is_told_with_the_next_shard(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The third file, after a shard and a manifest, is the second shard's."""
        synced: list[int] = []

        def fsync(file: int, real: Callable[[int], None] = os.fsync) -> None:
            if stat.S_ISREG(os.fstat(file).st_mode):  # and no folder
                synced.append(file)
                if len(synced) == 3:
                    raise OSError(errno.EIO, "bad block")
            real(file)

        monkeypatch.setattr(os, "fsync", fsync)
        writer = ShardWriter(tmp_path, TOKENS, shard_samples=2)
        for i in range(5):
            writer.write(sample(i))
        with pytest.raises(DataError, match="shard-00001.*bad block; the 2 samples before it"):
            writer.write(sample(5))
        assert writer.samples_written == 2
        assert sorted(os.listdir(tmp_path)) == ["manifest.json", shard(tmp_path, 0).name]
        write(tmp_path, 7, resume=True)
        assert [s["label"].item() for s in ShardedDataset(tmp_path)] == list(range(7))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
