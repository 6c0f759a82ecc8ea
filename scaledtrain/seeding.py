"""Seeds for every random generator that a run uses."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = [
    "be_deterministic",
    "generator_states",
    "kept_generators",
    "one_thread",
    "seed_everything",
    "set_generator_states",
]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) with ``seed + rank``.

    Give the rank where ranks must differ (dropout), leave it out where they must agree (the model's
    initial values).

    Args:
        seed: of all of them.
        rank: added to it.

    Example:
        >>> seed_everything(7)
        >>> first = torch.rand(2)
        >>> seed_everything(7)
        >>> torch.equal(torch.rand(2), first)
        True
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, this process computes in one thread: the bits of a sum may depend on how many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generator_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (all devices)."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Put the generators back into what `generator_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
