"""The least memory for activations that a `MemoryBudget` can promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Sample
from scaledtrain.recompute.budget import PlanSearch
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import CheckpointPolicy, Live

__all__ = ["SmallestBudget"]


@dataclass(frozen=True)
class SmallestBudget(CheckpointPolicy):
    """The smallest `MemoryBudget` that does not refuse; it computes again most, and most often.

    Nothing is offloaded.
    """

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Find what is enough, and take that.

        Raises:
            ConfigError: there is no sample, or no plan keeps to what was found.
        """
        if sample is None:
            raise ConfigError("the smallest budget needs a sample; see MemoryBudget")
        return _smallest(PlanSearch(model, blocks, sample))

    def install_on_stage(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample, live: Live
    ) -> Executor:
        """The same for all microbatches that are under way at once."""
        return _smallest(PlanSearch(model, blocks, sample, microbatches=live.microbatches))


def _smallest(search: PlanSearch) -> Executor:
    executor = search.fit(search.least())
    if executor is None:
        raise ConfigError(
            "the activations of the smallest plan need another number of bytes each time, so "
            "that no budget can be promised; choose a fixed policy (full, every_k)"
        )
    return executor
