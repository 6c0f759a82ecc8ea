"""Gradients as products of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaledtrain.comm.compress.feedback import if_finite
from scaledtrain.comm.compress.group import CompressedGroup, Later
from scaledtrain.comm.protocols import Group, Handle, ReduceOp
from scaledtrain.errors import ConfigError

__all__ = ["PowerSGD"]


@dataclass(frozen=True)
class PowerSGD:
    r"""The mean gradient as a matrix of low rank, found by one step of power iteration.

    Each gradient plus what was kept of it last time, g_i + e_i / s_i, is a matrix M_i of n rows
    (its first dim) and m columns (the others); s_i is the rank's weight relative to the mean one.
    With Q [m, r] of the last step (at first random, the same on every rank)::

        P = mean_i M_i Q              all-reduce of n r numbers
        P <- orthonormal basis of P   by QR, so also where a gradient is zero
        Q = mean_i M_i^T P            all-reduce of m r numbers; a column of zeros is not remembered
        result: P Q^T,  kept: e_i = s_i (M_i - P P^T M_i)

    P Q^T is the mean of the M_i projected onto P, so result + mean of kept = mean of M_i, weighted,
    and what is kept counts later as it would have in its own step; a mean of rank r or less is
    exact. Tensors for which r (n + m) >= n m (vectors, small or thin matrices) are sent as they
    are, together with P. Two all-reduces, computed in float32 at least, one after the other: the
    work is done when the result is waited for, so overlap with the backward pass does not hide it.

    Where a gradient is not finite, the result shows it, and Q and e stay as they were; those of the
    other gradients, too, when the step is skipped. A crash loses e, about as much as a few
    gradients.

    Args:
        rank: r; 1 to 4 is common.

    Raises:
        ConfigError: a rank below 1.

    Example:
        >>> from scaledtrain.comm.compress import compressed
        >>> from scaledtrain.comm.local import LocalGroup
        >>> g = torch.outer(torch.arange(8.0), torch.ones(8))  # rank 1
        >>> mean = g.clone()
        >>> compressed(LocalGroup(), PowerSGD(rank=1), [g]).all_reduce([mean], "mean").wait()
        >>> torch.allclose(mean, g, atol=1e-5)
        True

    References:
        Vogels, Karimireddy, Jaggi 2019, PowerSGD, arXiv 1905.13727.
    """

    rank: int = 2

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"PowerSGD's rank is {self.rank}; it is the columns of P and Q, >= 1")

    def over(self, group: Group, like: Sequence[Tensor]) -> CompressedGroup:
        """The group that reduces tensors like these so."""
        return _PowerSGDGroup(group, like, self.rank)


class _Matrix:
    """What is remembered of one tensor: Q, and e as a matrix."""

    def __init__(self, like: Tensor, rank: int, seed: int) -> None:
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        columns = like.numel() // like.shape[0]
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(columns, rank, generator=generator)
        self.q = start.to(device=like.device, dtype=self.dtype)
        self.kept = torch.zeros(like.shape[0], columns, dtype=self.dtype, device=like.device)
        self.before: tuple[Tensor, Tensor] | None = None  # both, until the reduction is confirmed

    def begin(self, t: Tensor, weight: float) -> Tensor:
        """The gradient plus what was kept, as a matrix; of weight 0 it only has to be there."""
        return torch.add(t.reshape(self.kept.shape), self.kept, alpha=1.0 / (weight or 1.0))


class _PowerSGDGroup(CompressedGroup):
    def __init__(self, group: Group, like: Sequence[Tensor], rank: int) -> None:
        super().__init__(group, like)
        self._matrices = [
            _Matrix(t, rank, seed) if _is_worth_it(t, rank) else None for seed, t in enumerate(like)
        ]

    def _reduce(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> Handle:
        return Later(lambda: self._exchange(tensors, op, weight))

    @torch.no_grad()
    def _exchange(self, tensors: list[Tensor], op: ReduceOp, weight: float) -> None:
        own_weight = self._relative_weights(op, weight, tensors[0].device)[self.rank]
        pairs = list(zip(tensors, self._matrices, strict=True))
        small = [t for t, matrix in pairs if matrix is None]
        large = [
            (t, matrix, matrix.begin(t, own_weight)) for t, matrix in pairs if matrix is not None
        ]
        p = [m @ matrix.q for _, matrix, m in large]
        self._group.all_reduce([*p, *small], op, weight).wait()
        p = [torch.linalg.qr(each).Q for each in p]
        q = [m.T @ basis for basis, (_, _, m) in zip(p, large, strict=True)]
        means = [each.clone() for each in q]
        if means:
            self._group.all_reduce(means, op, weight).wait()
        for basis, own, mean, (t, matrix, m) in zip(p, q, means, large, strict=True):
            t.copy_((basis @ mean.T).view(t.shape))
            matrix.before = matrix.q, matrix.kept
            # Not a column of zeros, whose direction would be lost for ever.
            matrix.q = if_finite(torch.where(mean.any(dim=0), mean, matrix.q), matrix.q)
            if own_weight != 0.0:
                matrix.kept = if_finite((m - basis @ own.T).mul_(own_weight), matrix.kept)

    def confirm(self) -> None:
        """The last reduction is used."""
        for matrix in self._matrices:
            if matrix is not None:
                matrix.before = None

    def undo(self) -> None:
        """The last reduction is not used: Q and e are what they were before."""
        for matrix in self._matrices:
            if matrix is not None and matrix.before is not None:
                (matrix.q, matrix.kept), matrix.before = matrix.before, None

    def state_dict(self) -> list[dict[str, Tensor]]:
        """A copy of Q and e, a dictionary for each tensor."""
        return [
            {} if matrix is None else {"q": matrix.q.clone(), "kept": matrix.kept.clone()}
            for matrix in self._matrices
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore what ``state_dict`` returned; of an empty dictionary e is zero, and Q stays."""
        for matrix, saved in zip(self._matrices, state, strict=True):
            if matrix is not None:
                matrix.kept.copy_(saved["kept"]) if saved else matrix.kept.zero_()
                matrix.q.copy_(saved["q"] if saved else matrix.q)


def _is_worth_it(t: Tensor, rank: int) -> bool:
    if t.dim() < 2 or t.numel() == 0:
        return False
    rows, columns = t.shape[0], t.numel() // t.shape[0]
    return rank * (rows + columns) < rows * columns
