"""The Python standard library's own source, as a corpus for language models without a download."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scaledtrain.errors import ConfigError

__all__ = ["StdlibText", "stdlib_text"]

EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "site-packages", "test", "tests"}
)
# Written when an interpreter is built or packaged: they differ between machines of one version.
MACHINE_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
UNKNOWN = "\ufffd"


@final
class StdlibText(Dataset[tuple[Tensor, Tensor]]):
    """Windows of ``sequence_length`` tokens over one split; made by :func:`stdlib_text`.

    Window ``i`` starts at token ``i * sequence_length``; its targets are the same window one token
    later. All tokens lie in one tensor of the smallest dtype (uint8 up to 256 ids, else int32), and
    what is indexed is copied out of it as int64.

    ``dataset[i]`` gives two int64 ``[sequence_length]`` tensors, and a list of ``n`` indices gives
    two int64 ``[n, sequence_length]``, gathered at once. So the fast loader is::

        DataLoader(dataset, sampler=BatchSampler(RandomSampler(dataset), 32, drop_last=False),
                   batch_size=None)

    Args:
        text: of the split.
        files: that it is from, in order.
        sequence_length: tokens in a window.
        tokenizer: from text to ids, and back.

    Attributes:
        vocab_size: Number of token ids.
        sequence_length: Tokens in a window.
        files: Relative posix paths of the source files read, in order.
        fingerprint: sha256, in hex, of the text as UTF-8; the same for either level.
    """

    def __init__(
        self, text: str, files: tuple[str, ...], sequence_length: int, tokenizer: _Tokenizer
    ) -> None:
        tokens = tokenizer.encode(text)
        if len(tokens) <= sequence_length:
            raise ConfigError(
                f"stdlib_text has {len(tokens)} tokens here, but a window of sequence_length="
                f"{sequence_length} and its shifted targets take {sequence_length + 1}: "
                "raise max_bytes or shorten sequence_length"
            )
        self._tokenizer = tokenizer
        # A view [n, sequence_length + 1]; neighbouring rows share one token.
        self._windows = tokens.unfold(0, sequence_length + 1, sequence_length)
        self.vocab_size = tokenizer.vocab_size
        self.sequence_length = sequence_length
        self.files = files
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        """Number of windows; the tokens after the last full one are left out."""
        return len(self._windows)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return (tokens, targets) of one window, or of several as a batch."""
        windows = self._windows[index]
        return windows[..., :-1].to(torch.int64), windows[..., 1:].to(torch.int64)

    def encode(self, text: str) -> Tensor:
        """Turn a text into token ids, int64 ``[n]``; at level "char", an unknown one becomes 0."""
        return self._tokenizer.encode(text).to(torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Turn token ids ``[n]`` of any integer dtype into text; U+FFFD marks what is none."""
        return self._tokenizer.decode(tokens)


def stdlib_text(
    split: Literal["train", "test"],
    sequence_length: int,
    level: Literal["byte", "char"] = "byte",
    max_bytes: int | None = None,
) -> StdlibText:
    """Read the running interpreter's standard library as a text to model.

    The corpus is every ``.py`` file below ``sysconfig.get_paths()["stdlib"]``, sorted by relative
    posix path and concatenated, without installed packages, tests, ``idlelib`` and files that are
    written when the interpreter is built. A hash of its path sends about one file in ten to the
    test split, so the splits share no file and a file never changes sides. A window may cross from
    one file into the next.

    **The text depends on the Python version**: losses compare only between runs with equal
    :attr:`StdlibText.fingerprint`, so log it. CPython 3.11 has 10.5 MB to train on and 0.8 MB to
    test.

    Args:
        split: ``"train"`` or ``"test"``.
        sequence_length: Tokens in a window.
        level: ``"byte"``: the UTF-8 bytes, 256 ids. ``"char"``: the characters of the whole train
            split, whatever ``split`` and ``max_bytes`` are, so that both splits share their ids;
            id 0 is U+FFFD and stands for every character that is not among them.
        max_bytes: Read only so many bytes from the start of the split, less a character cut in two.

    Returns:
        A dataset of (tokens, targets), each int64 ``[sequence_length]``; a list of indices gives a
        batch. See :class:`StdlibText`.

    Raises:
        ConfigError: An argument has no such value, the text is too short for one window, or the
            interpreter's library does not lie in files.

    Example:
        >>> train = stdlib_text("train", sequence_length=128, max_bytes=100_000)
        >>> train.vocab_size, len(train)  # (100,000 - 1) // 128 windows
        (256, 781)
        >>> tokens, targets = train[[0, 1, 2]]
        >>> tuple(tokens.shape), bool((tokens[:, 1:] == targets[:, :-1]).all())
        ((3, 128), True)
    """
    if split not in ("train", "test"):
        raise ConfigError(
            f"stdlib_text got split={split!r}, but has only two: give 'train' or 'test'"
        )
    if level not in ("byte", "char"):
        raise ConfigError(
            f"stdlib_text got level={level!r}, but knows only two: give 'byte' or 'char'"
        )
    for name, value in (("sequence_length", sequence_length), ("max_bytes", max_bytes)):
        if value is not None and value < 1:
            raise ConfigError(f"stdlib_text got {name}={value}; give at least 1")
    text, files = _read(split, max_bytes)
    tokenizer = _ByteTokenizer() if level == "byte" else _CharTokenizer(_train_characters())
    return StdlibText(text, files, sequence_length, tokenizer)


def _read(split: str, max_bytes: int | None) -> tuple[str, tuple[str, ...]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = bytearray()
    files = []
    for name in sorted(_source_files(root)):
        if max_bytes is not None and len(corpus) >= max_bytes:
            break
        if _split_of(name) == split:
            corpus += (root / name).read_bytes()
            files.append(name)
    if not files:
        raise ConfigError(
            f"stdlib_text found no {split} file of Python {platform.python_version()} below {root};"
            " this interpreter keeps its library elsewhere (a zip archive?): use another one"
        )
    return corpus[:max_bytes].decode("utf-8", errors="ignore"), tuple(files)


def _source_files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in EXCLUDED_FOLDERS and not name.startswith(MACHINE_PREFIXES)
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(MACHINE_PREFIXES):
                yield Path(folder, name).relative_to(root).as_posix()


def _split_of(name: str) -> str:
    digest = hashlib.sha256(name.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def _train_characters() -> str:
    text, _ = _read("train", max_bytes=None)
    return "".join(sorted(set(text) - {UNKNOWN}))


class _Tokenizer(Protocol):
    vocab_size: int

    def encode(self, text: str) -> Tensor: ...

    def decode(self, tokens: Tensor) -> str: ...


class _ByteTokenizer:
    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        return _tensor_of(text.encode(), torch.uint8)

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


class _CharTokenizer:
    def __init__(self, characters: str) -> None:
        self._characters = UNKNOWN + characters
        self.vocab_size = len(self._characters)
        dtype = torch.uint8 if self.vocab_size <= 256 else torch.int32
        self._id_of_code_point = torch.zeros(sys.maxunicode + 1, dtype=dtype)
        codes = self._code_points(self._characters)
        self._id_of_code_point[codes] = torch.arange(self.vocab_size).to(dtype)

    def encode(self, text: str) -> Tensor:
        return self._id_of_code_point[self._code_points(text)]

    def decode(self, tokens: Tensor) -> str:
        return "".join(self._characters[token] for token in tokens.tolist())

    @staticmethod
    def _code_points(text: str) -> Tensor:
        # int32 is the index dtype that needs half the memory of int64.
        return _tensor_of(text.encode(f"utf-32-{sys.byteorder[0]}e"), torch.int32)


def _tensor_of(data: bytes, dtype: torch.dtype) -> Tensor:
    # torch.frombuffer refuses an empty buffer, and warns of a read-only one.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
