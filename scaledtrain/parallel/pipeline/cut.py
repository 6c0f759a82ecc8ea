"""A step's batches cut into the microbatches of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from scaledtrain.data.cut import count_samples
from scaledtrain.data.ragged import Ragged
from scaledtrain.data.steps import StepBatch, Weigh, counted
from scaledtrain.errors import ConfigError

__all__ = ["Microbatch", "count_pieces", "cut_step"]


class Microbatch(NamedTuple):
    """What goes through the stages together."""

    batch: Any
    """As the loader gives one."""
    samples: float
    """Or how much else it counts."""
    share: float
    """Of the step's samples; what its loss counts in the mean."""
    form: Hashable
    """Shapes and dtypes: microbatches of one form have outputs of one form in every stage."""


def cut_step(
    batch: StepBatch, pieces: int, exactly: bool = False, weigh: Weigh | None = None
) -> list[Microbatch]:
    """Cut each of a step's batches into so many microbatches, or fewer where it is smaller.

    Their sizes differ by one sample at most.

    Args:
        batch: of the step.
        pieces: of each of its batches.
        exactly: where a batch is smaller, fill up with microbatches that count as no samples: ranks
            that have shards of one stage have to run equally many.
        weigh: how much a batch counts, where the step's sizes are not samples.

    Raises:
        ConfigError: a batch has something in it that has no place for its samples.

    Example:
        >>> inputs, targets = torch.arange(5.0), torch.arange(5)
        >>> [m.batch[1].tolist() for m in cut_step(StepBatch([(inputs, targets)], [5]), 2)]
        [[0, 1, 2], [3, 4]]
    """
    microbatches = []
    mean = batch.samples if batch.gradient_samples is None else batch.gradient_samples
    for whole, size_of_whole in zip(batch.microbatches, batch.sizes, strict=True):
        samples = count_samples(whole)
        n = count_pieces(whole, pieces)
        start = 0
        for i in range(n):
            stop = start + samples // n + (i < samples % n)
            part = whole if n == 1 else _map(whole, _between(start, stop, samples))
            size = size_of_whole
            if n > 1 and size_of_whole:  # else it is whole, or only keeps others company
                size = stop - start if weigh is None else counted(weigh, part)
            microbatches.append(Microbatch(part, size, size / mean if mean else 0.0, _form(part)))
            start = stop
        if exactly:
            microbatches += [microbatches[-1]._replace(samples=0, share=0.0)] * (pieces - n)
    return microbatches


def count_pieces(batch: Any, pieces: int) -> int:
    """Into how many microbatches a batch is cut."""
    return max(1, min(pieces, count_samples(batch)))


def _between(start: int, stop: int, samples: int) -> Callable[[Any], Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, Ragged):
            offsets = value.offsets[start : stop + 1]
            return Ragged(value.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        if isinstance(value, Tensor) and value.dim() and len(value) == samples:
            return value[start:stop]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise ConfigError(
            f"a batch of {samples} samples has a {type(value).__name__}{shape} in it, which "
            "cannot be cut into the microbatches of a pipeline; give tensors whose first dimension "
            "is the samples, or n_microbatches=1 and smaller batches with "
            "gradient_accumulation_steps"
        )

    return cut


def _map(value: Any, cut: Callable[[Any], Any]) -> Any:
    if isinstance(value, Ragged):
        return cut(value)
    if isinstance(value, Mapping):
        return {key: _map(inner, cut) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(inner, cut) for inner in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(inner, cut) for inner in value)
    return cut(value)


def _form(batch: Any) -> Hashable:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return (torch.is_grad_enabled(), *((tuple(t.shape), t.dtype) for t in tensors))
