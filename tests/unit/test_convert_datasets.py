"""Data sets of other libraries as sharded ones; and a sharded one written anew."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from xxhash import xxh64

from scaledtrain.data import Column, ShardedDataset, digits
from scaledtrain.data.convert import (
    HuggingFace,
    ImageDecoder,
    Images,
    Mds,
    Shards,
    Source,
    TorchDataset,
    WebDataset,
    class_names,
    convert,
    load_huggingface,
)
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import assert_is_sample, damage, shard, write


def converted(source: Source, folder: Path, **options: Any) -> ShardedDataset:
    sent = pickle.loads(pickle.dumps(source))  # as to workers that are not forked
    convert(sent, folder / "out", **options)
    return ShardedDataset(folder / "out")


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


class TestHuggingFace:
    @pytest.fixture
    def dataset(self) -> datasets.Dataset:
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["no", "ja"]),
                "tokens": datasets.List(datasets.Value("int32")),
                "matrix": datasets.Array2D((2, 2), "float32"),
                "image": datasets.Image(),
            }
        )
        rows, image = range(2_500), {"bytes": png(PIXELS), "path": None}
        return datasets.Dataset.from_dict(
            {
                "text": [f"Nr {i} ü" for i in rows],
                "label": [i % 2 for i in rows],
                "tokens": [list(range(i % 4)) for i in rows],
                "matrix": [[[i, 1], [2, 3]] for i in rows],
                "image": [image] * len(rows),
            },
            features,
        )

    @pytest.mark.parametrize("streamed", [False, True])
    def test_every_feature(self, tmp_path: Path, dataset: datasets.Dataset, streamed: bool) -> None:
        source = HuggingFace(dataset.to_iterable_dataset() if streamed else dataset)
        assert source.parts == (1 if streamed else 3)
        data = converted(source, tmp_path, workers=2)
        assert data.columns == {
            "text": Column("uint8", ragged=True),
            "label": Column("int64"),
            "tokens": Column("int32", ragged=True),
            "matrix": Column("float32", (2, 2)),
            "image": Column("uint8", ragged=True),
        }
        assert len(data) == 2_500
        assert class_names(tmp_path / "out") == {"label": ["no", "ja"]}
        for i in (0, 999, 1_000, 2_499):
            found = data[i]
            assert bytes(found["text"].numpy()).decode() == f"Nr {i} ü"
            assert found["label"].item() == i % 2
            assert found["tokens"].tolist() == list(range(i % 4))
            assert found["matrix"].tolist() == [[i, 1], [2, 3]]
            assert bytes(found["image"].numpy()) == png(PIXELS)

    def test_rows_that_were_selected_and_saved(
        self, tmp_path: Path, dataset: datasets.Dataset
    ) -> None:
        dataset.select([7, 3]).save_to_disk(str(tmp_path / "saved"))
        source = HuggingFace(load_huggingface(str(tmp_path / "saved"), "train"), columns=["label"])
        assert converted(source, tmp_path)[:]["label"].tolist() == [1, 1]

    def test_what_cannot_be_is_told(self, tmp_path: Path, dataset: datasets.Dataset) -> None:
        with pytest.raises(ConfigError, match="has the splits train, test; give one"):
            HuggingFace(datasets.DatasetDict(train=dataset, test=dataset))
        with pytest.raises(ConfigError, match="no column 'x', only text, label"):
            HuggingFace(dataset, columns=["x"])
        with pytest.raises(ConfigError, match="of Hugging Face is expected, not <class 'list'>"):
            HuggingFace([1])
        (tmp_path / "nothing").mkdir()
        with pytest.raises(ConfigError, match=r"nothing.*cannot be loaded"):
            load_huggingface(str(tmp_path / "nothing"), "train")


class Ragged(Dataset[Any]):
    def __len__(self) -> int:
        return 130

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= 130:
            raise IndexError(i)
        return {"tokens": torch.arange(i % 3, dtype=torch.int32), "n": i, "name": f"é{i}"}


class Stream(IterableDataset[Any]):
    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class TestTorchDataset:
    def test_digits(self, tmp_path: Path) -> None:
        data = converted(TorchDataset(digits()), tmp_path, workers=3)
        x, y = digits()[:]
        assert torch.equal(data[:]["x"], x)
        assert torch.equal(data[:]["y"], y)

    def test_ragged_samples_and_text(self, tmp_path: Path) -> None:
        data = converted(TorchDataset(Ragged(), ragged=["tokens"]), tmp_path, workers=2)
        assert data.columns["tokens"] == Column("int32", ragged=True)
        for i in range(130):
            assert data[i]["tokens"].tolist() == list(range(i % 3))
            assert data[i]["n"].item() == i
            assert bytes(data[i]["name"].numpy()).decode() == f"é{i}"

    def test_an_iterable_one(self, tmp_path: Path) -> None:
        source = TorchDataset(Stream([(i, i / 2, b"x") for i in range(100)]), names=["a", "b", "c"])
        data = converted(source, tmp_path, workers=2)
        assert data[:]["a"].tolist() == list(range(100))
        assert data[:]["b"].tolist() == [i / 2 for i in range(100)]

    def test_what_cannot_be_is_told(self, tmp_path: Path) -> None:
        for dataset, options, told in (
            (Ragged(), {}, "samples 0 to 63: the values of 'tokens' do not go .*ragged="),
            (Ragged(), {"ragged": ["x"]}, "x is to be ragged, but the columns are tokens, n, name"),
            (Stream([(1, 2, 3)]), {}, "a sample has 3 values, but the names are x, y"),
            (Stream([{"a": 1}, {"b": 1}]), {}, "one has the columns a, another b"),
            (Stream([]), {}, "the input has no samples"),
            (Stream([{"a": object()}]), {}, "no dtype of a tensor"),
        ):
            with pytest.raises(ConfigError, match=told):
                convert(TorchDataset(dataset, **options), tmp_path / "out", overwrite=True)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="Dataset has no length and is no IterableDataset"):
            TorchDataset(Dataset())


# The format by hand, from its documentation: column -> (encoding, its size, encode).
def _ndarray(value: np.ndarray[Any, Any]) -> bytes:
    # one byte: the dtype; one: dims << 2 | width of the shape's numbers (0: uint8); the shape
    return bytes([33, value.ndim << 2, *value.shape]) + value.tobytes()


MDS: dict[str, tuple[str, int | None, Any]] = {
    "array": ("ndarray", None, _ndarray),
    "fixed": ("ndarray:float32:2,1", 8, lambda v: np.array(v, "<f4").tobytes()),
    "image": ("png", None, png),
    "label": ("int", 8, lambda v: np.int64(v).tobytes()),
    "name": ("str", None, str.encode),
    "raw": ("pil", None, lambda v: np.array([4, 3, 1], "<u4").tobytes() + b"L" + v.tobytes()),
    "score": ("str_float", None, lambda v: str(v).encode()),
}


def mds_sample(i: int) -> dict[str, Any]:
    return {
        "array": np.arange(1 + i % 3, dtype="<i4"),
        "fixed": [i, 0.5],
        "image": PIXELS + i,
        "label": -i,
        "name": f"ñ{i}",
        "raw": PIXELS,
        "score": i / 4,
    }


def write_mds(folder: Path, compression: str | None = None) -> Path:
    """Seven samples in shards of four and three."""
    folder.mkdir()
    shards = []
    for number, samples in enumerate((range(4), range(4, 7))):
        encoded = []
        for i in samples:
            parts = [(size, encode(mds_sample(i)[n])) for n, (_, size, encode) in MDS.items()]
            sizes = [len(part) for size, part in parts if size is None]
            encoded.append(np.array(sizes, "<u4").tobytes() + b"".join(p for _, p in parts))
        config = b'{"what": "the index says the same"}'
        offsets = np.cumsum([0, *map(len, encoded)]) + 4 + 4 * (len(encoded) + 1) + len(config)
        head = np.array([len(encoded), *offsets], "<u4").tobytes()
        content = head + config + b"".join(encoded)
        name = f"shard.{number:05d}.mds"
        if compression is None:
            (folder / name).write_bytes(content)
        else:
            pack = gzip.compress if compression == "gz:9" else bz2.compress
            (folder / f"{name}.{compression[:3]}").write_bytes(pack(content))
        hashes = {"sha1": hashlib.sha1(content).hexdigest(), "xxh64": xxh64(content).hexdigest()}
        shards.append(
            {
                "column_names": list(MDS),
                "column_encodings": [encoding for encoding, _, _ in MDS.values()],
                "column_sizes": [size for _, size, _ in MDS.values()],
                "compression": compression,
                "format": "mds",
                "hashes": ["sha1", "xxh64"],
                "raw_data": {"basename": name, "bytes": len(content), "hashes": hashes},
                "samples": len(encoded),
                "size_limit": 67108864,
                "version": 2,
                "zip_data": compression
                and {"basename": f"{name}.{compression[:3]}", "bytes": 1, "hashes": {}},
            }
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder


class TestMds:
    @pytest.mark.parametrize("compression", [None, "gz:9", "bz2"])
    def test_every_encoding(self, tmp_path: Path, compression: str | None) -> None:
        source = Mds(write_mds(tmp_path / "mds", compression), ragged=["array"])
        data = converted(source, tmp_path, workers=2)
        assert data.columns == {
            "array": Column("int32", ragged=True),
            "fixed": Column("float32", (2, 1)),
            "image": Column("uint8", ragged=True),
            "label": Column("int64"),
            "name": Column("uint8", ragged=True),
            "raw": Column("uint8", (3, 3, 4)),  # a grey image as RGB
            "score": Column("float64"),
        }
        assert len(data) == 7
        for i in range(7):
            found, expected = data[i], mds_sample(i)
            assert found["array"].tolist() == expected["array"].tolist()
            assert found["fixed"].tolist() == [[i], [0.5]]
            assert bytes(found["image"].numpy()) == png(PIXELS + i)
            assert found["label"].item() == -i
            assert bytes(found["name"].numpy()).decode() == f"ñ{i}"
            assert np.array_equal(found["raw"].numpy(), np.stack([PIXELS] * 3))
            assert found["score"].item() == i / 4

    def test_images_can_be_decoded(self, tmp_path: Path) -> None:
        folder = write_mds(tmp_path / "mds")
        source = Mds(folder, columns=["image"], decoder=ImageDecoder(mode="L"))
        images = converted(source, tmp_path)[:]["image"]
        assert np.array_equal(images.numpy(), np.stack([[PIXELS + i] for i in range(7)]))

    def test_what_cannot_be_is_told(self, tmp_path: Path) -> None:
        folder = write_mds(tmp_path / "mds")
        index, first = folder / "index.json", folder / "shard.00000.mds"
        text, content = index.read_text(), first.read_bytes()

        def read(told: str, changed: bytes, **options: Any) -> None:
            index.write_text(told)
            first.write_bytes(changed)
            list(Mds(folder, **options).read(0))

        for told, changed, options, error, message in (
            (text, content, {"columns": ["x"]}, ConfigError, "no column 'x', only array"),
            (text, content, {}, ConfigError, "the values of 'array' do not .*ragged="),
            (text.replace('"str"', '"pkl"'), content, {}, ConfigError, "pickles are never read"),
            (
                text.replace('"str"', '"tiff"'),
                content,
                {},
                ConfigError,
                "'tiff', which is not",
            ),
            ("{", content, {}, DataError, "is no index of MDS shards"),
            ('{"version": 1, "shards": []}', content, {}, DataError, "is not of version 2"),
            ('{"version": 2, "shards": []}', content, {}, ConfigError, "names no shards"),
            (text.replace("shard.00000", "../s"), content, {}, DataError, "outside the folder"),
            (text, content[:-1], {}, DataError, "00000.mds is damaged: it has .* bytes instead"),
            (text, content[:-1] + b"!", {}, DataError, "damaged: its sha1 is .* instead of"),
            (
                text.replace("sha1", "none").replace("xxh64", "some"),
                content[:4] + b"\xff" * 4 + content[8:],
                {},
                DataError,
                "sample 0 of .* is damaged",
            ),
        ):
            with pytest.raises(error, match=message):
                read(told, changed, **options)
        first.unlink()
        with pytest.raises(DataError, match=r"00000.mds cannot be read"):
            list(Mds(folder).read(0))
        with pytest.raises(ConfigError, match="holds no MDS data set"):
            Mds(tmp_path)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def web_sample(i: int) -> list[tuple[str, bytes]]:
    return [
        (f"train/ü{i:03d}.png", png(PIXELS + i % 9)),
        (f"train/ü{i:03d}.cls", str(i % 3).encode()),
        (f"train/ü{i:03d}.seg.npy", npy(np.full((2, 2), i, np.int16))),
        (f"train/ü{i:03d}.json", json.dumps([i, 0.5]).encode()),
        (f"train/ü{i:03d}.TXT", f"Wort {i}".encode()),
    ]


class TestWebDataset:
    def test_every_kind_of_file(self, tmp_path: Path) -> None:
        first = [("__index__", b"{}"), ("train/README", b"no sample")]
        for name, samples in (("a-0.tar", range(70)), ("a-1.tar.gz", range(70, 72))):
            members = [file for i in samples for file in web_sample(i)]
            tar(tmp_path / name, [*first, *members])
        source = WebDataset(tmp_path, decoder=ImageDecoder(mode="L"))
        data = converted(source, tmp_path, workers=2)
        assert data.columns == {
            "png": Column("uint8", (1, 3, 4)),
            "cls": Column("int64"),
            "seg.npy": Column("int16", (2, 2)),
            "json": Column("float64", (2,)),
            "txt": Column("uint8", ragged=True),
        }
        assert len(data) == 72
        for i in (0, 63, 64, 71):
            found = data[i]
            assert np.array_equal(found["png"].numpy(), [PIXELS + i % 9])
            assert found["cls"].item() == i % 3
            assert found["seg.npy"].tolist() == [[i, i], [i, i]]
            assert found["json"].tolist() == [i, 0.5]
            assert bytes(found["txt"].numpy()).decode() == f"Wort {i}"

    def test_some_columns_and_names(self, tmp_path: Path) -> None:
        file = tar(tmp_path / "a.tar", [*web_sample(5), ("train/ü005.pyd", b"\x80\x04N.")])
        source = WebDataset(file, columns=["png", "__key__"], decoder=None)
        found = converted(source, tmp_path)[0]
        assert bytes(found["png"].numpy()) == png(PIXELS + 5)
        assert bytes(found["__key__"].numpy()).decode() == "train/ü005"

    def test_what_cannot_be_is_told(self, tmp_path: Path) -> None:
        pickled = np.array([{}], object)
        for files, options, error, told in (
            ([("a.pyd", b"\x80\x04N.")], {}, ConfigError, ".pyd is a pickle, which is never read"),
            ([("a.cls", b"1")], {"columns": ["pkl"]}, ConfigError, ".pkl is a pickle"),
            ([("a.npy", npy(pickled))], {}, DataError, "a.npy in .* is no .npy file"),
            ([("a.cls", b"one")], {}, DataError, "a.cls in .* is no number"),
            ([("a.json", b'{"x": 1}')], {}, DataError, "a.json in .* is no number or array of"),
            ([("a.png", b"no")], {}, DataError, "a.png in .* cannot be decoded"),
            ([("a.cls", b"1"), ("a.cls", b"2")], {}, DataError, "has a.cls twice"),
            (
                [("a.cls", b"1"), ("b.txt", b"")],
                {},
                ConfigError,
                "the columns cls, another txt",
            ),
            ([("a.cls", b"1")], {"columns": ["txt"]}, ConfigError, "'a' of .* has no txt, only"),
            ([], {}, ConfigError, "the input has no samples"),
        ):
            archive = tar(tmp_path / "a.tar", files)
            with pytest.raises(error, match=told):
                convert(WebDataset(archive, **options), tmp_path / "out")  # type: ignore[arg-type]
        cut = tar(tmp_path / "cut.tar", web_sample(0))
        cut.write_bytes(cut.read_bytes()[:700])
        with pytest.raises(DataError, match=r"cut.tar cannot be read as a tar archive"):
            list(WebDataset(cut).read(0))


class TestShards:
    @pytest.fixture
    def hundred(self, tmp_path: Path) -> Path:
        return write(tmp_path / "hundred", 100, shard_samples=30)

    def test_other_sizes_and_columns(self, hundred: Path, tmp_path: Path) -> None:
        data = converted(Shards(hundred), tmp_path, shard_samples=9, workers=2)
        assert [s.samples for s in data.manifest.shards] == [9] * 11 + [1]
        for i in range(100):
            assert_is_sample(data[i], i)
        convert(Shards(hundred, columns=["label", "tokens"]), tmp_path / "some")
        some = ShardedDataset(tmp_path / "some")
        assert list(some.columns) == ["label", "tokens"]
        assert some[7]["tokens"].tolist() == [7, 8, 9]

    @pytest.mark.parametrize("shuffle", ["full", "block"])
    def test_an_order_that_is_drawn_once(self, hundred: Path, tmp_path: Path, shuffle: Any) -> None:
        data = converted(Shards(hundred, shuffle=shuffle, seed=3), tmp_path, workers=2)
        order = data[:]["label"].tolist()
        assert order != list(range(100))
        assert sorted(order) == list(range(100))
        for place, i in enumerate(order):
            assert_is_sample(data[place], i)
        convert(Shards(hundred, shuffle=shuffle, seed=4), tmp_path / "other")
        assert ShardedDataset(tmp_path / "other")[:]["label"].tolist() != order

    def test_names_of_classes_go_along(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / "in" / name).mkdir(parents=True)
            (tmp_path / "in" / name / "1.png").write_bytes(png(PIXELS))
        convert(Images(tmp_path / "in"), tmp_path / "images")
        converted(Shards(tmp_path / "images"), tmp_path)
        assert class_names(tmp_path / "out") == {"label": ["a", "b"]}
        convert(Shards(tmp_path / "images", columns=["image"]), tmp_path / "out", overwrite=True)
        assert class_names(tmp_path / "out") == {}

    def test_what_cannot_be_is_told(self, hundred: Path, tmp_path: Path) -> None:
        damage(shard(hundred, 1), -1)
        with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged"):
            converted(Shards(hundred), tmp_path)
        with pytest.raises(ConfigError, match="no column 'z'"):
            Shards(hundred, columns=["z"])
        manifest = write(tmp_path / "begun", 4) / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
        with pytest.raises(ConfigError, match="is not finished; go on with it first"):
            Shards(tmp_path / "begun")
