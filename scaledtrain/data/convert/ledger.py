"""Notes how far an input has been read, so that a writer that was killed need not read it again."""

from __future__ import annotations

import os
from bisect import bisect_right
from pathlib import Path

import xxhash

from scaledtrain.data.sharded.files import write_whole
from scaledtrain.errors import ConfigError, DataError

__all__ = ["LEDGER", "Ledger"]

LEDGER = ".parts"


class Ledger:
    """A file beside the shards: where each part of the input ends, counted in samples (or tokens).

    It is only ever appended to. If its last lines are lost in a crash, some parts are read twice,
    and what has been written of them is dropped: the manifest alone says what is there.

    Args:
        folder: of the data set.
        identity: of the source.
        resume: go on with the file that is there.

    Raises:
        ConfigError: to be resumed is what was begun with another source, or by no converter.
        DataError: the file cannot be written.
    """

    def __init__(self, folder: Path, identity: str, *, resume: bool) -> None:
        self._path = folder / LEDGER
        self._ends = [0]
        head = f"{xxhash.xxh3_128_hexdigest(identity.encode())}\n".encode()
        try:
            if resume:
                self._load(head)
            else:
                write_whole(self._path, [memoryview(head)])
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - until close
        except OSError as error:
            raise self._unwritable(error) from error

    def _load(self, head: bytes) -> None:
        try:
            text = self._path.read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(
                f"the data set in {self._path.parent} is not finished, but no converter wrote it: "
                "go on with the ShardWriter that began it, or overwrite it"
            ) from error
        if not text.startswith(head):
            raise ConfigError(
                f"the data set in {self._path.parent} was begun with another input or other "
                "options: go on with the same, or overwrite it"
            )
        whole = text.rfind(b"\n") + 1  # a crash can have cut the last line
        os.truncate(self._path, whole)
        self._ends += map(int, text[len(head) : whole].split())

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"{self._path} cannot be written: {error}; go on with resume=True")

    def find(self, position: int) -> tuple[int, int]:
        """In which part a position is, or from which on it is to be looked for.

        Returns:
            The part, and how far behind its beginning the position is.
        """
        part = bisect_right(self._ends, position) - 1
        return part, position - self._ends[part]

    def add(self, part: int, end: int) -> None:
        """Note where a part ends, if that is not known already."""
        if part + 1 == len(self._ends):
            self._ends.append(end)
            try:
                self._file.write(f"{end}\n".encode())
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self, *, delete: bool) -> None:
        """Close the file; delete it when the data set is complete."""
        self._file.close()
        if delete:
            self._path.unlink(missing_ok=True)
