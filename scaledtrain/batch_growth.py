"""When a step takes more samples: as gradients become noisier."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scaledtrain.errors import ConfigError
from scaledtrain.optim.scaling import LearningRateScaling, Rule

__all__ = ["BatchGrowth"]


@dataclass(frozen=True)
class BatchGrowth:
    """The global batch grows with the noise scale, by gradient accumulation.

    A step is made of m steps as configured, m = 1 at first. When the smoothed noise scale has been
    at least the next larger batch in each of ``patience`` measurements, m doubles, or becomes as
    large as ``max_batch_size`` lets it; then patience begins anew. It never shrinks: the noise
    scale grows as the loss falls, and a batch above it costs samples but harms nothing. A replica
    needs no more memory, as it computes with batches as large as before.

    Args:
        max_batch_size: samples of a step, of all replicas together, that are never exceeded.
        min_batch_size: begin with at least so many; None: with the configured step.
        patience: measurements in a row that have to say so.
        lr_scaling: how the optimizer's settings follow, a rule of `LearningRateScaling`:
            ``"linear"`` (learning rate times m), ``"sqrt"`` (times m^0.5, with Adam's betas and
            eps), or ``"none"``. A `LearningRateScaling` to the configured step comes on top. Beside
            `scaledtrain.optim.AdaScale`, which follows by itself, ``"none"`` or ``"adascale"``.

    Raises:
        ConfigError: a value out of its range.

    References:
        McCandlish et al. 2018, arXiv 1812.06162, section 2.3; Smith et al. 2018, Don't Decay the
        Learning Rate, Increase the Batch Size, arXiv 1711.00489.
    """

    max_batch_size: int
    min_batch_size: int | None = None
    patience: int = 3
    lr_scaling: Rule = "none"

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"patience is {self.patience}; it counts measurements, >= 1")
        LearningRateScaling(self.lr_scaling)  # which refuses other words
        least = 1 if self.min_batch_size is None else self.min_batch_size
        if not 1 <= least <= self.max_batch_size:
            raise ConfigError(
                f"the batch is to stay between min_batch_size {self.min_batch_size} and "
                f"max_batch_size {self.max_batch_size}; these count samples, "
                "1 <= min_batch_size <= max_batch_size"
            )

    def first(self, configured: int) -> int:
        """The m to begin with.

        Args:
            configured: samples of a step, of all replicas together.

        Raises:
            ConfigError: the batch can never grow.
        """
        if 2 * configured > self.max_batch_size:
            raise ConfigError(
                f"the batch is to grow up to max_batch_size {self.max_batch_size}, but a step has "
                f"{configured} samples already (batch size x accumulation x replicas), and can "
                "only become a multiple of that; raise max_batch_size, or configure smaller steps"
            )
        least = configured if self.min_batch_size is None else self.min_batch_size
        return min(math.ceil(least / configured), self.largest(configured))

    def following(self, multiple: int, configured: int) -> int:
        """The m after ``multiple``; the same if there is no larger one."""
        return max(multiple, min(2 * multiple, self.largest(configured)))

    def scaling(self, configured: int) -> LearningRateScaling:
        """Of the optimizer's settings, which are for the configured step."""
        return LearningRateScaling(self.lr_scaling, configured)

    def largest(self, configured: int) -> int:
        """The last m."""
        return self.max_batch_size // configured
