"""Random orders of n things that need not be written down: the k-th can be asked for alone."""

from __future__ import annotations

import numpy as np

from scaledtrain.data.sharded.columns import Array

__all__ = ["Permutation"]

SORTED_UP_TO = 4_096  # so many are sorted by random keys, which is exactly uniform
ROUNDS = 8


class Permutation:
    """A random permutation of 0 to n - 1, a pure function of n and the key.

    A few numbers are sorted by random keys. Of many, each is found alone, in constant memory, by a
    Feistel network over the smallest square of a power of two that holds them: in each round the
    one half of the bits is changed by a hash of the other, which can be undone, so no two numbers
    become one. What falls outside 0 to n - 1 is put in again until it is inside (cycle walking),
    less than four times on average.

    The keys come from ``numpy.random.Philox`` over ``SeedSequence``, whose raw 64-bit streams NumPy
    keeps the same in all versions and on all platforms; of ``Generator.permutation`` it does not
    say so. The rest is arithmetic on unsigned integers.

    Args:
        n: how many, >= 1.
        seed: >= 0, of any size.
        key: more numbers >= 0, for permutations that are independent under one seed.

    Example:
        >>> order = Permutation(10**12, 0)
        >>> order.take(10**11, 10**11 + 3)
        array([...])
        >>> sorted(Permutation(5, 0, 7).take(0, 5).tolist())
        [0, 1, 2, 3, 4]

    References:
        Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (cycle walking).
        Mitchell et al. 2021, Bandwidth-Optimal Random Shuffling for GPUs, arXiv:2106.06161.
    """

    def __init__(self, n: int, seed: int, *key: int) -> None:
        self._n = n
        random = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))
        self._order: Array | None = None
        if n <= SORTED_UP_TO:
            self._order = np.argsort(random.random_raw(n), kind="stable")
            return
        self._half = np.uint64(-(-(n - 1).bit_length() // 2))  # bits of each half
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = random.random_raw(ROUNDS)

    def take(self, start: int, stop: int) -> Array:
        """The numbers at these places, int64 ``[stop - start]``."""
        if self._order is not None:
            return self._order[start:stop]
        found = self._encrypt(np.arange(start, stop, dtype=np.uint64))
        while len(outside := np.flatnonzero(found >= self._n)):
            found[outside] = self._encrypt(found[outside])
        return found.view(np.int64)

    def _encrypt(self, numbers: Array) -> Array:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        numbers = (left << self._half) | right
        return numbers


def _mix(words: Array) -> Array:
    """A hash of each 64-bit word, with all bits depending on all (the end of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = words ^ (words >> np.uint64(31))
    return words
