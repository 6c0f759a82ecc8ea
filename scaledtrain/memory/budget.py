"""The least memory for activations that a `MemoryBudget` can promise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Sample
from scaledtrain.recompute.budget import MemoryBudget
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import CheckpointPolicy

__all__ = ["SmallestBudget"]

_LEAST = re.compile(r"(\d+) bytes \([^)]*\) are needed")


@dataclass(frozen=True)
class SmallestBudget(CheckpointPolicy):
    """The smallest `MemoryBudget` that does not refuse; it computes again most, and most often."""

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Ask for a budget of nothing, and take what is said to be enough."""
        try:
            return MemoryBudget(1).install(model, blocks, sample)
        except ConfigError as error:
            least = _LEAST.search(str(error))
            if least is None:
                raise
        return MemoryBudget(int(least[1])).install(model, blocks, sample)
