"""What an estimate of memory says."""

from __future__ import annotations

from dataclasses import dataclass

from scaledtrain.memory.measure import Kept

__all__ = ["MemoryEstimate", "RankMemory"]


@dataclass(frozen=True)
class RankMemory:
    """What differs between ranks."""

    optimizer: int
    """State of the optimizer, 32-bit copies of 16-bit parameters included; none on a worker of a
    server."""
    strategy: int
    """What the strategy keeps: copies, a server, what is under way. Below 0 where ranks share the
    memory of their parameters, which then counts on one of them."""
    peak: int
    """Everything that is alive at once, at most, on the device."""
    host: int
    """What is alive at once of shards that the engine keeps in the host's memory (offload), of
    their gradients, optimizer and strategy, at most; none of it is in ``peak``."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one step of training; `estimate_memory` says what is counted."""

    batch_size: int
    """Samples in each batch of a replica."""
    parameters: int
    """Of all parameters of a replica, or of a rank's part."""
    buffers: int
    """Of all buffers, as the parameters."""
    batch: int
    """Inputs and targets of a step, all its microbatches'; where a pipeline's gradients are late,
    of the steps that are under way."""
    gradients: int
    """Of all parameters, between backward pass and update."""
    activations: int
    """Activations and their gradients that are alive at once, at most: what `MemoryBudget`
    limits."""
    kept: Kept
    """Activations at the end of the forward pass, by block."""
    computing: int
    """Activations and gradients of parameters that are alive at once, at most; less than the sum of
    the two, since activations are given up while gradients come."""
    updating: int
    """What the optimizer's update takes at most, beside its state."""
    ranks: tuple[RankMemory, ...]
    """By rank."""
    peak: int
    """Everything that is alive at once, on the rank that needs most."""
    looks_at_values: bool
    """The model reads values of tensors, which there are none of; each was taken for 1."""
