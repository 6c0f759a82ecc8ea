"""Seeds for every random generator that a run uses."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["be_deterministic", "kept_generators", "seed_everything"]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) with ``seed + rank``.

    Give the rank where ranks must differ (dropout), leave it out where they must agree (the model's
    initial values).
    """
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators are put back afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def be_deterministic() -> None:
    """Make torch use deterministic kernels only; it raises where an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
