"""Optimizers that torch does not have, updates of 16-bit parameters, how noisy gradients are."""

from scaledtrain.optim.delayed_nesterov import DelayedNesterov
from scaledtrain.optim.narrow import (
    KahanCompensation,
    MasterWeights,
    Rounding,
    StochasticRounding,
    WideStep,
)
from scaledtrain.optim.noise_scale import GradientNoise, SmoothedNoise, gradient_noise

__all__ = [
    "DelayedNesterov",
    "GradientNoise",
    "KahanCompensation",
    "MasterWeights",
    "Rounding",
    "SmoothedNoise",
    "StochasticRounding",
    "WideStep",
    "gradient_noise",
]
