"""The bundled datasets: fixed splits, dtypes and ranges, windows, and batches by index list."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from scaledtrain.data import StdlibText, digits, stdlib_text
from scaledtrain.errors import ConfigError

Level = Literal["byte", "char"]


def one_epoch(dataset: TensorDataset | StdlibText, batch_size: int) -> list[list[Tensor]]:
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    batches = BatchSampler(order, batch_size, drop_last=False)
    loader: DataLoader[Any] = DataLoader(dataset, sampler=batches, batch_size=None)
    return list(loader)


class TestDigits:
    def test_splits_have_their_sizes_and_dtypes(self) -> None:
        for dataset, n in ((digits("train"), 1_437), (digits("test"), 360)):
            pixels, labels = dataset.tensors
            assert (pixels.shape, pixels.dtype) == ((n, 64), torch.float32)
            assert (labels.shape, labels.dtype) == ((n,), torch.int64)
            assert (pixels.min().item(), pixels.max().item()) == (0.0, 1.0)

    def test_splits_partition_the_dataset(self) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import, unused-ignore]

        def samples(pixels: Tensor, labels: Tensor) -> set[tuple[float, ...]]:
            return set(map(tuple, torch.column_stack([pixels, labels]).tolist()))

        pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
        everything = samples(pixels / 16, labels)
        train, test = samples(*digits("train").tensors), samples(*digits("test").tensors)
        # No two of the 1,797 samples are equal, so the sets count samples.
        assert len(everything) == 1_797
        assert train | test == everything
        assert train.isdisjoint(test)

    def test_split_is_stratified(self) -> None:
        train = digits("train").tensors[1].bincount()
        test = digits("test").tensors[1].bincount()
        # 360 / 1,797 of each class, rounded to one neighbour or the other.
        expected = (train + test) * 360 / 1_797
        assert ((test - expected).abs() < 1).all()

    def test_split_is_the_same_at_every_call(self) -> None:
        torch.manual_seed(1)
        first = digits("test")
        torch.manual_seed(2)
        for a, b in zip(first.tensors, digits("test").tensors, strict=True):
            assert torch.equal(a, b)

    def test_images_are_the_same_pixels_with_a_channel_dim(self) -> None:
        flat, images = digits("test").tensors[0], digits("test", as_images=True).tensors[0]
        assert images.shape == (360, 1, 8, 8)
        assert torch.equal(images.flatten(1), flat)

    def test_a_list_of_indices_gathers_a_batch(self) -> None:
        dataset = digits("train", as_images=True)
        images, labels = dataset[[3, 1, 2]]
        assert (images.shape, labels.shape) == ((3, 1, 8, 8), (3,))
        assert torch.equal(images[1], dataset[1][0])

    def test_the_documented_loader_visits_every_sample_once(self) -> None:
        dataset = digits("train")
        batches = one_epoch(dataset, 32)
        # 1,437 = 44 * 32 + 29
        assert [len(labels) for _, labels in batches] == [32] * 44 + [29]
        labels = torch.cat([labels for _, labels in batches])
        assert torch.equal(labels.bincount(), dataset.tensors[1].bincount())

    def test_refuses_an_unknown_split(self) -> None:
        with pytest.raises(ConfigError, match="split='valid'.*'train' or 'test'"):
            digits("valid")  # type: ignore[arg-type]

    def test_names_the_extra_when_scikit_learn_is_missing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(ConfigError, match=r"scaledtrain\[examples\]"):
            digits("train")


class TestStdlibText:
    def test_splits_share_no_file(self) -> None:
        train, test = stdlib_text("train", 128), stdlib_text("test", 128)
        assert set(train.files).isdisjoint(test.files)
        # A hash picks one file in ten; 4 standard deviations of that are about 5 % of 600 files.
        assert 0.05 < len(test.files) / len(train.files + test.files) < 0.15
        assert train.fingerprint != test.fingerprint

    def test_reads_only_the_library_itself(self) -> None:
        files = stdlib_text("train", 128).files + stdlib_text("test", 128).files
        folders = {part for name in files for part in name.split("/")[:-1]}
        assert {"argparse.py", "asyncio/tasks.py"} <= set(files)
        assert folders.isdisjoint({"site-packages", "test", "tests", "idlelib", "__pycache__"})
        assert not [name for name in files if "_sysconfigdata" in name]

    @pytest.mark.parametrize("level", ["byte", "char"])
    def test_is_the_same_at_every_call(self, level: Level) -> None:
        first = stdlib_text("test", 64, level=level)
        again = stdlib_text("test", 64, level=level)
        assert first.files == again.files == tuple(sorted(first.files))
        assert first.fingerprint == again.fingerprint
        every = slice(None)
        assert torch.equal(first[every][0], again[every][0])

    @pytest.mark.parametrize("level", ["byte", "char"])
    def test_windows_tile_the_text_and_targets_are_one_later(self, level: Level) -> None:
        dataset = stdlib_text("train", 32, level=level, max_bytes=10_000)
        for i in range(len(dataset) - 1):
            tokens, targets = dataset[i]
            assert (tokens.shape, tokens.dtype) == ((32,), torch.int64)
            assert (targets.shape, targets.dtype) == ((32,), torch.int64)
            assert torch.equal(tokens[1:], targets[:-1])
            assert targets[-1] == dataset[i + 1][0][0]

    def test_tokens_are_the_fingerprinted_text(self) -> None:
        # Windows of 1: the tokens of all windows and the last target are the whole text.
        dataset = stdlib_text("test", 1, max_bytes=5_000)
        tokens, targets = dataset[:]
        text = dataset.decode(torch.cat([tokens[:, 0], targets[-1]]))
        assert hashlib.sha256(text.encode()).hexdigest() == dataset.fingerprint

    def test_last_full_window_is_kept_and_the_rest_left_out(self) -> None:
        # The first files are ASCII, so bytes are tokens: n windows of 100 need 100 n + 1 of them.
        assert len(stdlib_text("train", 100, max_bytes=300)) == 2
        assert len(stdlib_text("train", 100, max_bytes=301)) == 3

    def test_a_list_of_indices_gathers_a_batch(self) -> None:
        dataset = stdlib_text("train", 16, max_bytes=5_000)
        tokens, targets = dataset[[7, 0, 3]]
        assert tokens.shape == targets.shape == (3, 16)
        assert tokens.is_contiguous()
        assert targets.is_contiguous()
        for row, i in enumerate((7, 0, 3)):
            assert torch.equal(tokens[row], dataset[i][0])
            assert torch.equal(targets[row], dataset[i][1])

    def test_writing_into_an_item_leaves_the_dataset_as_it_was(self) -> None:
        dataset = stdlib_text("train", 16, max_bytes=5_000)
        tokens, targets = dataset[0]
        kept = tokens.clone()
        tokens.zero_()
        assert torch.equal(dataset[0][0], kept)
        assert torch.equal(targets[:-1], kept[1:])

    def test_the_documented_loader_visits_every_window_once(self) -> None:
        dataset = stdlib_text("train", 16, max_bytes=5_000)
        seen = torch.cat([tokens for tokens, _ in one_epoch(dataset, 32)])
        in_order, _ = dataset[:]
        assert sorted(seen.tolist()) == sorted(in_order.tolist())

    def test_refuses_an_index_past_the_end(self) -> None:
        dataset = stdlib_text("train", 16, max_bytes=500)
        assert len(dataset) == 31  # (500 - 1) // 16
        with pytest.raises(IndexError):
            dataset[31]

    def test_survives_pickling_for_loader_workers(self) -> None:
        dataset = stdlib_text("train", 16, level="char", max_bytes=5_000)
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[3][0], dataset[3][0])
        assert copy.fingerprint == dataset.fingerprint

    @pytest.mark.parametrize(
        ("level", "text"),
        [
            ("byte", "def f(x):\n    return '\u00e9\u20ac\U0001f40d'\n"),
            ("char", "def f(x):\n    return [x, '#']\n"),
            ("byte", ""),
            ("char", ""),
        ],
    )
    def test_decoding_reverses_encoding(self, level: Level, text: str) -> None:
        dataset = stdlib_text("train", 16, level=level, max_bytes=500)
        tokens = dataset.encode(text)
        assert tokens.dtype == torch.int64
        assert dataset.decode(tokens) == text

    def test_a_character_that_training_never_saw_becomes_the_reserved_id(self) -> None:
        dataset = stdlib_text("train", 16, level="char", max_bytes=500)
        unseen = "\U000f0000"  # a private-use character
        assert dataset.encode(f"a{unseen}b").tolist() == [
            dataset.encode("a").item(),
            0,
            dataset.encode("b").item(),
        ]
        assert dataset.decode(dataset.encode(unseen)) == "\ufffd"

    def test_both_splits_share_one_vocabulary_whatever_the_cap(self) -> None:
        train = stdlib_text("train", 16, level="char")
        test = stdlib_text("test", 16, level="char", max_bytes=500)
        assert train.vocab_size == test.vocab_size
        assert torch.equal(train.encode("lambda: 0"), test.encode("lambda: 0"))
        assert int(train[:][0].max()) < train.vocab_size

    def test_byte_level_has_256_ids(self) -> None:
        assert stdlib_text("test", 16, max_bytes=500).vocab_size == 256

    def test_refuses_a_text_too_short_for_one_window(self) -> None:
        with pytest.raises(ConfigError, match="has 100 tokens.*sequence_length=128.*take 129"):
            stdlib_text("train", 128, max_bytes=100)

    @pytest.mark.parametrize("name", ["sequence_length", "max_bytes"])
    def test_refuses_a_size_below_one(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"{name}=0"):
            stdlib_text("train", **{"sequence_length": 16, name: 0})  # type: ignore[arg-type]

    def test_refuses_an_unknown_split_or_level(self) -> None:
        with pytest.raises(ConfigError, match="split='valid'"):
            stdlib_text("valid", 16)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="level='word'"):
            stdlib_text("train", 16, level="word")  # type: ignore[arg-type]

    def test_says_when_the_library_is_not_in_files(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(ConfigError, match="found no train file"):
            stdlib_text("train", 16)
