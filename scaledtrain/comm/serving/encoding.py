"""Compressed gradients: what a worker sends each shard of a server, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scaledtrain.comm.compress import Codec, Feedback
from scaledtrain.comm.flat import bytes_of
from scaledtrain.comm.serving.partition import Partition
from scaledtrain.errors import ConfigError

__all__ = ["Encoder", "RoundTrip"]


class Encoder:
    """Encodes a worker's gradients shard by shard; each part has an error feedback of its own.

    Args:
        codec: encodes.
        partition: which shard holds what.
        like: the parameters.
        shards: how many there are.
    """

    def __init__(
        self, codec: Codec, partition: Partition, like: Sequence[Tensor], shards: int
    ) -> None:
        self._partition = partition
        parts = [partition.part(like, shard) for shard in range(shards)]
        self._shapes = [[t.shape for t in part] for part in parts]
        self._feedback = [Feedback(codec, part) for part in parts]

    def encode(self, update: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """What each shard is sent."""
        encoded: list[Sequence[Tensor]] = []
        for shard, feedback in enumerate(self._feedback):
            encoded.append(feedback.encode(self._partition.part(update, shard)))
            feedback.confirm()  # a push cannot be taken back
        return encoded

    def state_dict(self) -> list[list[dict[str, Tensor]]]:
        """A copy of what was not sent yet: by shard, a dictionary for each of its tensors."""
        return [feedback.state_dict() for feedback in self._feedback]

    def load_state_dict(self, state: Sequence[Sequence[Mapping[str, Tensor]]]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ConfigError: it is of other shards.
        """
        own = self._shapes
        fits = [len(part) for part in state] == [len(part) for part in own] and all(
            not kept or kept["kept"].shape == shape
            for part, shapes in zip(state, own, strict=True)
            for kept, shape in zip(part, shapes, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"the saved error feedback is of {len(state)} server shards, which hold other "
                f"parts of the parameters than the {len(own)} here; resume with the shards and the "
                "cut_tensors that it was saved with"
            )
        for feedback, part in zip(self._feedback, state, strict=True):
            feedback.load_state_dict(part)


class RoundTrip:
    """Encodes a worker's gradients as it does on real processes, and decodes them as shards do.

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
        self.encoder = Encoder(codec, partition, like, shards)

    @torch.no_grad()
    def make(self, update: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """What each shard is sent, in bytes; and the gradient that the shards decode."""
        sizes, gradient = [], [torch.empty_like(p, requires_grad=False) for p in self._like]
        for shard, encoded in enumerate(self.encoder.encode(update)):
            sizes.append(bytes_of(encoded))
            places = self._partition.part(gradient, shard)
            decoded = self._codec.decode(encoded, places)
            for place, value in zip(places, decoded, strict=True):
                place.copy_(value)
        return sizes, gradient
