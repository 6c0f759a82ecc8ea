"""When a step takes more samples: as gradients become noisier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scaledtrain.errors import ConfigError

__all__ = ["BatchGrowth"]

_POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


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
        learning_rate: that of the schedule is multiplied by 1 (``"none"``), m (``"linear"``) or
            m^0.5 (``"sqrt"``). Betas of Adam stay as they are.

    Raises:
        ConfigError: a value out of its range.

    References:
        McCandlish et al. 2018, arXiv 1812.06162, section 2.3; Smith et al. 2018, Don't Decay the
        Learning Rate, Increase the Batch Size, arXiv 1711.00489.
    """

    max_batch_size: int
    min_batch_size: int | None = None
    patience: int = 3
    learning_rate: Literal["none", "linear", "sqrt"] = "none"

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"patience is {self.patience}; it counts measurements, >= 1")
        if self.learning_rate not in _POWERS:
            raise ConfigError(
                f"learning_rate is {self.learning_rate!r}; how it follows the batch is one of "
                f"{', '.join(_POWERS)}"
            )
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
        return min(math.ceil(least / configured), self.max_batch_size // configured)

    def following(self, multiple: int, configured: int) -> int:
        """The m after ``multiple``; the same if there is no larger one."""
        return max(multiple, min(2 * multiple, self.max_batch_size // configured))

    def scale(self, multiple: int) -> float:
        """By what the learning rate is multiplied at that m."""
        return float(multiple ** _POWERS[self.learning_rate])
