"""Optimizers and schedules that torch does not have, updates of 16-bit parameters, noise scale."""

from scaledtrain.optim.adascale import AdaScale, adascale_gain
from scaledtrain.optim.delayed_nesterov import DelayedNesterov
from scaledtrain.optim.lamb import LAMB
from scaledtrain.optim.lars import LARS
from scaledtrain.optim.narrow import KahanCompensation, MasterWeights, Rounding, StochasticRounding
from scaledtrain.optim.noise_scale import GradientNoise, SmoothedNoise, gradient_noise
from scaledtrain.optim.scaling import (
    LearningRateScaling,
    decay_groups,
    norms_and_biases,
    zero_gamma,
)
from scaledtrain.optim.warmup import WarmupDecay
from scaledtrain.optim.wide_step import WideStep

__all__ = [
    "LAMB",
    "LARS",
    "AdaScale",
    "DelayedNesterov",
    "GradientNoise",
    "KahanCompensation",
    "LearningRateScaling",
    "MasterWeights",
    "Rounding",
    "SmoothedNoise",
    "StochasticRounding",
    "WarmupDecay",
    "WideStep",
    "adascale_gain",
    "decay_groups",
    "gradient_noise",
    "norms_and_biases",
    "zero_gamma",
]
