"""Activation checkpointing: computing activations again instead of keeping them."""

from scaledtrain.recompute.apply import checkpoint_activations
from scaledtrain.recompute.budget import MemoryBudget
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import (
    CheckpointEvery,
    CheckpointPolicy,
    CheckpointSqrt,
    Selective,
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
