"""Data sets of the library ``datasets`` of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

from scaledtrain.data.convert.arrow import Categories, arrow_batch, arrow_columns
from scaledtrain.data.convert.source import Batch, Source, Spans
from scaledtrain.errors import ConfigError

__all__ = ["HuggingFace", "load_huggingface"]

ROWS_PER_PART = 1_000  # at most
ROWS_PER_READ = 100  # of a stream, of whose rows nobody knows how large they are


def require_datasets() -> Any:
    """The package ``datasets``.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "a data set of Hugging Face is read with their package datasets, which cannot be "
            "imported here: pip install 'scaledtrain[huggingface]'"
        ) from error
    return datasets


def load_huggingface(name: str, split: str, config: str | None = None) -> Any:
    """A split of a data set of the hub, or of a folder that ``save_to_disk`` wrote.

    Args:
        name: of the data set, or the path of the folder.
        split: which part of it, e.g. ``"train"``.
        config: which of its variants; None: the only one, or the default.

    Raises:
        ConfigError: there is no such data set or split, or the package is not installed.
    """
    datasets = require_datasets()
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, config, split=split)
        saved = datasets.load_from_disk(name)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{name!r} (split {split!r}) cannot be loaded: {error}") from error


@final
class HuggingFace(Source):
    """A ``datasets.Dataset``, or one that is streamed.

    Numbers, text, bytes and lists of numbers are stored as those of a Parquet file (see `Parquet`);
    ``Array2D`` to ``Array5D`` have their shape, images and sounds are the bytes of their files, and
    the names of a ``ClassLabel`` are told by `class_names`. One that is streamed is a single part.

    Args:
        dataset: one split of it.
        columns: which to read; None: all.
        categories: column of text -> its values; a value becomes its number, int64.

    Raises:
        ConfigError: it is no such data set, has no such column, or a column holds no tensors.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        columns: Sequence[str] | None = None,
        categories: Categories | None = None,
    ) -> None:
        datasets = require_datasets()
        if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            raise ConfigError(f"the data set has the splits {', '.join(dataset)}; give one of them")
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise ConfigError(f"a data set of Hugging Face is expected, not {type(dataset)}")
        if dataset.features is None:
            dataset = dataset._resolve_features()  # of a stream, from its first rows
        for name in columns or ():
            if name not in dataset.features:
                raise ConfigError(
                    f"there is no column {name!r}, only {', '.join(dataset.features)}"
                )
        if columns is not None:
            dataset = dataset.select_columns(list(columns))
        self._categories = dict(categories or {})
        labels = {
            name: feature.names
            for name, feature in dataset.features.items()
            if isinstance(feature, datasets.ClassLabel) and feature.names is not None
        }
        self.classes = {**labels, **self._categories}
        self.columns = arrow_columns(
            dataset.features.arrow_schema, self._categories, "the data set"
        )
        self._dataset = dataset.with_format("arrow")
        streamed = isinstance(dataset, datasets.IterableDataset)
        self._spans = None if streamed else _spans(self._dataset)
        self.parts = 1 if self._spans is None else self._spans.parts
        self.identity = f"huggingface {dataset.features} {self._categories} {self._spans}"

    def read(self, part: int) -> Iterator[Batch]:
        """Some rows; of a stream, all of them."""
        if self._spans is None:
            for rows in self._dataset.iter(ROWS_PER_READ):
                yield arrow_batch(rows, self._categories, "the data set")
            return
        span = self._spans.span(part)
        rows = self._dataset[span.start : span.stop]
        yield arrow_batch(rows, self._categories, f"the data set, from row {span.start} on")


def _spans(dataset: Any) -> Spans:
    """Parts of some megabytes, as far as can be seen from the first rows."""
    first = dataset[:ROWS_PER_READ]
    per_part = Spans.of_bytes(1, first.nbytes / max(1, len(first))).per_part
    return Spans(len(dataset), min(per_part, ROWS_PER_PART))
