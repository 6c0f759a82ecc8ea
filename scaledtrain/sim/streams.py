"""Random numbers of a virtual cluster: each worker has its own, for each purpose its own."""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["BLOCK", "Purpose", "generator"]

Purpose = Literal["compute", "noise", "speed", "failure"]

_KEYS: dict[Purpose, int] = {"compute": 0, "noise": 1, "speed": 2, "failure": 3}
BLOCK = 32  # draws made at once; 100,000 workers keep one each, so it is no larger than pays


def generator(seed: int, worker: int, purpose: Purpose) -> np.random.Generator:
    """A generator that depends on nothing but its arguments.

    NumPy's PCG64, seeded through its ``SeedSequence``: both are specified, and the same everywhere.
    How a distribution is made from them may change with NumPy's version, and the last bit of a
    logarithm with the type of CPU; so runs with the same seed are the same with the same versions
    on the same type.

    Args:
        seed: of the run; a negative one is taken modulo 2^64.
        worker: from 0.
        purpose: what for.

    Example:
        >>> int(generator(0, 7, "compute").integers(1000))
        707
    """
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(_KEYS[purpose], worker))
    return np.random.Generator(np.random.PCG64(sequence))
