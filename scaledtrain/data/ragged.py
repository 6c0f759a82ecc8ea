"""A batch of samples of different lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

__all__ = ["Ragged"]


class Ragged(NamedTuple):
    """Samples of different lengths, one after the other.

    Sample i is ``values[offsets[i]:offsets[i + 1]]``.

    What attention kernels for packed sequences and ``torch.nn.functional.embedding_bag`` take;
    ``torch.nested.nested_tensor_from_jagged(values, offsets)`` makes a nested tensor of the same
    memory, ``torch.nn.utils.rnn.pad_sequence(batch.unbind(), batch_first=True)`` pads.

    Example:
        >>> import torch
        >>> batch = Ragged(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 3, 3, 4]))
        >>> batch.samples, [sample.tolist() for sample in batch.unbind()]
        (3, [[5, 6, 7], [], [8]])
        >>> batch.padded(-1)
        tensor([[ 5,  6,  7],
                [-1, -1, -1],
                [ 8, -1, -1]])
    """

    values: Tensor
    """``[sum of lengths, *shape]``."""
    offsets: Tensor
    """int64 ``[samples + 1]``, from 0 to the sum of lengths."""

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self.offsets) - 1

    def unbind(self) -> list[Tensor]:
        """Each sample, ``[length, *shape]``, a view of the values."""
        bounds = self.offsets.tolist()
        return [self.values[a:b] for a, b in pairwise(bounds)]

    def padded(self, value: float = 0, out: Tensor | None = None) -> Tensor:
        """``[samples, longest, *shape]``, with this value behind the shorter samples.

        Args:
            value: that pads.
            out: of that shape and the dtype of the values: where it goes; None: anywhere.
        """
        if out is None:
            longest = int(self.offsets.diff().max()) if self.samples else 0
            out = self.values.new_empty((self.samples, longest, *self.values.shape[1:]))
        out.fill_(value)
        for row, sample in zip(out, self.unbind(), strict=True):
            row[: len(sample)] = sample
        return out
