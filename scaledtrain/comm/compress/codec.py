"""What a codec is: tensors to smaller tensors, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from scaledtrain.comm.compress.gathered import GatheredGroup
from scaledtrain.comm.compress.group import CompressedGroup
from scaledtrain.comm.protocols import Group

__all__ = ["Codec"]


class Codec(ABC):
    """Encodes each tensor by itself; what it makes depends on shapes and dtypes alone.

    So memory for it can be set aside once, and ranks know the sizes of what the others send. A
    value that is not finite must still be seen after decoding, so that an overflow is noticed.
    """

    needs_feedback: ClassVar[bool]
    """Whether what it leaves out is so much that it must be kept for the next gradient."""

    @abstractmethod
    def room(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors with the shapes and dtypes that tensors like these are encoded to.

        Args:
            like: floating tensors; only their shapes, dtypes and devices matter.
        """

    @abstractmethod
    def encode(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The encoded tensors; these may be the given ones where there is nothing to encode."""

    @abstractmethod
    def decode(self, encoded: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """New tensors with the shapes and dtypes of ``like``, as near as the codec comes."""

    def over(self, group: Group, like: Sequence[Tensor]) -> CompressedGroup:
        """The group that reduces tensors like these encoded: every rank gathers what all sent."""
        return GatheredGroup(group, self, like)
