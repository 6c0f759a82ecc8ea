"""Any data set of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from scaledtrain.data.convert.source import Batch, Source, Spans
from scaledtrain.data.ragged import Ragged
from scaledtrain.errors import ConfigError

__all__ = ["TorchDataset", "collate"]

SAMPLES_PER_PART = 64
PAIR = ("x", "y")


@final
class TorchDataset(Source):
    """A ``torch.utils.data.Dataset``; its samples are dicts, tuples or tensors.

    Values are tensors, arrays, numbers, bytes or text (both are ragged uint8). A map-style data set
    is read by several workers; an iterable one is a single part. Samples that are drawn at random
    are other ones in every run: what is said of resuming and of workers does not hold for them.

    Args:
        dataset: whose samples.
        names: of the columns, where samples are tuples; None: ``x`` and ``y`` of a pair.
        ragged: columns whose values have different lengths (of their first dim).

    Raises:
        ConfigError: samples are of another kind, or of different shapes.

    Example:
        >>> from scaledtrain.data import digits
        >>> batch = next(TorchDataset(digits()).read(0))
        >>> {name: tuple(values.shape) for name, values in batch.items()}
        {'x': (64, 64), 'y': (64,)}
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        names: Sequence[str] | None = None,
        ragged: Sequence[str] = (),
    ) -> None:
        iterable = isinstance(dataset, IterableDataset)
        if not iterable and not isinstance(dataset, Sized):
            raise ConfigError(
                f"{type(dataset).__name__} has no length and is no IterableDataset; give it a "
                "__len__"
            )
        self._dataset = dataset
        self._names = names
        self._ragged = tuple(ragged)
        self._spans = None if iterable else Spans(len(cast(Sized, dataset)), SAMPLES_PER_PART)
        self.parts = 1 if self._spans is None else self._spans.parts
        options = (names, self._ragged, self._spans)
        self.identity = f"torch {type(dataset).__qualname__} {options}"

    def read(self, part: int) -> Iterator[Batch]:
        """Some samples; of an iterable data set, all of them."""
        if self._spans is None:
            samples = iter(cast("IterableDataset[Any]", self._dataset))
            first = 0
            while chosen := list(islice(samples, SAMPLES_PER_PART)):
                yield self._collate(chosen, first)
                first += len(chosen)
            return
        span = self._spans.span(part)
        yield self._collate([self._dataset[i] for i in span], span.start)

    def _collate(self, samples: Sequence[Any], first: int) -> Batch:
        where = f"samples {first} to {first + len(samples) - 1}"
        return collate([self._as_dict(sample) for sample in samples], self._ragged, where)

    def _as_dict(self, sample: Any) -> Mapping[str, Any]:
        if isinstance(sample, Mapping):
            return sample
        values = sample if isinstance(sample, (tuple, list)) else (sample,)
        names = self._names or PAIR[: len(values)]
        if len(names) != len(values):
            raise ConfigError(
                f"a sample has {len(values)} values, but the names are {', '.join(names)}; give "
                "names, one for each"
            )
        return dict(zip(names, values, strict=True))


def collate(samples: Sequence[Mapping[str, Any]], ragged: Sequence[str], where: str) -> Batch:
    """Samples as a batch: values of one shape are stacked, those of different lengths are not.

    Args:
        samples: column -> value.
        ragged: columns whose values have different lengths; those of bytes and text have anyway.
        where: what messages call the place where the samples come from.

    Raises:
        ConfigError: samples have different columns, or values different shapes.
    """
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise ConfigError(
                f"{where}: one has the columns {', '.join(map(str, samples[0]))}, another "
                f"{', '.join(map(str, sample))}; every sample has all of them"
            )
    if unknown := set(ragged) - samples[0].keys():
        raise ConfigError(
            f"{', '.join(sorted(unknown))} is to be ragged, but the columns are "
            f"{', '.join(map(str, samples[0]))}"
        )
    return {
        name: _join([sample[name] for sample in samples], name, name in ragged, where)
        for name in samples[0]
    }


def _join(values: list[Any], name: str, ragged: bool, where: str) -> Any:
    if isinstance(values[0], (str, bytes)):
        return [value.encode() if isinstance(value, str) else value for value in values]
    try:
        if ragged:
            return _as_ragged(values)
        return torch.stack(values) if isinstance(values[0], Tensor) else np.stack(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{where}: the values of {name!r} do not go together: {error}; where they differ in "
            f"length, give ragged=[{name!r}]"
        ) from error


def _as_ragged(values: Sequence[Any]) -> Ragged:
    lengths = [len(value) for value in values]
    filled = [value for value in values if len(value)] or values[:1]  # [] has no dtype of its own
    tensors = [v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for v in filled]
    return Ragged(torch.cat(tensors), torch.tensor([0, *np.cumsum(lengths)]))
