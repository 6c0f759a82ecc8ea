"""Arrays, tables, images and text as sharded data sets."""

from __future__ import annotations

import io
import pickle
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

from scaledtrain.data import Column, ShardedDataset
from scaledtrain.data.convert import (
    Arrays,
    Csv,
    HuggingFace,
    ImageDecoder,
    Images,
    Parquet,
    Source,
    Text,
    class_names,
    convert,
)
from scaledtrain.errors import ConfigError, DataError

DIGITS = load_digits()


def converted(source: Source, folder: Path, **options: Any) -> ShardedDataset:
    sent = pickle.loads(pickle.dumps(source))  # as to workers that are not forked
    convert(sent, folder / "out", **options)
    return ShardedDataset(folder / "out")


def text_of(value: torch.Tensor) -> str:
    return bytes(value.numpy()).decode()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class TestArrays:
    def test_digits_in_npy_files(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", DIGITS.images.astype(np.float32))
        np.save(tmp_path / "y.npy", DIGITS.target)
        source = Arrays({"x": tmp_path / "x.npy", "label": tmp_path / "y.npy"})
        found = converted(source, tmp_path, workers=2)[:]
        assert np.array_equal(found["x"].numpy(), DIGITS.images.astype(np.float32))
        assert found["label"].tolist() == DIGITS.target.tolist()

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_npz_is_mapped(self, tmp_path: Path, order: str) -> None:
        images = np.array(DIGITS.images, dtype=">i2", order=order)  # type: ignore[call-overload]
        np.savez(tmp_path / "a.npz", Bilder=images, größe=DIGITS.target)
        data = converted(Arrays(tmp_path / "a.npz"), tmp_path)
        assert data.columns == {"Bilder": Column("int16", (8, 8)), "größe": Column("int64")}
        assert np.array_equal(data[:]["Bilder"].numpy(), DIGITS.images)
        assert data[:]["größe"].tolist() == DIGITS.target.tolist()

    def test_tensors_in_memory(self, tmp_path: Path) -> None:
        x = torch.randn(5, 3).to(torch.bfloat16)
        data = converted(Arrays({"x": x}), tmp_path, workers=2)
        assert torch.equal(data[:]["x"], x)

    def test_one_sample(self, tmp_path: Path) -> None:
        assert converted(Arrays({"x": np.array([3.5])}), tmp_path)[0]["x"].item() == 3.5

    def test_what_cannot_be_is_told(self, tmp_path: Path) -> None:
        np.save(tmp_path / "objects.npy", np.array([{}, []], object), allow_pickle=True)
        np.savez_compressed(tmp_path / "packed.npz", x=np.zeros(3))
        np.savez(tmp_path / "objects.npz", x=np.array([{}, []], object))
        write(tmp_path / "no.npy", "no")
        write(tmp_path / "no.npz", "no")
        write(tmp_path / "cut.npy", (tmp_path / "objects.npy").read_bytes()[:40])
        for arrays, error, told in (
            ({"x": np.zeros(3), "y": np.zeros(4)}, ConfigError, "different lengths: {'x': 3, 'y'"),
            ({"x": 3}, ConfigError, "'x' is no array of samples, but int: 3"),
            ({"x": np.array(["a"])}, ConfigError, "array 'x': .*<U1.*no dtype of a tensor"),
            ({"x": np.zeros((2, 0))}, ConfigError, "a dimension 0"),
            ({}, ConfigError, "no array to write"),
            ({"x": tmp_path / "x.npy"}, ConfigError, "there is no file .*x.npy"),
            ({"x": tmp_path / "no.npy"}, DataError, "no.npy cannot be read as a .npy file"),
            ({"x": tmp_path / "cut.npy"}, DataError, "cut.npy cannot be read as a .npy file"),
            ({"x": tmp_path / "objects.npy"}, DataError, "objects.npy cannot be read.*"),
            (tmp_path / "x.npz", ConfigError, "there is no file"),
            (tmp_path / "no.npz", DataError, "no.npz cannot be read as a .npz file"),
            (tmp_path / "packed.npz", ConfigError, "is compressed.*np.savez"),
            (tmp_path / "objects.npz", ConfigError, "is a pickle of objects: never read"),
        ):
            with pytest.raises(error, match=told):
                Arrays(arrays)  # type: ignore[arg-type]


class TestCsv:
    def test_columns_follow_from_the_values(self, tmp_path: Path) -> None:
        file = write(
            tmp_path / "a.csv",
            'größe,n,ok,name\n1.5,3,true,Zoë\n,4,false,\n-2e3,-5,true,"a, b"\n',
        )
        data = converted(Csv(file), tmp_path)
        assert data.columns == {
            "größe": Column("float64"),
            "n": Column("int64"),
            "ok": Column("bool"),
            "name": Column("uint8", ragged=True),
        }
        assert data[0]["größe"].item() == 1.5
        assert np.isnan(data[1]["größe"].item())  # a missing value
        assert [s["n"].item() for s in data] == [3, 4, -5]
        assert [s["ok"].item() for s in data] == [True, False, True]
        assert [text_of(s["name"]) for s in data] == ["Zoë", "", "a, b"]

    def test_categories_dtypes_columns_and_several_files(self, tmp_path: Path) -> None:
        write(tmp_path / "in/b.csv", "kind;x\nb;2\n")
        write(tmp_path / "in/a.csv", "x;kind;skip\n1;a;2020-01-01\n")  # in another order
        source = Csv(
            tmp_path / "in",
            columns=["kind", "x"],
            dtypes={"x": "float32"},
            categories={"kind": ["b", "a"]},
            delimiter=";",
        )
        data = converted(source, tmp_path, workers=2)
        assert data.columns == {"kind": Column("int64"), "x": Column("float32")}
        assert data[:]["kind"].tolist() == [1, 0]
        assert data[:]["x"].tolist() == [1.0, 2.0]
        assert class_names(tmp_path / "out") == {"kind": ["b", "a"]}

    def test_many_rows_are_read_in_blocks(self, tmp_path: Path) -> None:
        rows = "\n".join(f"{i:050},{i / 8:050}" for i in range(60_000))  # 6 MB
        data = converted(Csv(write(tmp_path / "a.csv", f"i,x\n{rows}\n")), tmp_path)
        assert torch.equal(data[:]["i"], torch.arange(60_000))
        assert torch.equal(data[:]["x"], torch.arange(60_000, dtype=torch.float64) / 8)

    def test_what_cannot_be_is_told(self, tmp_path: Path) -> None:
        def read(text: str, **options: Any) -> None:
            source = Csv(write(tmp_path / "a.csv", text), **options)
            list(source.read(0))

        for text, options, told in (
            ("", {}, "cannot be read as CSV: Empty"),
            ("a,b\n1\n", {}, "cannot be read as CSV.*Expected 2 columns, got 1"),
            ("a,b\n1,2\n", {"columns": ["c"]}, "cannot be read as CSV.*'c'"),
            ("a\n1\n", {"dtypes": {"b": "int8"}}, "there is no column b in .*only a"),
            ("a\n1\n", {"dtypes": {"a": "number"}}, "'a' is to be 'number'"),
            ("a\n300\n", {"dtypes": {"a": "uint8"}}, "cannot be read as CSV.*300"),
            ("a\n1\n\n2\n", {"dtypes": {"a": "string"}, "categories": {"b": ["c"]}}, "no column b"),
            ("a,b\n1,1\n,1\n", {}, "'a' of .* lacks 1 of 2 values, and int64 has none.*float64"),
            ("a,a\n1,2\n", {}, "column 'a' of .* is there twice"),
            ("a\n1\n", {"delimiter": "ab"}, "delimiter is 'ab'"),
            ("a,b\n", {}, "'a' of .* has no values .* so no dtype"),
            ("a\n2020-01-01\n", {}, "'a' of .* is date32.*no tensor"),
            (
                "a\nx\ny\n",
                {"categories": {"a": ["x"]}},
                "has 'y', which is none of its",
            ),
        ):
            with pytest.raises(ConfigError, match=told):
                read(text, **options)
        source = Csv(write(tmp_path / "a.csv", "a\n"), dtypes={"a": "int64"})
        with pytest.raises(ConfigError, match="the input has no samples"):
            convert(source, tmp_path / "out")


class TestParquet:
    def test_types_are_kept(self, tmp_path: Path) -> None:
        table = pa.table(
            {
                "u8": pa.array([1, 2, 255], pa.uint8()),
                "f2": pa.array(np.array([0.5, 1, 2], np.float16)),
                "miss": pa.array([1.0, None, 3.0], pa.float32()),
                "text": ["a", "ü", ""],
                "bytes": pa.array([b"\0", b"", b"\xff\xfe"], pa.large_binary()),
                "list": pa.array([[1, 2], [], [3]], pa.list_(pa.int16())),
                "pair": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
                "word": pa.array(["x", "y", "x"]).dictionary_encode(),
            }
        )
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        source = Parquet(tmp_path / "a.parquet", categories={"word": ["x", "y"]})
        assert source.parts == 2
        data = converted(source, tmp_path, workers=2)
        assert data.columns == {
            "u8": Column("uint8"),
            "f2": Column("float16"),
            "miss": Column("float32"),
            "text": Column("uint8", ragged=True),
            "bytes": Column("uint8", ragged=True),
            "list": Column("int16", ragged=True),
            "pair": Column("int32", (2,)),
            "word": Column("int64"),
        }
        batch = data[:]
        assert batch["u8"].tolist() == [1, 2, 255]
        assert batch["f2"].tolist() == [0.5, 1.0, 2.0]
        assert torch.equal(batch["miss"].isnan(), torch.tensor([False, True, False]))
        assert [text_of(v) for v in batch["text"].unbind()] == ["a", "ü", ""]
        assert [bytes(v.numpy()) for v in batch["bytes"].unbind()] == [b"\0", b"", b"\xff\xfe"]
        assert [v.tolist() for v in batch["list"].unbind()] == [[1, 2], [], [3]]
        assert batch["pair"].tolist() == [[1, 2], [3, 4], [5, 6]]
        assert batch["word"].tolist() == [0, 1, 0]

    def test_what_cannot_be_is_told(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
        parquet.write_table(pa.table({"x": [1, None], "when": [{"a": 1}, {"a": 2}]}), a)
        with pytest.raises(ConfigError, match="'when' of .* is struct<a: int64>.*no tensor"):
            Parquet(a)
        with pytest.raises(ConfigError, match="no column 'y' in .*, only x, when"):
            Parquet(a, columns=["y"])
        with pytest.raises(ConfigError, match="'x' of .*row group 0 lacks 1 of 2 values"):
            list(Parquet(a, columns=["x"]).read(0))
        parquet.write_table(pa.table({"x": [1.5]}), b)
        with pytest.raises(ConfigError, match=r"b.parquet has the columns .*float64.*a.parquet"):
            Parquet([a, b], columns=["x"])
        write(b, b.read_bytes()[:-9])
        with pytest.raises(DataError, match=r"b.parquet cannot be read as Parquet"):
            Parquet(b)
        with pytest.raises(ConfigError, match=r"holds no file that is called \*.parquet"):
            Parquet([write(tmp_path / "empty/x.txt", "").parent])


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("package", "extra", "make"),
    [
        ("pyarrow", "data", lambda: Csv("a.csv")),
        ("pyarrow", "data", lambda: Parquet("a.parquet")),
        ("PIL", "data", lambda: ImageDecoder()(b"", "a.png")),
        ("datasets", "huggingface", lambda: HuggingFace(None)),
    ],
)
def test_an_extra_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, extra: str, make: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'scaledtrain\[{extra}\]'"):
        make()


class TestImages:
    @pytest.fixture
    def photos(self, tmp_path: Path) -> Path:
        for i in range(100):
            name = f"photos/{'zwei' if i % 3 else 'ä 1'}/{i:03d}.PNG"
            write(tmp_path / name, png(DIGITS.images[i] * 15))
        write(tmp_path / "photos/zwei/notes.txt", "no image")
        return tmp_path / "photos"

    def test_digits_come_back_with_their_classes(self, photos: Path, tmp_path: Path) -> None:
        source = Images(photos, ImageDecoder(mode="L"))
        assert source.parts == 2  # 64 images at most in each
        data = converted(source, tmp_path, workers=2)
        assert data.columns == {"image": Column("uint8", (1, 8, 8)), "label": Column("int64")}
        assert class_names(tmp_path / "out") == {"label": ["zwei", "ä 1"]}
        order = [i for i in range(100) if i % 3] + list(range(0, 100, 3))
        assert np.array_equal(data[:]["image"].numpy()[:, 0], DIGITS.images[order] * 15)
        assert data[:]["label"].tolist() == [0] * 66 + [1] * 34

    def test_colours_and_sizes(self, tmp_path: Path) -> None:
        red = np.zeros((4, 6, 3), np.uint8)
        red[..., 0] = 200
        write(tmp_path / "in/a/1.png", png(red))
        data = converted(Images(tmp_path / "in", ImageDecoder(size=(2, 5))), tmp_path)
        assert data.columns["image"] == Column("uint8", (3, 2, 5))
        assert data[0]["image"].unique(dim=1).tolist() == [[[200] * 5], [[0] * 5], [[0] * 5]]

    def test_files_can_be_kept_as_they_are(self, photos: Path, tmp_path: Path) -> None:
        data = converted(Images(photos, None), tmp_path)
        assert data.columns["image"] == Column("uint8", ragged=True)
        assert bytes(data[0]["image"].numpy()) == (photos / "zwei/001.PNG").read_bytes()

    def test_what_cannot_be_is_told(self, photos: Path, tmp_path: Path) -> None:
        write(photos / "zwei/bad.jpg", "no image")
        with pytest.raises(DataError, match=r"bad.jpg cannot be decoded as an image"):
            convert(Images(photos), tmp_path / "out", workers=2)
        write(photos / "zwei/bad.jpg", png(np.zeros((9, 8))))
        with pytest.raises(ConfigError, match=r"bad.jpg is 9 x 8 pixels, but the first .* 8 x 8"):
            convert(Images(photos), tmp_path / "out", resume=True)
        deep = io.BytesIO()
        Image.fromarray(np.full((8, 8), 300, np.uint16)).save(deep, "PNG")
        write(photos / "zwei/bad.jpg", deep.getvalue())
        with pytest.raises(ConfigError, match=r"bad.jpg: .* more than 8 bits \(mode I;16\)"):
            convert(Images(photos), tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []
        write(photos / "a.png", "")
        with pytest.raises(ConfigError, match="has images beside its sub-folders"):
            Images(photos)
        (photos / "a.png").unlink()
        (photos / "empty").mkdir()
        with pytest.raises(ConfigError, match="empty has no image"):
            Images(photos)
        with pytest.raises(ConfigError, match="has no sub-folders"):
            Images(photos / "empty")
        with pytest.raises(ConfigError, match="is no folder"):
            Images(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match=r"size is \(0, 3\)"):
            ImageDecoder(size=(0, 3))


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


class TestText:
    def test_the_standard_library_as_bytes(self, tmp_path: Path) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"]) / "json"
        files = sorted(folder.rglob("*.py"))
        data = converted(Text(folder, 512, pattern="*.py"), tmp_path)
        stream = b"".join(file.read_bytes() + b"\0" for file in files if file.stat().st_size)
        assert len(data) == len(stream) // 512
        assert data[:]["tokens"].numpy().tobytes() == stream[: len(data) * 512]

    @pytest.mark.parametrize("tokenizer", [words, f"{__name__}:words"])
    def test_tokens_of_documents(self, tmp_path: Path, tokenizer: Any) -> None:
        write(tmp_path / "in/a.txt", "a bc def")
        write(tmp_path / "in/b.txt", " ")  # no token: no document
        write(tmp_path / "in/c/ü.txt", "abcd éé")
        packed = Text(tmp_path / "in", 3, tokenizer=tokenizer, end_of_document=9)
        assert next(packed.read(0))["tokens"].tolist() == [1, 2, 3, 9, 4, 2, 9]
        data = converted(Text(tmp_path / "in", tokenizer=tokenizer), tmp_path)
        assert data.columns == {"tokens": Column("uint16", ragged=True)}
        assert [s["tokens"].tolist() for s in data] == [[1, 2, 3], [4, 2]]

    def test_lines_are_cut_at_no_part(self, tmp_path: Path) -> None:
        lines = ["", "x", *(f"line {i} " + "ö" * (i % 997) for i in range(3_400)), "the end"]
        file = write(tmp_path / "a.txt", "\r\n".join(lines))
        source = Text(file, documents="line")
        assert source.parts == 4  # of 1 MiB: 3.4 MB
        data = converted(source, tmp_path, workers=2)
        assert [text_of(s["tokens"]) for s in data] == [line for line in lines if line]

    @pytest.mark.parametrize("shift", [-1, 0, 1])
    def test_a_line_that_ends_where_a_part_does_is_read_once(
        self, tmp_path: Path, shift: int
    ) -> None:
        file = write(tmp_path / "a.txt", "x" * (2**20 - 1 + shift) + "\nsecond\n")
        data = converted(Text(file, documents="line"), tmp_path)
        assert [len(s["tokens"]) for s in data] == [2**20 - 1 + shift, 6]

    def test_what_cannot_be_is_told(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", b"caf\xe9")
        assert next(Text(file).read(0))["tokens"][0].tolist() == [99, 97, 102, 233]
        with pytest.raises(DataError, match=r"a.txt is no UTF-8"):
            list(Text(file, tokenizer=words).read(0))
        write(file, "a bcd")
        for options, told in (
            ({"sequence_length": 0}, "sequence_length is 0"),
            ({"documents": "page"}, "documents is 'page'"),
            ({"dtype": "float32"}, "dtype is 'float32'; tokens are whole numbers"),
            ({"sequence_length": 4, "tokenizer": words}, "give the tokenizer's as end_of_document"),
            ({"tokenizer": "words"}, "'words' is no Python object"),
            ({"tokenizer": "nowhere:words"}, "there is no nowhere:words"),
            ({"tokenizer": "math:pi"}, "'math:pi' is no function"),
            ({"end_of_document": 256}, "end_of_document: tokens from 256 to 256 do not go into ui"),
            ({"tokenizer": str.split}, "tokens are <U3 of shape .* list of whole numbers"),
            ({"tokenizer": lambda text: [70_000]}, "70000 do not go into uint16; give a larger"),
        ):
            with pytest.raises(ConfigError, match=told):
                list(Text(file, **options).read(0))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="there is no file or folder"):
            Text(tmp_path / "b.txt")
