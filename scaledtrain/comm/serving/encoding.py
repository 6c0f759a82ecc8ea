"""What the shards of a server make of compressed gradients, in the memory of one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaledtrain.comm.compress import Codec, Feedback
from scaledtrain.comm.flat import bytes_of
from scaledtrain.comm.serving.partition import Partition

__all__ = ["RoundTrip"]


class RoundTrip:
    """Encodes a worker's gradients shard by shard, and decodes them as the shards do.

    Each shard's part has an error feedback of its own, as on real processes: the bits are theirs.

    Args:
        codec: encodes and decodes.
        partition: which shard holds what.
        like: the parameters.
        shards: how many there are.

    Example:
        >>> from scaledtrain.comm.compress import TopK
        >>> like = [torch.zeros(4)]
        >>> trip = RoundTrip(TopK(0.5), Partition(like, 2), like, shards=2)
        >>> sizes, gradient = trip.make([torch.tensor([3.0, 2.0, 1.0, 4.0])])
        >>> gradient[0].tolist()  # the larger number of each half
        [3.0, 0.0, 0.0, 4.0]
    """

    def __init__(
        self, codec: Codec, partition: Partition, like: Sequence[Tensor], shards: int
    ) -> None:
        self._codec = codec
        self._partition = partition
        self._like = like
        self._feedback = [Feedback(codec, partition.part(like, shard)) for shard in range(shards)]

    @torch.no_grad()
    def make(self, update: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """What each shard is sent, in bytes; and the gradient that the shards decode."""
        sizes, gradient = [], [torch.empty_like(p, requires_grad=False) for p in self._like]
        for shard, feedback in enumerate(self._feedback):
            encoded = feedback.encode(self._partition.part(update, shard))
            sizes.append(bytes_of(encoded))
            places = self._partition.part(gradient, shard)
            decoded = self._codec.decode(encoded, places)
            for place, value in zip(places, decoded, strict=True):
                place.copy_(value)
        return sizes, gradient
