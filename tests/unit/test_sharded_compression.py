"""Compressed sharded data: the same samples, in smaller files, and what damage does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledtrain.data import Column, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.sharded.compression import Compressor, Decompressor, parse_blocks
from scaledtrain.data.sharded.header import build_header, parse_header
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import assert_is_sample, damage, shard, write
from tests.unit.test_sharded_damage import JSON

BLOCK = 65_536


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten samples in shards of 4, 4 and 2."""
    return write(tmp_path / "ten", 10, compression="zstd")


def volume(i: int) -> Any:
    """200 kB, of which 48 bytes are repeated."""
    return np.arange(i, i + 12, dtype=np.float32).repeat(4_167).reshape(4, 3, 4_167)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Three samples of 200 kB, and of as many random bytes, in one shard."""
    noise = np.random.default_rng(1).integers(0, 256, (3, 200_000), np.uint8)
    with ShardWriter(tmp_path / "volumes", compression="zstd", level=1) as writer:
        for i in range(3):
            writer.write({"scan": volume(i), "noise": noise[i], "bits": torch.ones(3).bfloat16()})
    return tmp_path / "volumes"


class TestReading:
    def test_the_samples_are_those_that_were_written(self, ten: Path) -> None:
        data = ShardedDataset(ten)
        for i, found in enumerate(data):
            assert_is_sample(found, i)
            assert_is_sample(data[i], i)
        batch = data[[7, 0, 3]]
        assert batch["label"].tolist() == [7, 0, 3]
        assert [t.tolist() for t in batch["tokens"].unbind()] == [[7, 8, 9], [], [3, 4, 5]]

    def test_large_samples_over_many_blocks(self, volumes: Path, tmp_path: Path) -> None:
        data = ShardedDataset(volumes)
        noise = np.random.default_rng(1).integers(0, 256, (3, 200_000), np.uint8)
        for i in (2, 0, 1):
            assert np.array_equal(data[i]["scan"].numpy(), volume(i))
            assert np.array_equal(data[i]["noise"].numpy(), noise[i])
            assert data[i]["bits"].tolist() == [1, 1, 1]
        crop = data.read(1, "scan", (slice(1, 3), 2, slice(5, 4_000, 7)))
        assert np.array_equal(crop.numpy(), volume(1)[1:3, 2, 5:4_000:7])
        # What cannot be made smaller is stored as it is.
        stored = volumes / "shard-00000.safetensors"
        assert 600_000 < stored.stat().st_size < 620_000
        assert data.sample_bytes == 200_000 + 4 * 3 * 4 * 4_167 + 6  # as it is in memory

    def test_a_loader(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"batch_size": 3, "block_bytes": 100, "buffer_bytes": 300}
        found = []
        for compression in (None, "zstd"):
            write(tmp_path / str(compression), 40, compression=compression, shard_samples=9)
            data = ShardedDataset(tmp_path / str(compression))
            loader = ShardedLoader(data, shuffle="full", **options)
            found.append([batch["tokens"].values.tolist() for batch in loader])
        assert found[0] == found[1]

    def test_a_view_is_refused(self, ten: Path) -> None:
        with pytest.raises(ConfigError, match="is compressed.*: use read"):
            ShardedDataset(ten).view(0, "x")

    def test_only_the_blocks_that_are_read_are_decompressed(
        self, volumes: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bytes 200,000 to 400,000 of the tensor lie in blocks 3 to 6 of 65,536 bytes each."""
        sizes = []
        real = Decompressor.block

        def block(self: Decompressor, frame: memoryview, size: int) -> Any:
            sizes.append(size)
            return real(self, frame, size)

        monkeypatch.setattr(Decompressor, "block", block)
        ShardedDataset(volumes, ["noise"])[1]
        assert sizes == [BLOCK] * 4
        sizes.clear()
        ShardedDataset(volumes).read(2, "noise", slice(199_990, 200_000))
        assert sizes == [600_000 - 9 * BLOCK]  # the last block

    def test_without_zstandard(self, ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = ShardedDataset(ten)
        monkeypatch.setitem(sys.modules, "zstandard", None)
        for use in (lambda: data[0], lambda: ShardWriter(ten / "x", compression="zstd")):
            with pytest.raises(ConfigError, match="pip install 'scaledtrain\\[zstd\\]'"):
                use()


class TestWriting:
    def test_the_manifest_tells(self, ten: Path, tmp_path: Path) -> None:
        manifest = json.loads((ten / "manifest.json").read_text())
        assert (manifest["version"], manifest["compression"]) == (2, "zstd")
        # 4 samples of 8 + 8 bytes, 0 + 1 + 2 + 3 tokens of 2 bytes, 5 offsets of 8
        assert manifest["shards"][0]["raw_bytes"] == 64 + 12 + 40
        plain = json.loads((write(tmp_path / "plain", 10) / "manifest.json").read_text())
        assert plain["version"] == 1  # versions before compression read it
        assert plain.keys() == manifest.keys() - {"compression"}
        assert plain["shards"][0].keys() == manifest["shards"][0].keys() - {"raw_bytes"}

    def test_resumed_as_it_was_begun(self, ten: Path, tmp_path: Path) -> None:
        write(ten, 13, resume=True)
        data = ShardedDataset(ten)
        assert data.manifest.compression == "zstd"
        assert_is_sample(data[12], 12)
        write(tmp_path / "plain", 4)
        with pytest.raises(ConfigError, match="has compression None, not zstd"):
            ShardWriter(tmp_path / "plain", resume=True, compression="zstd")

    @pytest.mark.parametrize("level", [0, 23, 1.5, True])
    def test_no_such_level(self, level: Any, ten: Path) -> None:
        with pytest.raises(ConfigError, match=f"level is {level}; zstd's are 1 to 22"):
            ShardWriter(ten, compression="zstd", level=level, overwrite=True)
        assert len(ShardedDataset(ten)) == 10, "nothing was deleted"

    def test_no_such_compression(self, ten: Path) -> None:
        with pytest.raises(ConfigError, match="compression is 'gzip'"):
            ShardWriter(ten, compression="gzip", overwrite=True)  # type: ignore[arg-type]
        assert len(ShardedDataset(ten)) == 10


class TestDamage:
    def test_is_told_or_skipped(self, ten: Path) -> None:
        damage(shard(ten, 1), -1)
        with pytest.raises(DataError, match="shard-00001.safetensors.*were altered"):
            ShardedDataset(ten)[[0, 5]]
        data = ShardedDataset(ten, on_damage="skip")
        assert [s["label"].item() for s in data] == [0, 1, 2, 3, 8, 9]

    def test_frames_that_are_damaged_are_told_without_checksums_too(self, volumes: Path) -> None:
        file = volumes / "shard-00000.safetensors"
        content = file.read_bytes()
        place = content.index(zstandard.MAGIC_NUMBER.to_bytes(4, "little"))
        file.write_bytes(content[:place] + b"\0" + content[place + 1 :])
        for _ in range(2):
            with pytest.raises(DataError, match="block 0 of tensor 'scan': a zstd frame"):
                ShardedDataset(volumes, ["scan"], verify=False)[0]

    def test_a_bomb(self) -> None:
        """A frame of 256 MiB of zeros in place of a block: it is refused before it is unpacked."""
        compressor = zstandard.ZstdCompressor().compressobj(size=2**28)
        zeros = bytes(2**20)
        bomb = b"".join([compressor.compress(zeros) for _ in range(2**8)] + [compressor.flush()])
        assert len(bomb) < 2**16
        with pytest.raises(ValueError, match=f"65536 bytes says that it has {2**28}"):
            Decompressor().block(memoryview(bomb), BLOCK)

    def test_a_frame_that_does_not_say_its_size(self) -> None:
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(BLOCK))
        with pytest.raises(ValueError, match="says that it has -1"):
            Decompressor().block(memoryview(frame), BLOCK)


