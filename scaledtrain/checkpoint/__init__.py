"""Saving a run and resuming it exactly; activation checkpointing is `scaledtrain.recompute`."""

from scaledtrain.checkpoint.policy import Checkpointing
from scaledtrain.checkpoint.signals import Preempted

__all__ = ["Checkpointing", "Preempted"]
