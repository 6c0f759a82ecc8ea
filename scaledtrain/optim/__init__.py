"""Optimizers that torch does not have."""

from scaledtrain.optim.delayed_nesterov import DelayedNesterov

__all__ = ["DelayedNesterov"]
