"""How parameters are divided over the shards of a server."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scaledtrain.comm.serving.partition import Partition, Piece
from scaledtrain.errors import ConfigError


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.arange(float(torch.Size(s).numel())).view(s) for s in shapes]


def loads(partition: Partition, like: Sequence[Tensor]) -> list[int]:
    shards = range(len(partition.pieces))
    return [sum(t.numel() * 4 for t in partition.part(like, shard)) for shard in shards]


def test_whole_tensors_go_to_the_emptiest_shard_the_largest_first() -> None:
    like = tensors((3,), (5,), (4,), (2,))  # 5 | 4; 3 to the second: 5 | 7; 2 to the first: 7 | 7
    partition = Partition(like, 2)
    assert partition.pieces == [[Piece(1), Piece(3)], [Piece(0), Piece(2)]]
    assert loads(partition, like) == [28, 28]


def test_a_tensor_that_outweighs_the_others_is_cut_into_rows() -> None:
    # 12 + 2 = 14 numbers for two shards: 7 each, rounded to rows of 2: rows 0 to 4 and the rest.
    like = tensors((6, 2), (2,))
    partition = Partition(like, 2)
    assert partition.pieces == [[Piece(0, (0, 4))], [Piece(0, (4, 6)), Piece(1)]]
    assert partition.part(like, 1)[0].tolist() == [[8.0, 9.0], [10.0, 11.0]]
    assert partition.part(like, 1)[0].data_ptr() == like[0][4:].data_ptr()  # a view
    assert Partition(like, 2, cut=False).pieces == [[Piece(0)], [Piece(1)]]


def test_too_many_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 server shards, but the model's 2 trainable tensors"):
        Partition(tensors((4,), (4,)), 3, cut=False)
    with pytest.raises(ConfigError, match="take fewer shards"):
        Partition(tensors((1, 100)), 2)


@given(
    shapes=st.lists(
        st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8
    ).filter(lambda shapes: sum(torch.Size(s).numel() for s in shapes) > 0),
    shards=st.integers(1, 5),
    cut=st.booleans(),
)
def test_every_number_is_in_exactly_one_shard(
    shapes: list[tuple[int, ...]], shards: int, cut: bool
) -> None:
    like = tensors(*shapes)
    try:
        partition = Partition(like, shards, cut)
    except ConfigError:
        return
    seen = [torch.zeros_like(t) for t in like]
    for shard in range(shards):
        for part in partition.part(seen, shard):
            part += 1.0
    assert all(bool((t == 1.0).all()) for t in seen)
    biggest_row = max((t[0].numel() * 4 if t.dim() and len(t) else t.numel() * 4) for t in like)
    if cut:  # each edge is at most half a row off
        sizes = loads(partition, like)
        assert max(sizes) <= 1.1 * sum(sizes) / shards + biggest_row
