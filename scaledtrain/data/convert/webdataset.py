"""WebDataset: tar archives in which the files of a sample have one name and several suffixes."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from scaledtrain.data.convert.images import AS_IT_IS, IMAGE_SUFFIXES, ImageDecoder
from scaledtrain.data.convert.source import Batch, Paths, Source, find_files, names_and_sizes
from scaledtrain.data.convert.torch_dataset import collate
from scaledtrain.errors import ConfigError, DataError

__all__ = ["WebDataset"]

SAMPLES_PER_READ = 64
INTEGERS = frozenset({"cls", "cls2", "class", "count", "id", "index", "inx"})
PICKLES = frozenset({"pickle", "pkl", "pt", "pth", "pyd"})
KEY = "__key__"

# Everything before the first dot of the file's name, and what comes after it.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)\Z")
_OF_THE_FORMAT = re.compile(r"__[^/]*__($|/)")  # files that are no samples


@final
class WebDataset(Source):
    """Tar archives as the library ``webdataset`` writes them: ``00001.jpg``, ``00001.cls``, ...

    Files of one name that follow each other are a sample, their suffixes are the columns: ``npy``
    an array; ``cls``, ``id``, ``index`` an int64; ``json`` a float64, or an array of them;
    ``jpg``, ``png``, ... an image, as `ImageDecoder` makes it, or its bytes; anything else, as
    ``txt``, its bytes (ragged uint8). Pickles are refused. An archive is a part.

    Args:
        paths: tar archives (also compressed), and folders of them.
        columns: which suffixes to read; None: all. ``__key__`` is the name of the sample, which is
            not read unless it is asked for.
        ragged: columns of arrays that have different lengths.
        decoder: of images; None: keep the bytes of their files.
        pattern: which files of a folder are meant.

    Raises:
        ConfigError: there is no such archive, or (when read) samples have different columns.
        DataError: (when read) an archive or a file in it is damaged.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        ragged: Sequence[str] = (),
        decoder: ImageDecoder | None = AS_IT_IS,
        pattern: str = "*.tar*",
    ) -> None:
        self._files = find_files(paths, pattern)
        self._wanted = None if columns is None else frozenset(columns)
        for name in columns or ():
            _refuse_pickle(name)
        self._ragged = tuple(ragged)
        self._decoder = decoder
        self.parts = len(self._files)
        options = (columns, self._ragged, decoder)
        self.identity = f"webdataset {options} {names_and_sizes(self._files)}"

    def read(self, part: int) -> Iterator[Batch]:
        """The samples of an archive."""
        archive = self._files[part]
        batch: list[dict[str, Any]] = []
        for sample in self._samples(archive):
            if lacking := set(self._wanted or ()) - sample.keys():
                raise ConfigError(
                    f"sample {sample[KEY].decode()!r} of {archive} has no "
                    f"{', '.join(sorted(lacking))}, only {', '.join(sorted(sample))}"
                )
            if self._wanted is None or KEY not in self._wanted:
                del sample[KEY]
            batch.append(sample)
            if len(batch) == SAMPLES_PER_READ:
                yield collate(batch, self._ragged, str(archive))
                batch = []
        if batch:
            yield collate(batch, self._ragged, str(archive))

    def _samples(self, archive: Path) -> Iterator[dict[str, Any]]:
        """Samples with their keys."""
        sample: dict[str, Any] = {}
        for name, content in _members(archive):
            found = _NAME.match(name)
            if found is None:
                continue
            key, suffix = found.group(1).encode(), found.group(2).lower()
            if sample and sample[KEY] != key:
                yield sample
                sample = {}
            sample[KEY] = key
            if self._wanted is not None and suffix not in self._wanted:
                continue
            if suffix in sample:
                raise DataError(f"{archive} has {name} twice in one sample")
            sample[suffix] = self._decode(suffix, content, f"{name} in {archive}")
        if sample:
            yield sample

    def _decode(self, suffix: str, content: bytes, name: str) -> Any:
        last = suffix.rpartition(".")[2]
        _refuse_pickle(suffix)
        if f".{last}" in IMAGE_SUFFIXES:
            return content if self._decoder is None else self._decoder(content, name)
        try:
            if last == "npy":
                return np.load(io.BytesIO(content), allow_pickle=False)
            if last in INTEGERS:
                return np.int64(int(content))
            if last in ("json", "jsn"):
                return np.array(json.loads(content), np.float64)
        except (ValueError, TypeError, EOFError, OverflowError) as error:
            raise DataError(
                f"{name} is no {'number or array of numbers' if last != 'npy' else '.npy file'}: "
                f"{error}; read the other columns: columns=[...]"
            ) from error
        return content


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an archive, one after the other."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if member.isreg() and not _OF_THE_FORMAT.match(member.name):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
                tar.members = []  # type: ignore[attr-defined]  # or it would remember them all
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{archive} cannot be read as a tar archive: {error}") from error


def _refuse_pickle(suffix: str) -> None:
    if suffix.rpartition(".")[2] in PICKLES:
        raise ConfigError(
            f".{suffix} is a pickle, which is never read, as it can run any program; read the "
            "other columns: columns=[...]"
        )
