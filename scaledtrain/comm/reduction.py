"""Sums, means and maxima over ranks, taken in the order of ranks: the same bits everywhere.

Once for whole tensors, and once for blocks of them that lie in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scaledtrain.comm.protocols import ReduceOp
from scaledtrain.errors import ConfigError

__all__ = ["Reduction", "divisors", "reduce_block", "reduce_in_rank_order", "total_weight"]

_HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def reduce_in_rank_order(
    by_rank: Sequence[Sequence[Tensor]], op: ReduceOp, weights: Sequence[float]
) -> list[Tensor]:
    """The reduction of every tensor over the ranks: ((x0 + x1) + x2) + ..., as in shared memory.

    float16 and bfloat16 are added up in float32 and rounded once. A mean of equal weights of 1 is
    (x0 + x1 + ...) / n, without a product; a rank of weight 0 is left out.

    Args:
        by_rank: each rank's tensors, the same shapes and dtypes in the same order.
        op: what to take.
        weights: of each rank, for a mean.

    Returns:
        New tensors.

    Raises:
        ConfigError: weights that are negative, not finite or all zero.

    Example:
        >>> by_rank = [[torch.tensor([1.0])], [torch.tensor([4.0])]]
        >>> reduce_in_rank_order(by_rank, "mean", [2.0, 1.0])  # (2 * 1 + 1 * 4) / 3
        [tensor([2.])]
    """
    if op == "max":
        largest = [t.clone() for t in by_rank[0]]
        for tensors in by_rank[1:]:
            torch._foreach_maximum_(largest, list(tensors))
        return largest
    terms = [(rank, 1.0) for rank in range(len(by_rank))]
    divisor = float(len(by_rank))
    if op == "mean" and any(weight != 1.0 for weight in weights):
        divisor = total_weight(weights)
        terms = [(rank, weight) for rank, weight in enumerate(weights) if weight != 0.0]
    total: list[Tensor] = []
    for rank, weight in terms:
        wide = [t.float() if t.dtype in _HALF else t for t in by_rank[rank]]
        term = wide if weight == 1.0 else torch._foreach_mul(wide, weight)
        if total:
            torch._foreach_add_(total, list(term))
        else:
            total = [t.clone() for t in term]
    if op == "mean":
        torch._foreach_div_(total, divisor)
    return [t.to(like.dtype) for t, like in zip(total, by_rank[0], strict=True)]


def total_weight(weights: Sequence[float]) -> float:
    """Of a mean over ranks, added in their order.

    Raises:
        ConfigError: a weight that is negative or not finite, or no rank has one.
    """
    total = 0.0
    for rank, weight in enumerate(weights):
        if not (weight >= 0.0 and math.isfinite(weight)):
            raise ConfigError(
                f"rank {rank} gave a mean the weight {weight}; a weight is a finite number >= 0"
            )
        total += weight
    if total == 0.0:
        raise ConfigError(
            f"all {len(weights)} ranks gave the weight 0 to a mean, so that it has no value; at "
            "least one rank must have a sample"
        )
    return total


class Reduction(NamedTuple):
    """What is computed: the ranks that count with their weights, and by what the sum is divided."""

    call: str
    terms: tuple[tuple[int, float], ...]
    divisors: dict[torch.dtype, Tensor] | None


def divisors(total: float) -> dict[torch.dtype, Tensor]:
    """The sum of the weights as torch divides by it fastest: a tensor of the dividend's dtype."""
    with torch.inference_mode(False):
        dtypes = (torch.float32, torch.float64)
        return {dtype: torch.tensor(total, dtype=dtype, device="cpu") for dtype in dtypes}


def reduce_block(reduction: Reduction, slots: list[Tensor], out: Tensor, scratch: Tensor) -> None:
    """Reduce one block of all slots, in the order of ranks.

    Args:
        reduction: what to compute.
        slots: by rank, each of shape [n] with n <= 32768.
        out: shape [n], the same dtype.
        scratch: uint8 of shape [2, 32768 * 8].
    """
    call, terms, divisors = reduction
    if call == "max":
        out.copy_(slots[0])
        for slot in slots[1:]:
            torch.maximum(out, slot, out=out)
        return
    n = out.numel()
    half = out.dtype in _HALF
    total = scratch[0].view(torch.float32)[:n] if half else out
    (first, weight), others = terms[0], terms[1:]
    if others and weight == others[0][1] == 1.0 and not half:
        torch.add(slots[first], slots[others[0][0]], out=total)
        others = others[1:]
    else:
        total.copy_(slots[first])
        if weight != 1.0:
            total.mul_(weight)
    for rank, weight in others:
        term = slots[rank]
        if weight != 1.0:
            # Not add's alpha: that rounds once where a product and a sum round twice, or not,
            # depending on the processor.
            product = scratch[1].view(total.dtype)[:n]
            term = product.copy_(term).mul_(weight)
        total.add_(term)
    if divisors is not None:
        total.div_(divisors[total.dtype])
    if half:
        out.copy_(total)
