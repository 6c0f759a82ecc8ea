"""``scaledtrain.estimate_memory(...)``, and the command ``python -m scaledtrain.memory``."""

from scaledtrain.memory.budget import SmallestBudget
from scaledtrain.memory.estimate import estimate_memory
from scaledtrain.memory.estimator import MemoryEstimator
from scaledtrain.memory.figures import MemoryEstimate, RankMemory
from scaledtrain.memory.measure import Kept

__all__ = [
    "Kept",
    "MemoryEstimate",
    "MemoryEstimator",
    "RankMemory",
    "SmallestBudget",
    "estimate_memory",
]
