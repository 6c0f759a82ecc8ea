"""Where the tensors of a call lie in the memory that ranks share, and how the call is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scaledtrain.comm.flat import aligned
from scaledtrain.comm.reduction import Reduction, divisors
from scaledtrain.errors import ConfigError

__all__ = [
    "BLOCK_ELEMENTS",
    "CALLS",
    "DTYPES",
    "HEADER_BYTES",
    "SMALL_BYTES",
    "Block",
    "Piece",
    "Plan",
    "check_memory",
    "describe",
    "header_offset",
    "memory_bytes",
    "result_offset",
    "slot_offset",
]

_CHUNK_BYTES = 512 * 1024  # of a slot: few enough to stay in a cache, enough to be worth meeting
SMALL_BYTES = 32 * 1024  # up to here one barrier less is worth more than sharing the additions
BLOCK_ELEMENTS = 32 * 1024  # up to here torch uses one thread: ranks already share the cores
HEADER_BYTES = 64  # what a rank says of a call before anything is read of it

CALLS = ("sum", "mean", "max", "broadcast")
_HALF = (torch.float16, torch.bfloat16)
_FLOATING = {torch.float32, torch.float64, *_HALF}
_NUMBERS = {*_FLOATING, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}
DTYPES = {"mean": _FLOATING, "sum": _NUMBERS, "max": {*_NUMBERS, torch.bool}}


class Piece(NamedTuple):
    """A part of one tensor that lies in one chunk."""

    tensor: int
    tensor_offset: int
    chunk_offset: int
    n_bytes: int


class Block(NamedTuple):
    """Elements of one dtype that lie side by side in a chunk."""

    dtype: torch.dtype
    chunk_offset: int
    n_elements: int


class Plan:
    """Where tensors of given shapes and dtypes lie in the payload, and how it is cut.

    The payload holds all tensors of one dtype, then all of the next, each dtype from a multiple of
    64 bytes on; it is cut into chunks of a slot's size.
    """

    def __init__(
        self, tensors: Sequence[Tensor], call: str, src: int, rank: int, size: int
    ) -> None:
        _check(tensors, call)
        self.call = call
        self.src = src
        self.n_tensors = len(tensors)
        terms = tuple((r, 1.0) for r in range(size))
        self.unweighted = Reduction(call, terms, divisors(size) if call == "mean" else None)
        self._rank = rank
        self._size = size
        self._regions: list[tuple[torch.dtype, int, int]] = []
        by_dtype: dict[torch.dtype, list[int]] = {}
        for index, t in enumerate(tensors):
            by_dtype.setdefault(t.dtype, []).append(index)
        pieces: dict[int, list[Piece]] = {}
        end = 0
        for dtype, indices in by_dtype.items():
            start = end = aligned(end)
            for index in indices:
                n_bytes = tensors[index].numel() * dtype.itemsize
                _cut(index, end, n_bytes, pieces)
                end += n_bytes
            self._regions.append((dtype, start, end))
        self.filled = [index for index, t in enumerate(tensors) if t.numel()]
        self.n_bytes = end
        self.n_chunks = max(1, -(-end // _CHUNK_BYTES))
        self.pieces = [pieces.get(k, []) for k in range(self.n_chunks)]
        self._blocks: dict[int, list[Block]] = {}
        text = f"{call} {src} {[(tuple(t.shape), str(t.dtype)) for t in tensors]}"
        self.digest = hashlib.blake2b(text.encode(), digest_size=8).digest()

    def blocks(self, chunk: int) -> list[Block]:
        """What this rank reduces of a chunk: its share, or all if the payload is small."""
        blocks = self._blocks.get(chunk)
        if blocks is None:
            blocks = self._blocks[chunk] = self._make_blocks(chunk)
        return blocks

    def _make_blocks(self, chunk: int) -> list[Block]:
        base = chunk * _CHUNK_BYTES
        start, stop = base, min(base + _CHUNK_BYTES, self.n_bytes)
        if self.n_bytes > SMALL_BYTES:
            share = aligned(-(-(stop - start) // self._size))
            start, stop = start + self._rank * share, min(stop, start + (self._rank + 1) * share)
        blocks = []
        for dtype, first, last in self._regions:
            low, high = max(start, first), min(stop, last)
            step = BLOCK_ELEMENTS * dtype.itemsize
            for offset in range(low, high, step):
                n_elements = (min(step, high - offset)) // dtype.itemsize
                blocks.append(Block(dtype, offset - base, n_elements))
        return blocks


def _check(tensors: Sequence[Tensor], call: str) -> None:
    for index, t in enumerate(tensors):
        if not t.is_cpu or t.layout is not torch.strided:
            raise ConfigError(
                f"tensor {index} is on {t.device} ({t.layout}); ranks share memory only for dense "
                "tensors on the CPU: move it there, or use transport='torch'"
            )
        if t.dtype not in DTYPES.get(call, {t.dtype}):
            raise ConfigError(
                f"tensor {index} is {t.dtype}, of which no {call} is taken; convert it (a mean "
                "needs floats; bool has only 'max', which says whether any rank's is True)"
            )


def check_memory(plan: Plan, pointers: list[int]) -> None:
    """Raise ConfigError where tensors, by the addresses of their memory, cannot be copied."""
    all_filled = len(plan.filled) == len(pointers)
    used = pointers if all_filled else [pointers[index] for index in plan.filled]
    if 0 in used:
        raise ConfigError(
            f"tensor {plan.filled[used.index(0)]} has no memory (a tensor subclass, or one whose "
            "storage was given back); pass plain tensors"
        )
    if len(set(used)) < len(used):
        # A large payload is copied out in part while other parts are still copied in.
        raise ConfigError("two tensors of one call lie in the same memory; pass each only once")


def _cut(index: int, start: int, n_bytes: int, pieces: dict[int, list[Piece]]) -> None:
    """Cut one tensor, which lies from byte ``start`` of the payload on, at the ends of chunks."""
    done = 0
    while done < n_bytes:
        chunk, offset = divmod(start + done, _CHUNK_BYTES)
        length = min(n_bytes - done, _CHUNK_BYTES - offset)
        pieces.setdefault(chunk, []).append(Piece(index, done, offset, length))
        done += length


def header_offset(size: int, parity: int, rank: int) -> int:
    """Where a rank's header lies, in steps of this parity."""
    return (parity * size + rank) * HEADER_BYTES


def slot_offset(size: int, parity: int, rank: int) -> int:
    """Where a rank's slot lies, in steps of this parity."""
    return aligned(2 * size * HEADER_BYTES, 4096) + (parity * (size + 1) + rank) * _CHUNK_BYTES


def result_offset(size: int, parity: int) -> int:
    """Where the sums lie, in steps of this parity."""
    return slot_offset(size, parity, size)


def memory_bytes(size: int) -> int:
    """What so many ranks share."""
    return slot_offset(size, 1, size) + _CHUNK_BYTES


def describe(call: int, src: int, n_tensors: int, n_bytes: int) -> str:
    """A call, for people."""
    op = CALLS[call]
    name = f"broadcast(src={src})" if op == "broadcast" else f"all_reduce(op={op!r})"
    return f"{name} of {n_tensors} tensors, {n_bytes} bytes"