COLUMNS = {"x": Column("float32", (2,)), "t": Column("uint8", ragged=True)}


def a_shard() -> tuple[bytes, bytes]:
    """Header and data of 20,000 samples: three blocks of ``x``, one of 5 elements of ``t``."""
    compressor = Compressor()
    x, told_of_x = compressor.compress("x", memoryview(bytes(160_000)))
    t, told_of_t = compressor.compress("t", memoryview(b"abcde"))
    offsets = memoryview(bytes(8 * 20_001))
    header = build_header(
        {
            "t.offsets": ("I64", (20_001,), offsets),
            "x": ("U8", (len(x),), x),
            "t": ("U8", (len(t),), t),
        },
        told_of_x | told_of_t,
    )
    return header, b"".join([offsets, x, t])


class TestFuzz:
    def test_a_header_is_read(self) -> None:
        header, data = a_shard()
        found = parse_header(header, len(header) + len(data), COLUMNS, 20_000, "zstd")
        x = found["x"].blocks
        assert x is not None
        assert (x.nbytes, x.rows, len(x.ends)) == (160_000, 20_000, 4)  # 2.4 blocks
        assert [x.size(i) for i in range(3)] == [65_536, 65_536, 28_928]
        assert x.ends[-1] == found["x"].nbytes

    @given(st.data())
    @settings(max_examples=150)
    def test_blocks_lie_in_the_tensor_whatever_the_header_says(self, data: st.DataObject) -> None:
        header, stored = a_shard()
        told = json.loads(header[8:])
        key = data.draw(st.sampled_from(["zstd:x", "zstd:t"]))
        text = told["__metadata__"][key]
        digits = st.text("0123456789abcdef", min_size=0, max_size=40)
        place = data.draw(st.integers(0, len(text)))
        piece = data.draw(digits)
        changed = text[:place] + piece + text[data.draw(st.integers(place, len(text))) :]
        told["__metadata__"][key] = data.draw(st.one_of(st.just(changed), JSON))
        content = json.dumps(told).encode()
        header = len(content).to_bytes(8, "little") + content
        try:
            found = parse_header(header, len(header) + len(stored), COLUMNS, 20_000, "zstd")
        except ValueError:
            return
        for name, row_bytes in (("x", 8), ("t", 1)):
            blocks = found[name].blocks
            assert blocks is not None
            assert blocks.rows * row_bytes == blocks.nbytes <= BLOCK * (len(blocks.ends) - 1)
            assert (np.diff(blocks.ends) > 0).all()
            assert (blocks.ends[0], blocks.ends[-1]) == (0, found[name].nbytes)
        assert found["x"].blocks is not None
        assert found["x"].blocks.rows == 20_000

    @given(st.text(max_size=60) | st.none(), st.integers(0, 2**40), st.integers(1, 2**62))
    def test_any_text(self, text: str | None, stored: int, row_bytes: int) -> None:
        try:
            blocks = parse_blocks("x", {"zstd:x": text}, stored, row_bytes, None)
        except ValueError:
            return
        assert blocks.ends[-1] == stored

    @given(st.data())
    @settings(max_examples=150)
    def test_a_changed_frame_gives_the_right_size_or_an_error(self, data: st.DataObject) -> None:
        frame = bytearray(zstandard.ZstdCompressor().compress(bytes(range(100)) * 20))
        for _ in range(data.draw(st.integers(0, 3))):
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(frame)))
        for content in (frame, frame[:cut], data.draw(st.binary(max_size=50))):
            try:
                block = Decompressor().block(memoryview(content), 2_000)
            except ValueError:
                continue
            assert len(block) == 2_000


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_shard_with_any_damage_is_read_right_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Without checksums: wrong numbers may come, but nothing from outside the file, no crash."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    write(folder, 4, compression="zstd", overwrite=True)
    file = shard(folder, 0)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    for verify in (True, False):
        try:
            batch = ShardedDataset(folder, verify=verify)[:]
        except DataError:
            continue
        assert len(batch["label"]) == 4
        if verify:
            assert batch["label"].tolist() == [0, 1, 2, 3]
