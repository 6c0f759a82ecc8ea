"""Optimizers that torch does not have, and updates of parameters that have only 16 bits."""

from scaledtrain.optim.delayed_nesterov import DelayedNesterov
from scaledtrain.optim.lamb import LAMB
from scaledtrain.optim.lars import LARS
from scaledtrain.optim.narrow import (
    KahanCompensation,
    MasterWeights,
    Rounding,
    StochasticRounding,
    WideStep,
)

__all__ = [
    "LAMB",
    "LARS",
    "DelayedNesterov",
    "KahanCompensation",
    "MasterWeights",
    "Rounding",
    "StochasticRounding",
    "WideStep",
]
