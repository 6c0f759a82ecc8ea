"""The one line that puts a compression around a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from scaledtrain.comm.compress.group import CompressedGroup, PlainGroup
from scaledtrain.comm.protocols import Group

__all__ = ["Compression", "compressed"]


class Compression(Protocol):
    """How tensors are reduced in fewer bytes: a `Codec`, or `PowerSGD`."""

    def over(self, group: Group, like: Sequence[Tensor]) -> CompressedGroup:
        """The group that reduces tensors like these so."""


def compressed(
    group: Group, compression: Compression | None, like: Sequence[Tensor]
) -> CompressedGroup:
    """The group whose sums and means of tensors like these are compressed.

    Args:
        group: what moves the bytes.
        compression: None: the reductions are exact, and nothing is remembered.
        like: tensors of the shapes, dtypes and device of those that will be reduced.

    Example:
        >>> import torch
        >>> from scaledtrain.comm.compress import TopK
        >>> from scaledtrain.comm.local import LocalGroup
        >>> g = torch.tensor([3.0, 2.0])
        >>> group = compressed(LocalGroup(), TopK(fraction=0.5), [g])
        >>> group.all_reduce([g], "mean").wait()
        >>> g, group.state_dict()
        (tensor([3., 0.]), [{'kept': tensor([0., 2.])}])
    """
    return PlainGroup(group, like) if compression is None else compression.over(group, like)
