"""Text files, as bytes or as the tokens that a tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, final

import numpy as np

from scaledtrain.data.convert.source import (
    Batch,
    Paths,
    Source,
    find_files,
    load_object,
    names_and_sizes,
)
from scaledtrain.data.sharded import Column
from scaledtrain.data.sharded.columns import DTYPES, Array
from scaledtrain.errors import ConfigError, DataError

__all__ = ["Text"]

PART_BYTES = 2**20  # of text
END_OF_BYTES = 0  # ends a document where tokens are bytes: no text has it


class _Piece(NamedTuple):
    """Documents of a file that lie between two of its bytes."""

    file: Path
    start: int
    stop: int


@final
class Text(Source):
    r"""Text files; the column is ``tokens``.

    With a ``sequence_length``, a sample is so many tokens: documents one after the other, each
    followed by ``end_of_document``, cut wherever a sequence is full; what fills none at the very
    end is left out. Without, a sample is a document, of its own length (a ragged column).
    Documents without a token are left out. A document is in memory as a whole, unless it is packed
    as bytes: give ``documents="line"`` for a corpus in one file.

    Args:
        paths: files, and folders of them.
        sequence_length: tokens in a sample; None: samples are documents.
        tokenizer: a function text -> its tokens (a list or an array of whole numbers), or
            ``"module:name"`` of one; None: tokens are the bytes of the text as it is.
        end_of_document: token behind each document; None: byte 0 where bytes are packed, otherwise
            none, but packing tokens needs one.
        documents: ``"file"``: a file is a document; ``"line"``: each line that is not empty is one.
        dtype: of the tokens; None: uint8 for bytes, uint16 for a tokenizer's.
        pattern: which files of a folder are meant.

    Raises:
        ConfigError: there is no such file or tokenizer, or a token does not go into the dtype.
        DataError: (when read) a file that is tokenized is no UTF-8.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> (Path(folder.name) / "a.txt").write_text("to be\nor not\n")
        13
        >>> source = Text(folder.name, sequence_length=4, documents="line")
        >>> next(source.read(0))["tokens"].tolist()  # bytes
        [116, 111, 32, 98, 101, 0, 111, 114, 32, 110, 111, 116, 0]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        paths: Paths,
        sequence_length: int | None = None,
        *,
        tokenizer: str | Callable[[str], Any] | None = None,
        end_of_document: int | None = None,
        documents: Literal["file", "line"] = "file",
        dtype: str | None = None,
        pattern: str = "*.txt",
    ) -> None:
        if documents not in ("file", "line"):
            raise ConfigError(f"documents is {documents!r}; it is 'file' or 'line'")
        if sequence_length is not None and sequence_length < 1:
            raise ConfigError(f"sequence_length is {sequence_length}; it is >= 1, or left out")
        if sequence_length is not None and end_of_document is None:
            if tokenizer is not None:
                raise ConfigError(
                    "documents are packed, so a token has to end each of them; give the "
                    "tokenizer's as end_of_document"
                )
            end_of_document = END_OF_BYTES
        self.sequence_length = sequence_length
        self._tokenizer = tokenizer
        if tokenizer is not None:
            _ = self._encode  # so that a wrong name is told now
        self._by_lines = documents == "line"
        self._dtype = dtype or ("uint8" if tokenizer is None else "uint16")
        if not self._dtype.lstrip("u").startswith("int"):
            raise ConfigError(f"dtype is {self._dtype!r}; tokens are whole numbers: uint16, say")
        shape = () if sequence_length is None else (sequence_length,)
        self.columns = {"tokens": Column(self._dtype, shape, ragged=sequence_length is None)}
        end = [] if end_of_document is None else [end_of_document]
        self._end = self._as_tokens(end, "end_of_document")
        self._files = find_files(paths, pattern)
        self._parts = self._cut_lines() if self._by_lines else self._group_files()
        self.parts = len(self._parts)
        if callable(tokenizer):
            tokenizer = getattr(tokenizer, "__qualname__", type(tokenizer).__qualname__)
        options = (sequence_length, tokenizer, end, documents, self._dtype)
        self.identity = f"text {options} {names_and_sizes(self._files)}"

    def read(self, part: int) -> Iterator[Batch]:
        """Tokens one after the other, or those of each document."""
        documents = self._documents(part)
        if self.sequence_length is None:
            if found := list(documents):
                yield {"tokens": found}
            return
        flat: list[Array] = []
        nbytes = 0
        for tokens in documents:
            flat.append(tokens)
            nbytes += tokens.nbytes
            if nbytes >= PART_BYTES:
                yield {"tokens": np.concatenate(flat)}
                flat, nbytes = [], 0
        if flat:
            yield {"tokens": np.concatenate(flat)}

    @cached_property
    def _encode(self) -> Callable[[str], Any]:
        """The tokenizer; what is named is imported by each process for itself."""
        found = (
            load_object(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer
        )
        if not callable(found):
            raise ConfigError(f"the tokenizer {self._tokenizer!r} is no function of a text")
        encode: Callable[[str], Any] = found
        return encode

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_encode"}

    def _group_files(self) -> list[list[_Piece]]:
        """Parts of whole files, about `PART_BYTES` each."""
        parts: list[list[_Piece]] = []
        room = 0
        for file in self._files:
            size = file.stat().st_size
            if room <= 0:
                parts.append([])
                room = PART_BYTES
            parts[-1].append(_Piece(file, 0, size))
            room -= size
        return parts

    def _cut_lines(self) -> list[list[_Piece]]:
        """Parts of one file each: the lines that begin in so many bytes of it."""
        return [
            [_Piece(file, start, start + PART_BYTES)]
            for file in self._files
            for start in range(0, file.stat().st_size, PART_BYTES)
        ]

    def _documents(self, part: int) -> Iterator[Array]:
        """The tokens of each document, with its end; of a large file of bytes, piece by piece."""
        for piece in self._parts[part]:
            try:
                with open(piece.file, "rb") as file:
                    if self._by_lines:
                        for line in _lines(file, piece):
                            yield from self._document(line, piece.file)
                    elif self._tokenizer is None and self.sequence_length is not None:
                        yield from self._in_pieces(file)
                    else:
                        yield from self._document(file.read(), piece.file)
            except OSError as error:
                raise DataError(f"{piece.file} cannot be read: {error}") from error

    def _in_pieces(self, file: IO[bytes]) -> Iterator[Array]:
        empty = True
        while data := file.read(PART_BYTES):
            empty = False
            yield self._as_tokens(np.frombuffer(data, np.uint8), file.name)
        if not empty:
            yield self._end

    def _document(self, data: bytes, file: Path) -> Iterator[Array]:
        if self._tokenizer is None:
            tokens: Any = np.frombuffer(data, np.uint8)
        else:
            try:
                tokens = self._encode(data.decode())
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file} is no UTF-8, which a tokenizer needs: {error}; convert it, or take it "
                    "away"
                ) from error
        found = self._as_tokens(tokens, str(file))
        if len(found):
            yield np.concatenate([found, self._end])

    def _as_tokens(self, tokens: Sequence[int] | Array, where: str) -> Array:
        array = np.asarray(tokens)
        stored = DTYPES[self._dtype].stored
        if not array.size:
            return np.empty(0, stored)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ConfigError(
                f"{where}: tokens are {array.dtype} of shape {list(array.shape)}; a tokenizer "
                "gives a list of whole numbers for a text"
            )
        limits = np.iinfo(self._dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise ConfigError(
                f"{where}: tokens from {array.min()} to {array.max()} do not go into "
                f"{self._dtype}; give a larger dtype"
            )
        return array.astype(stored)


def _lines(file: IO[bytes], piece: _Piece) -> Iterator[bytes]:
    """The lines that begin between two bytes, without their ends."""
    if piece.start:  # the line before may end right before it
        file.seek(piece.start - 1)
        file.readline()
    while file.tell() < piece.stop and (line := file.readline()):
        yield line.rstrip(b"\r\n")
