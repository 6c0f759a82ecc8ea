"""Damaged sharded data sets: told by name, left out if wanted, never read outside a file."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledtrain.data import Column, ShardedDataset, ShardWriter
from scaledtrain.data.sharded.header import build_header, parse_header
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import damage, shard, write


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten samples in shards of 4, 4 and 2."""
    return write(tmp_path / "ten", 10)


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

    @pytest.mark.parametrize("row_bytes", [65_536, 2 * 65_536, 100_000, 30_000])
    def test_in_large_rows_each_byte_is_checked(self, row_bytes: int, tmp_path: Path) -> None:
        """Rows read by themselves are checked where they are copied to, in chunks of 64 KiB, of
        which a row has some whole and some in part. A row whose chunk was altered is told, also if
        the byte is its neighbour's; others are read."""
        rows = torch.randint(256, (9, row_bytes), dtype=torch.uint8)
        with ShardWriter(tmp_path / "set", {"x": Column("uint8", (row_bytes,))}) as writer:
            writer.write_batch({"x": rows})
        file = shard(tmp_path / "set", 0)
        first = file.stat().st_size - rows.numel()  # of the values, which are the last tensor
        for row in range(9):
            for place in (0, row_bytes // 2, row_bytes - 1):
                damage(file, first + row * row_bytes + place)
                chunk = (row * row_bytes + place) // 65_536
                for asked in range(9):
                    low, high = asked * row_bytes, (asked + 1) * row_bytes - 1
                    data = ShardedDataset(tmp_path / "set")
                    if low // 65_536 <= chunk <= high // 65_536:
                        with pytest.raises(DataError, match="bytes .* of tensor 'x', were altered"):
                            data[[asked]]
                    else:
                        assert torch.equal(data[[asked]]["x"][0], rows[asked])
                damage(file, first + row * row_bytes + place)  # and back

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
            (lambda m: m.update(version=3), "version 3"),
            (lambda m: m.update(version=2, compression="zstd"), "shard-00000"),
            (lambda m: m.update(version=2, compression="gzip"), "compression is 'gzip'"),
            (lambda m: m.update(compression="zstd"), "its keys are"),
            (lambda m: m["shards"][0].update(raw_bytes=-1), "has raw_bytes -1"),
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
        if data.draw(st.booleans()):
            told |= {"version": 2, "compression": "zstd"}
            told["shards"][0]["raw_bytes"] = 7
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
