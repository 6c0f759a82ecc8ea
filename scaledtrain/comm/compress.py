"""placeholder until the codecs are merged"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    def room(self, like: Sequence[Tensor]) -> list[Tensor]: ...
    def encode(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...
    def decode(self, encoded: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]: ...


class Feedback:
    def __init__(self, codec: Codec, like: Sequence[Tensor]) -> None:
        self.codec = codec

    def encode(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.codec.encode(tensors)
