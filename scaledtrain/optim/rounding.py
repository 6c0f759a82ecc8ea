"""Rounding to bfloat16 that is right in expectation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["random_bits", "stochastic_round"]

_PIECE, _PIECE_ON_A_GPU = 2**20, 2**24  # numbers
_KEPT = -65536  # 0xFFFF0000: sign, exponent and the 7 bits of bfloat16's mantissa


def random_bits(n: int, generator: torch.Generator) -> Tensor:
    """Uniform whole numbers in [-2^15, 2^15), int16, shape [n], on the generator's device."""
    words = torch.empty(math.ceil(n / 4), dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:n]


@torch.no_grad()
def stochastic_round(x: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    r"""Round float32 to bfloat16, up or down at random, so that the mean is x.

    Of the two neighbours a <= x <= b in bfloat16, b with the probability (x - a) / (b - a), else a:
    E = x, and the variance is (x - a) (b - x), at most a quarter of the gap squared. To the bits
    of x are added 16 random bits, below the 16 that are kept; the rest is cut off. What is
    representable stays, as do infinities and NaN; beyond bfloat16's largest number its neighbour is
    infinity.

    Args:
        x: float32.
        bits: int16, uniform, as many as x has entries: `random_bits`.
        out: bfloat16, of x's shape, contiguous or not; written to.

    Returns:
        ``out``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.full((10_000,), 1.0 + 1 / 512)  # a quarter between 1 and 1 + 1/128
        >>> r = stochastic_round(x, random_bits(10_000, generator), torch.empty(10_000).bfloat16())
        >>> r.unique().tolist(), bool((r > 1).float().mean() - 0.25 < 0.02)
        ([1.0, 1.0078125], True)

    References:
        Gupta et al. 2015, Deep Learning with Limited Numerical Precision, arXiv 1502.02551.
    """
    if not out.is_contiguous():
        rounded = torch.empty(x.shape, dtype=out.dtype, device=x.device)
        return out.copy_(stochastic_round(x, bits, rounded))
    # In pieces, since the 32-bit numbers of all of it may be more memory than there is to save.
    size = _PIECE if x.device.type == "cpu" else _PIECE_ON_A_GPU
    pieces = (torch.split(t.view(-1), size) for t in (x.contiguous(), bits, out))
    for wide, some, narrow in zip(*pieces, strict=True):
        noise = some.to(torch.int32).bitwise_and_(0xFFFF)
        kept = noise.add_(wide.view(torch.int32)).bitwise_and_(_KEPT).view(torch.float32)
        # The bits of a NaN may run over into those of a zero.
        narrow.copy_(torch.where(wide.isnan(), wide, kept))
    return out
