"""Batches cut and joined by samples, and brought to a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scaledtrain.data.ragged import Ragged

__all__ = ["MisfitError", "count_samples", "cut", "join", "to_device"]


def count_samples(batch: Any) -> int:
    """Length of the first dimension of the first tensor (or list) in a batch."""
    if isinstance(batch, Ragged):
        return batch.samples
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        return count_samples(next(iter(batch.values())))
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        return count_samples(first) if isinstance(first, (Mapping, tuple, list)) else len(batch)
    return 1


def cut(batch: Any, low: int, high: int) -> Any:
    """Samples low to high of a batch, in the same memory.

    Whatever has not one entry for each sample stays whole.

    Example:
        >>> cut((torch.arange(4), ["a", "b", "c", "d"], 0.5), 1, 3)
        (tensor([1, 2]), ['b', 'c'], 0.5)
    """
    return _cut(batch, count_samples(batch), low, high)


def _cut(value: Any, n: int, low: int, high: int) -> Any:
    if (low, high) == (0, n):
        return value
    if isinstance(value, Ragged):
        offsets = value.offsets[low : high + 1]
        return Ragged(value.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
    if isinstance(value, Tensor):
        return value[low:high] if value.dim() and len(value) == n else value
    if isinstance(value, Mapping):
        return {key: _cut(column, n, low, high) for key, column in value.items()}
    if isinstance(value, (tuple, list)):
        if len(value) == n and not any(_holds_more(one) for one in value):
            return value[low:high]
        return _like(value, [_cut(column, n, low, high) for column in value])
    return value


class MisfitError(Exception):
    """Batches that cannot be one."""


def join(batches: Sequence[Any]) -> Any:
    """Batches of the same structure as one.

    Raises:
        MisfitError: their samples have other shapes, or nothing is known of what holds them.
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    if any(type(batch) is not type(first) for batch in batches):
        raise MisfitError
    if isinstance(first, Ragged):
        lengths = torch.cat([batch.offsets.diff() for batch in batches])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Ragged(torch.cat([batch.values for batch in batches]), offsets)
    if isinstance(first, Tensor):
        if not first.dim() or any(batch.shape[1:] != first.shape[1:] for batch in batches):
            raise MisfitError
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: join([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        if first and not any(_holds_more(one) for one in first):
            return type(first)(one for batch in batches for one in batch)
        return _like(first, [join(columns) for columns in zip(*batches, strict=True)])
    if isinstance(first, (str, int, float, type(None))) and len(set(batches)) == 1:
        return first
    raise MisfitError


def _holds_more(value: Any) -> bool:
    return isinstance(value, (Tensor, Mapping, tuple, list))


def _like(value: Any, columns: list[Any]) -> Any:
    return type(value)(*columns) if hasattr(value, "_fields") else type(value)(columns)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
