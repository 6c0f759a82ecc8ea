"""Activation checkpointing: computing activations again instead of keeping them."""

from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import (
    CheckpointEvery,
    CheckpointPolicy,
    CheckpointSqrt,
    MemoryBudget,
    Selective,
    checkpoint_activations,
)

__all__ = [
    "CheckpointEvery",
    "CheckpointPolicy",
    "CheckpointSqrt",
    "Executor",
    "MemoryBudget",
    "Selective",
    "checkpoint_activations",
]
