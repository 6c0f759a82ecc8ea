"""Writing sources as sharded data sets: workers, crashes, resuming."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from scaledtrain.data import ShardedDataset
from scaledtrain.data.convert import Arrays, Source, Text, convert
from scaledtrain.data.convert.source import Batch
from scaledtrain.errors import ConfigError, DataError, WaitTimeoutError


class Numbers(Source):
    """10 parts of 3 samples; ``before(part)`` is called before each is read."""

    parts = 10
    identity = "numbers"

    def __init__(self, before: Callable[[int], object] = lambda part: None) -> None:
        self._before = before

    def read(self, part: int) -> Iterator[Batch]:
        self._before(part)
        for low, high in ((0, 2), (2, 3)):
            yield {"x": np.arange(3 * part + low, 3 * part + high)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def values(folder: Path) -> list[int]:
    return [sample["x"].item() for sample in ShardedDataset(folder)]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text, encoding="utf-8")
    return path


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestWorkers:
    @pytest.mark.parametrize("workers", [2, 3, 30])
    def test_the_files_are_the_same_for_any_number(self, tmp_path: Path, workers: int) -> None:
        assert convert(Numbers(), tmp_path / "one", shard_samples=4) == 30
        assert convert(Numbers(), tmp_path / "many", workers=workers, shard_samples=4) == 30
        assert values(tmp_path / "one") == list(range(30))
        assert files(tmp_path / "many") == files(tmp_path / "one")
        # 30 samples, 4 in a shard, and nothing is left that is not of the data set
        assert len(files(tmp_path / "one")) == 8 + 1

    def test_large_arrays_and_text_come_whole_from_them(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).random((3_000, 500))  # 12 MB: three parts
        texts = np.array([[i, i + 1] for i in range(3_000)], np.uint16)
        source = Arrays({"x": x, "y": texts})
        assert source.parts == 3
        assert convert(source, tmp_path, workers=2) == 3_000
        found = ShardedDataset(tmp_path)[:]
        assert np.array_equal(found["x"].numpy(), x)
        assert np.array_equal(found["y"].numpy(), texts)

    def test_each_has_its_parts(self, tmp_path: Path) -> None:
        def note(part: int) -> None:
            (tmp_path / f"{part}-{os.getpid()}").touch()

        convert(Numbers(note), tmp_path / "out", workers=3)
        by_process: dict[str, list[int]] = {}
        for path in tmp_path.glob("*-*"):
            part, process = path.name.split("-")
            by_process.setdefault(process, []).append(int(part))
        assert sorted(map(sorted, by_process.values())) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]

    def test_an_error_in_one_is_told(self, tmp_path: Path) -> None:
        def fail(part: int) -> None:
            if part == 5:
                raise ConfigError("a value is missing in x")
            if part == 7:
                raise ZeroDivisionError("seven")

        with pytest.raises(ConfigError, match="a value is missing in x"):
            convert(Numbers(fail), tmp_path, workers=2, shard_samples=4)
        with pytest.warns(UserWarning, match="its first 12 samples"):  # parts 0 to 4 are 15
            assert values(tmp_path) == list(range(12))

    def test_an_error_that_is_not_ours_comes_with_its_traceback(self, tmp_path: Path) -> None:
        def fail(part: int) -> None:
            raise ZeroDivisionError("seven")

        with pytest.raises(DataError, match="(?s)part 0 of the input.*in fail.*Error: seven"):
            convert(Numbers(fail), tmp_path, workers=2)
        assert files(tmp_path) == {}

    def test_one_that_is_stuck_is_told(self, tmp_path: Path) -> None:
        def sleep(part: int) -> None:
            if part == 3:
                time.sleep(60)

        with pytest.raises(WaitTimeoutError, match="worker 1, which reads part 3"):
            convert(Numbers(sleep), tmp_path, workers=2, timeout_seconds=0.5)

    def test_there_is_at_least_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="workers is 0"):
            convert(Numbers(), tmp_path, workers=0)


class TestCrashes:
    def test_kill_9_of_a_worker_leaves_a_prefix_that_is_resumed(self, tmp_path: Path) -> None:
        def die(part: int) -> None:
            if part == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(DataError, match=r"worker 1 was lost \(killed by SIGKILL\).*part 7"):
            convert(Numbers(die), tmp_path / "one", workers=3, shard_samples=4)
        with pytest.warns(UserWarning, match="its first 20 samples"):  # parts 0 to 6 are 21
            assert values(tmp_path / "one") == list(range(20))
        read: list[int] = []
        assert convert(Numbers(read.append), tmp_path / "one", shard_samples=4, resume=True) == 30
        assert read == [6, 7, 8, 9]  # sample 20 is in part 6
        convert(Numbers(), tmp_path / "whole", shard_samples=4)
        assert files(tmp_path / "one") == files(tmp_path / "whole")

    def test_kill_9_of_the_writer_leaves_a_prefix_and_ends_the_workers(
        self, tmp_path: Path
    ) -> None:
        out, pids = tmp_path / "out", tmp_path / "pids"
        pids.mkdir()

        def stall(part: int) -> None:
            (pids / str(os.getpid())).touch()
            if part >= 6:
                time.sleep(60)

        writer = os.fork()
        if not writer:
            try:
                convert(Numbers(stall), out, workers=3, shard_samples=4)
            finally:
                os._exit(1)
        manifest = out / "manifest.json"
        while not (manifest.exists() and "shard-00003" in manifest.read_text()):
            time.sleep(0.01)  # the timeout of the test ends this, at the worst
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        # Its lock went with it, although the workers are still on their way out.
        assert convert(Numbers(), out, workers=2, shard_samples=4, resume=True) == 30
        convert(Numbers(), tmp_path / "whole", shard_samples=4)
        assert files(out) == files(tmp_path / "whole")
        workers = [int(path.name) for path in pids.iterdir()]
        assert len(workers) == 3
        while any(map(runs, workers)):
            time.sleep(0.01)

    def test_what_is_not_finished_is_resumed_from_the_same_source_alone(
        self, tmp_path: Path
    ) -> None:
        def fail(part: int) -> None:
            if part == 5:
                raise ConfigError("enough")

        source = Numbers(fail)
        with pytest.raises(ConfigError, match="enough"):
            convert(source, tmp_path, shard_samples=4)
        source.identity = "others"
        with pytest.raises(ConfigError, match="begun with another input or other options"):
            convert(source, tmp_path, resume=True)
        with pytest.raises(ConfigError, match="holds a data set already"):
            convert(Numbers(), tmp_path)
        (tmp_path / ".parts").unlink()
        with pytest.raises(ConfigError, match="no converter wrote it"):
            convert(Numbers(), tmp_path, resume=True)
        assert convert(Numbers(), tmp_path, overwrite=True) == 30

    def test_a_note_that_was_cut_off_is_not_believed(self, tmp_path: Path) -> None:
        def fail(part: int) -> None:
            if part == 5:
                raise ConfigError("enough")

        with pytest.raises(ConfigError, match="enough"):
            convert(Numbers(fail), tmp_path, shard_samples=4)
        notes = tmp_path / ".parts"
        head, *ends = notes.read_text().splitlines()
        assert ends == ["3", "6", "9", "12", "15"]
        notes.write_text("\n".join([head, "3", "6", "1"]))  # of "12", say
        read: list[int] = []
        convert(Numbers(read.append), tmp_path, resume=True)
        assert read == [2, 3, 4, 5, 6, 7, 8, 9]  # 12 samples are there, but where is not known
        assert values(tmp_path) == list(range(30))

    def test_what_is_complete_is_left_alone(self, tmp_path: Path) -> None:
        convert(Numbers(), tmp_path)
        before = files(tmp_path)

        def fail(part: int) -> None:
            raise AssertionError

        assert convert(Numbers(fail), tmp_path, resume=True) == 30
        assert files(tmp_path) == before

    def test_nothing_begun_is_begun(self, tmp_path: Path) -> None:
        assert convert(Numbers(), tmp_path, resume=True) == 30

    def test_no_samples_are_an_error_that_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="the input has no samples"):
            convert(Arrays({"x": np.zeros((0, 2))}), tmp_path)
        assert files(tmp_path) == {}


class TestPacking:
    def test_tokens_are_carried_over_between_documents_and_parts(self, tmp_path: Path) -> None:
        texts = [f"{i} " * 150_000 for i in range(5)]  # 300 kB each: more than one part
        for i, text in enumerate(texts):
            write(tmp_path / "texts" / f"{i}.txt", text)
        source = Text(tmp_path / "texts", 1_000)
        assert source.parts == 2  # of 1 MiB: four files and one
        assert convert(source, tmp_path / "out", workers=2) == 1_500
        stream = b"".join(text.encode() + b"\0" for text in texts)  # 1,500,005 bytes
        found = ShardedDataset(tmp_path / "out")[:]["tokens"].numpy()
        assert found.shape == (1_500, 1_000)
        assert found.tobytes() == stream[:1_500_000]

    def test_it_is_resumed_inside_a_document(self, tmp_path: Path) -> None:
        for i in range(8):
            write(tmp_path / "texts" / f"{i}.txt", chr(ord("a") + i) * 300_000)

        def stop(parts: int, samples: int) -> None:
            if parts == 2:
                raise KeyboardInterrupt

        source = Text(tmp_path / "texts", 7_000)
        for name in ("whole", "resumed"):
            if name == "resumed":
                with pytest.raises(KeyboardInterrupt):
                    convert(source, tmp_path / name, shard_samples=10, on_part=stop)
            convert(source, tmp_path / name, shard_samples=10, resume=name == "resumed")
        # 8 x 300,001 bytes are 342 sequences of 7,000 and a rest
        assert len(ShardedDataset(tmp_path / "whole")) == 342
        assert files(tmp_path / "resumed") == files(tmp_path / "whole")

    def test_fewer_tokens_than_a_sequence_are_an_error(self, tmp_path: Path) -> None:
        source = Text(write(tmp_path / "a.txt", "abc"), 5)
        with pytest.raises(ConfigError, match="only 4 tokens, which fill no sequence of 5"):
            convert(source, tmp_path / "out")
