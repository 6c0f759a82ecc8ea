"""Number formats of 16 bits, the largest entries, signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scaledtrain.comm.compress.cast import CastGroup
from scaledtrain.comm.compress.codec import Codec
from scaledtrain.comm.compress.group import CompressedGroup
from scaledtrain.comm.protocols import Group
from scaledtrain.errors import ConfigError

__all__ = ["BF16", "FP16", "Sign", "TopK"]


@dataclass(frozen=True)
class FP16(Codec):
    """float16: half the bytes of float32, 11 significant bits.

    Values beyond 65504 become infinite, those below 3e-8 zero.

    Example:
        >>> encoded = FP16().encode([torch.tensor([1.0, 1e5])])
        >>> FP16().decode(encoded, [torch.empty(2)])
        [tensor([1., inf])]
    """

    needs_feedback: ClassVar[bool] = False

    def room(self, like: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each, of the same shape."""
        return [t.new_empty(t.shape, dtype=torch.float16) for t in like]

    def encode(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Round to the nearest."""
        return _cast(tensors, torch.float16)

    def decode(self, encoded: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """The same values in the dtypes of ``like``."""
        return [e.to(t.dtype, copy=True) for e, t in zip(encoded, like, strict=True)]

    def over(self, group: Group, like: Sequence[Tensor]) -> CompressedGroup:
        """The group that reduces in float16."""
        return CastGroup(group, self, like)


@dataclass(frozen=True)
class BF16(Codec):
    """bfloat16: half the bytes of float32 and its range, 8 significant bits.

    Example:
        >>> encoded = BF16().encode([torch.tensor([1.001, 1e5])])
        >>> BF16().decode(encoded, [torch.empty(2)])
        [tensor([1.0000e+00, 9.9840e+04])]
    """

    needs_feedback: ClassVar[bool] = False

    def room(self, like: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each, of the same shape."""
        return [t.new_empty(t.shape, dtype=torch.bfloat16) for t in like]

    def encode(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Round to the nearest."""
        return _cast(tensors, torch.bfloat16)

    def decode(self, encoded: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """The same values in the dtypes of ``like``."""
        return [e.to(t.dtype, copy=True) for e, t in zip(encoded, like, strict=True)]

    def over(self, group: Group, like: Sequence[Tensor]) -> CompressedGroup:
        """The group that reduces in bfloat16."""
        return CastGroup(group, self, like)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype).contiguous() for t in tensors]


@dataclass(frozen=True)
class TopK(Codec):
    """The entries of largest magnitude of each tensor, exactly; zero for all others.

    Sent for a tensor of n entries: k = fraction n values (rounded, at least one) and their 32-bit
    places; in float32 that is 2 fraction of the bytes, so it pays from fraction < 1/2 on. NaN
    counts as the largest of all.

    Args:
        fraction: of the entries, in (0, 1].

    Raises:
        ConfigError: a fraction that is not.

    Example:
        >>> codec, g = TopK(fraction=0.5), torch.tensor([1.0, -3.0, 2.0, 0.5])
        >>> codec.decode(codec.encode([g]), [g])
        [tensor([ 0., -3.,  2.,  0.])]

    References:
        Aji, Heafield 2017, Sparse Communication for Distributed Gradient Descent, arXiv 1704.05021;
        Stich et al. 2018, Sparsified SGD with Memory, arXiv 1809.07599 (why feedback is needed).
    """

    fraction: float
    needs_feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(
                f"TopK's fraction is {self.fraction}; it is the share of entries that is sent, "
                "above 0 and at most 1 (0.01 sends one in a hundred)"
            )

    def room(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Two for each: k values, k places."""
        room = []
        for t in like:
            k = self._count(t)
            room += [t.new_empty(k), t.new_empty(k, dtype=_dtype_of_places(t))]
        return room

    @torch.no_grad()
    def encode(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Values and places of the largest."""
        encoded = []
        for t in tensors:
            flat = t.reshape(-1)
            places = torch.topk(flat.abs(), self._count(t), sorted=False).indices
            encoded += [flat[places], places.to(_dtype_of_places(t))]
        return encoded

    def decode(self, encoded: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Zeros, and the values at their places."""
        decoded = []
        for values, places, t in zip(encoded[::2], encoded[1::2], like, strict=True):
            flat = torch.zeros(t.numel(), dtype=t.dtype, device=t.device)
            decoded.append(flat.scatter_(0, places.long(), values).view(t.shape))
        return decoded

    def _count(self, t: Tensor) -> int:
        return max(1, round(self.fraction * t.numel())) if t.numel() else 0


def _dtype_of_places(t: Tensor) -> torch.dtype:
    return torch.int32 if t.numel() < 2**31 else torch.int64


@dataclass(frozen=True)
class Sign(Codec):
    """One bit for each entry: C(p) = mean |p| sign(p), the mean over the tensor.

    Sent for a tensor of n entries: n / 8 bytes and a float32, a 32nd of float32's bytes. Zero
    counts as positive. If any entry is not finite, none is after decoding.

    Example:
        >>> g = torch.tensor([1.0, -3.0, 2.0, 0.0])  # mean |g| = 6 / 4
        >>> Sign().decode(Sign().encode([g]), [g])
        [tensor([ 1.5000, -1.5000,  1.5000,  1.5000])]

    References:
        Seide et al. 2014, 1-Bit Stochastic Gradient Descent; Karimireddy et al. 2019, Error
        Feedback Fixes SignSGD, arXiv 1901.09847.
    """

    needs_feedback: ClassVar[bool] = True

    def room(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Two for each: the bits, eight to a byte, and the mean."""
        room = []
        for t in like:
            room.append(t.new_empty(math.ceil(t.numel() / 8), dtype=torch.uint8))
            room.append(t.new_empty(1, dtype=torch.float32))
        return room

    @torch.no_grad()
    def encode(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Bits and mean."""
        encoded = []
        for t in tensors:
            flat = t.reshape(-1)
            bits = torch.zeros(math.ceil(t.numel() / 8) * 8, dtype=torch.uint8, device=t.device)
            bits[: t.numel()] = flat >= 0
            encoded.append((bits.view(-1, 8) * _powers(t)).sum(1, dtype=torch.uint8))
            total = flat.abs().sum(dtype=torch.float32)
            encoded.append((total / max(1, t.numel())).view(1))
        return encoded

    def decode(self, encoded: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """The mean, with the signs."""
        decoded = []
        for packed, mean, t in zip(encoded[::2], encoded[1::2], like, strict=True):
            positive = (packed.view(-1, 1) & _powers(t)).view(-1)[: t.numel()] != 0
            decoded.append(torch.where(positive, mean, -mean).to(t.dtype).view(t.shape))
        return decoded


def _powers(t: Tensor) -> Tensor:
    """Shape [8]: 1, 2, 4, ..."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=t.device)
