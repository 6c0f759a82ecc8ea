"""How the parameters of a server are divided over its shards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from scaledtrain.errors import ConfigError

__all__ = ["Partition", "Piece"]

_UNEVEN = 1.1  # the fullest shard over the mean: above this, tensors are worth cutting


class Piece(NamedTuple):
    """Rows of one tensor; all of it where ``rows`` is None (a tensor without rows always is)."""

    tensor: int
    rows: tuple[int, int] | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """A view of these rows."""
        tensor = tensors[self.tensor]
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


class Partition:
    """Which shard holds what, balanced by bytes.

    Whole tensors, the largest first, each to the emptiest shard; if that leaves the fullest shard
    with more than 1.1 times the mean, tensors are cut along their first dimension instead, so that
    each shard holds one stretch of the model of about equal size.

    Args:
        like: tensors with the shapes and dtypes of the parameters.
        shards: how many, >= 1.
        cut: allow cutting. An optimizer that looks at whole tensors (LARS, LAMB, Adafactor, Muon)
            needs it False.

    Raises:
        ConfigError: more shards than there are tensors, or rows of them, to hold.

    Example:
        >>> import torch
        >>> [[tuple(p) for p in shard] for shard in Partition([torch.zeros(6, 2)], 2).pieces]
        [[(0, (0, 3))], [(0, (3, 6))]]
    """

    def __init__(self, like: Sequence[Tensor], shards: int, cut: bool = True) -> None:
        sizes = [t.numel() * t.element_size() for t in like]
        self.pieces = _whole(sizes, shards)
        full = max(sum(sizes[p.tensor] for p in shard) for shard in self.pieces)
        if cut and full * shards > _UNEVEN * sum(sizes):
            self.pieces = _cut(like, sizes, shards)
        for index, shard in enumerate(self.pieces):
            if not shard:
                raise ConfigError(
                    f"{shards} server shards, but the model's {len(like)} trainable tensors leave "
                    f"nothing for shard {index}; take fewer shards"
                )

    def part(self, tensors: Sequence[Tensor], shard: int) -> list[Tensor]:
        """What of these tensors belongs to one shard: views."""
        return [piece.of(tensors) for piece in self.pieces[shard]]


def _whole(sizes: Sequence[int], shards: int) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in range(shards)]
    load = [0] * shards
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        emptiest = load.index(min(load))
        pieces[emptiest].append(Piece(index))
        load[emptiest] += sizes[index]
    return [sorted(shard) for shard in pieces]


def _cut(like: Sequence[Tensor], sizes: Sequence[int], shards: int) -> list[list[Piece]]:
    """Shard s holds the bytes from s / shards to (s + 1) / shards of all, rounded to rows."""
    total = sum(sizes)
    pieces: list[list[Piece]] = [[] for _ in range(shards)]
    begin = 0
    for index, (tensor, size) in enumerate(zip(like, sizes, strict=True)):
        n_rows = tensor.shape[0] if tensor.dim() else 1
        edges = [0]
        for shard in range(shards):  # where this shard's bytes end, in rows of this tensor
            end = total * (shard + 1) / shards - begin
            row = round(end / size * n_rows) if size else n_rows
            edges.append(n_rows if shard == shards - 1 else min(max(row, edges[-1]), n_rows))
        for shard, (first, last) in enumerate(pairwise(edges)):
            if last > first:
                whole = (first, last) == (0, n_rows)
                pieces[shard].append(Piece(index, None if whole else (first, last)))
        begin += size
    return pieces
