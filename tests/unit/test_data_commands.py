"""``python -m scaledtrain.data``, as its user calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from scaledtrain.data import Column, ShardedDataset, ShardWriter
from scaledtrain.data.commands import run
from scaledtrain.data.convert import class_names
from scaledtrain.errors import ConfigError
from tests.sharded_samples import damage, shard, write

ROOT = Path(__file__).parents[2]

Call = Callable[..., list[str]]


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Call:
    """Runs a command in the test's folder, and returns the lines that it writes."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str, code: int = 0) -> list[str]:
        assert run(arguments) == code
        captured = capsys.readouterr()
        assert captured.err == ""  # no progress bar without a terminal
        return captured.out.splitlines()

    return called


class TestWrite:
    def test_arrays(self, call: Call) -> None:
        digits = load_digits()
        np.save("x.npy", digits.images)
        np.save("y.npy", digits.target)
        options = ("--shard-mib", "0.25", "--workers", "2")
        told = call("write", "arrays", "x.npy", "label=y.npy", "out", *options)
        assert told == ["out: 1,797 samples"]
        data = ShardedDataset("out")
        assert np.array_equal(data[:]["x"].numpy(), digits.images)
        assert data[:]["label"].tolist() == digits.target.tolist()
        # 520 bytes a sample: 505 of them are the first that have 262,144
        assert [s.samples for s in data.manifest.shards] == [505, 505, 505, 282]
        np.savez("both.npz", x=digits.images, label=digits.target)
        call("write", "arrays", "both.npz", "npz", *options)
        assert ShardedDataset("npz").manifest == data.manifest

    def test_tables(self, call: Call, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("x;kind;n\n1;a;2\n3;b;4\n")
        call(
            *("write", "csv", "a.csv", "out", "--delimiter", ";", "--columns", "x,kind"),
            *("--dtypes", "x=float32", "--categories", "kind=b,a"),
        )
        data = ShardedDataset("out")
        assert data.columns == {"x": Column("float32"), "kind": Column("int64")}
        assert data[:]["kind"].tolist() == [1, 0]
        from pyarrow import csv, parquet

        options = csv.ParseOptions(delimiter=";")
        parquet.write_table(csv.read_csv("a.csv", parse_options=options), "b.parquet")
        call("write", "parquet", "b.parquet", "out", "--overwrite", "--columns", "n")
        assert ShardedDataset("out")[:]["n"].tolist() == [2, 4]

    def test_images(self, call: Call, tmp_path: Path) -> None:
        for name in ("x", "y"):
            (tmp_path / "in" / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "in" / name / "1.png")
        call("write", "images", "in", "out", "--size", "2", "3", "--mode", "L")
        assert ShardedDataset("out").columns["image"] == Column("uint8", (1, 2, 3))
        assert class_names("out") == {"label": ["x", "y"]}
        call("write", "images", "in", "out", "--encoded", "--overwrite")
        assert ShardedDataset("out").columns["image"] == Column("uint8", ragged=True)
        with pytest.raises(ConfigError, match="--encoded keeps images as they are"):
            call("write", "images", "in", "out", "--encoded", "--size", "2", "3")

    def test_text(self, call: Call, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("ab\ncd\n")
        call(
            *("write", "text", ".", "out", "--pattern", "*.md", "--sequence-length", "2"),
            *("--documents", "line", "--end-of-document", "7", "--dtype", "int32"),
        )
        assert ShardedDataset("out")[:]["tokens"].tolist() == [[97, 98], [7, 99], [100, 7]]

    def test_torch(self, call: Call) -> None:
        call("write", "torch", "scaledtrain.data:digits", "out", "--names", "pixels,digit")
        assert list(ShardedDataset("out").columns) == ["pixels", "digit"]
        assert len(ShardedDataset("out")) == 1_437

    def test_resuming(self, call: Call) -> None:
        np.save("x.npy", np.arange(10))
        call("write", "arrays", "x.npy", "out")
        with pytest.raises(ConfigError, match="holds a data set already"):
            call("write", "arrays", "x.npy", "out")
        assert call("write", "arrays", "x.npy", "out", "--resume") == ["out: 10 samples"]

    def test_wrong_arguments_are_told(self, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments, told in (
            ((), "required: COMMAND"),
            (("write",), "required: FORMAT"),
            (("write", "arrays", "out"), "required: OUTPUT"),
            (("write", "words", "a", "out"), "invalid choice: 'words'"),
            (("write", "text", "a", "out", "--resume", "--overwrite"), "not allowed with"),
        ):
            with pytest.raises(SystemExit) as end:
                call(*arguments)
            assert end.value.code == 2
            assert told in capsys.readouterr().err
        np.save("x.npy", np.arange(10))
        with pytest.raises(ConfigError, match="two files are for column 'x'; name one"):
            call("write", "arrays", "x.npy", "./x.npy", "out")
        with pytest.raises(ConfigError, match="--dtypes got 'float32'; write COLUMN="):
            call("write", "csv", "x.npy", "out", "--dtypes", "float32")


class TestLooking:
    def test_inspect(self, call: Call) -> None:
        write(Path("ten"), 10)
        told = call("inspect", "ten")
        size = sum(file.stat().st_size for file in Path("ten").glob("*.safetensors"))
        assert told == [
            "ten: complete",
            "samples  10",
            f"bytes    {size:,} (0.0 MiB)",
            "shards   3, of 2 to 4 samples",
            "columns",
            "  x       float32 [2]",
            "  tokens  uint16 [length]",
            "  label   int64",
        ]

    def test_inspect_what_is_empty_or_not_finished(self, call: Call) -> None:
        with ShardWriter("empty"):
            pass
        assert call("inspect", "empty")[:2] == ["empty: complete", "samples  0"]
        manifest = write(Path("begun"), 4) / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
        assert call("inspect", "begun")[0] == "begun: not finished"
        assert call("verify", "begun")[-1].endswith("; the data set is not finished")
        assert call("head", "begun", "-n", "1")[0] == "sample 0"

    def test_head(self, call: Call) -> None:
        write(Path("ten"), 10)
        assert call("head", "ten", "-n", "2") == [
            *("sample 0", "  x: float32 [2] 0, 0.5", "  tokens: uint16 [0] ", "  label: 0"),
            *("sample 1", "  x: float32 [2] 1, 1.5", "  tokens: uint16 [1] 1", "  label: 1"),
        ]
        assert call("head", "ten", "--columns", "label")[-2:] == ["sample 4", "  label: 4"]
        assert call("head", "ten", "-n", "0") == []
        with pytest.raises(ConfigError, match="no column 'z'"):
            call("head", "ten", "--columns", "z")

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"", "uint8 [0] ''"),
            ("Zoë\n".encode(), "uint8 [5] 'Zoë\\n'"),
            ("ö".encode() * 200, f"uint8 [400] '{'ö' * 60}'..."),
            (b"a" + "ö".encode() * 200, f"uint8 [401] 'a{'ö' * 59}'..."),  # cut in a character
            (b"\xff\xd8" * 9, "uint8 [18] b'" + r"\xff\xd8" * 8 + "'..."),
            (b"caf\xe9", "uint8 [4] b'caf\\xe9'"),
        ],
    )
    def test_bytes_are_text_if_they_can_be(self, call: Call, content: bytes, told: str) -> None:
        with ShardWriter("out") as writer:
            writer.write({"x": content})
        assert call("head", "out") == ["sample 0", f"  x: {told}"]

    def test_classes_are_called_by_name(self, call: Call, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("k\nja\nno\n")
        call("write", "csv", "a.csv", "out", "--categories", "k=no,ja")
        assert call("head", "out")[1::2] == ["  k: 1 (ja)", "  k: 0 (no)"]
        assert call("inspect", "out")[-1] == "  k  int64  2 classes: no, ja"


class TestVerify:
    def test_each_damaged_shard_is_named(self, call: Call) -> None:
        write(Path("ten"), 10)
        assert call("verify", "ten") == ["ten: 0 of 3 shards damaged"]
        damage(shard(Path("ten"), 0), -1)
        shard(Path("ten"), 2).unlink()
        first, third, last = call("verify", "ten", code=1)
        assert "shard-00000.safetensors is damaged: bytes " in first
        assert "shard-00002.safetensors cannot be read: " in third
        assert last == "ten: 2 of 3 shards damaged"

    def test_all_of_a_file_is_read(self, call: Call) -> None:
        write(Path("one"), 1, shard_samples=1)
        file = shard(Path("one"), 0)
        whole = file.read_bytes()
        for place in range(0, len(whole), len(whole) // 12):
            damage(file, place)
            assert "is damaged: " in call("verify", "one", code=1)[0]
            file.write_bytes(whole)

    def test_where_there_is_none(self, call: Call) -> None:
        with pytest.raises(ConfigError, match="holds no data set"):
            call("verify", ".")


class TestReshard:
    def test_another_order_and_size(self, call: Call) -> None:
        write(Path("ten"), 10)
        options = ("--shuffle", "full", "--seed", "1", "--shard-samples", "5", "--columns", "label")
        assert call("reshard", "ten", "out", *options) == ["out: 10 samples"]
        data = ShardedDataset("out")
        assert [s.samples for s in data.manifest.shards] == [5, 5]
        labels = data[:]["label"].tolist()
        assert sorted(labels) == list(range(10)) != labels

    def test_not_onto_itself(self, call: Call) -> None:
        write(Path("ten"), 10)
        with pytest.raises(ConfigError, match="is read and cannot be written to"):
            call("reshard", "ten", "./ten", "--overwrite")
        assert len(ShardedDataset("ten")) == 10


SLOW = "import time\ndef lengths(text):\n    time.sleep(0.05)\n    return [len(text)]\n"


def test_ctrl_c_ends_a_real_command_which_can_be_resumed(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "a.txt").write_text("".join(f"{'x' * (50_000 + i)}\n" for i in range(200)))
    arguments = ["write", "text", "a.txt", "out", "--documents", "line", "--workers", "2"]
    arguments += ["--tokenizer", "slow:lengths", "--shard-samples", "5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    with subprocess.Popen(
        [sys.executable, "-m", "scaledtrain.data", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        manifest = tmp_path / "out/manifest.json"
        while not manifest.exists() and command.poll() is None:
            time.sleep(0.02)
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does
        output, errors = command.communicate(timeout=30)
    assert (command.returncode, output, errors) == (130, "", "interrupted\n")
    (tmp_path / "slow.py").write_text(SLOW.replace("0.05", "0"))
    monkeypatch.syspath_prepend(tmp_path)
    assert call(*arguments, "--resume") == ["out: 200 samples"]
    found = ShardedDataset("out")[:]["tokens"]
    assert found.values.tolist() == [50_000 + i for i in range(200)]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        *(f"shard-{i:05d}.safetensors" for i in range(40)),
    ]


def test_stats_are_computed_stored_and_shown(call: Call, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", shard_samples=2) as writer:
        writer.write_batch({"x": [[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], "y": [0, 1, 0]})
    # x[0]: the mean of 1, 2, 6 is 3; the squared distances 4, 1, 9 have the mean 14/3, its root
    # is 2.16025. y: 1/3, and sqrt(1/3 - 1/9) = 0.471405.
    expected = [
        "x[0]  mean 3  std 2.16025  from 1 to 6",
        "x[1]  mean 5  std 0  from 5 to 5",
        "y  mean 0.333333  std 0.471405  from 0 to 1",
        "y  2 classes: 0: 2, 1: 1",
    ]
    assert call("stats", "set", "--classes", "y") == expected
    shown = call("inspect", "set")
    assert shown[shown.index("statistics") + 1 :] == [f"  {line}" for line in expected]
    # 24 / 6; the squared distances 9 + 1 + 4 + 1 + 4 + 1 = 20, and the root of 20 / 6.
    assert call("stats", "set", "--columns", "x", "--axis") == [
        "x  mean 4  std 1.82574  from 1 to 6"
    ]
    with ShardWriter(tmp_path / "set", resume=True) as writer:
        writer.write({"x": [0.0, 0.0], "y": 1})
    assert "statistics, of fewer samples than there are now" in call("inspect", "set")
    with pytest.raises(ConfigError, match="no column 'z'"):
        call("stats", "set", "--columns", "z")
