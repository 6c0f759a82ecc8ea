"""What a rank trains on: its batches of one step, and of one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol

from scaledtrain.errors import ConfigError

__all__ = ["StepBatch", "Steps", "Weigh", "counted"]

Weigh = Callable[[Any], float]
"""Of how many terms a batch's loss is the mean: so much it counts in a mean over several."""


def counted(weigh: Weigh, batch: Any) -> int:
    """How much a batch counts.

    Raises:
        ConfigError: it is no whole number, or below 0.
    """
    number = float(weigh(batch))
    if not (number >= 0 and number.is_integer()):
        raise ConfigError(
            f"loss_weight gave {number:g} for a batch; it is of how many terms the batch's loss is "
            "the mean (samples, tokens), a whole number >= 0; put weights of samples into the loss"
        )
    return int(number)


class StepBatch(NamedTuple):
    """What one replica trains on in one step."""

    microbatches: list[Any]
    """As the loader gives them, on the replica's device; empty if the epoch left it nothing."""
    sizes: list[int]
    """Samples in each microbatch, or how much else it counts in the mean loss of the step."""
    weight: float = 1.0
    """Samples here relative to a full step's: this replica's weight in a mean over replicas."""
    gradient_samples: float | None = None
    """Samples per rank, where several make the gradient of one replica as the mean of theirs; None:
    this one makes it, from ``samples``."""
    multiple: int = 1
    """How many steps of the usual size this one is."""
    even_share: float | None = None
    """Samples that a rank has of a full step of the usual size if they are shared out evenly; None:
    those of this step, divided by ``multiple``."""
    samples_per_rank: float | None = None
    """Mean over the ranks, of this step; None: as many as here on each."""

    @property
    def samples(self) -> int:
        """Samples in all microbatches, or how much else they count (`Weigh`)."""
        return sum(self.sizes)

    @property
    def is_full(self) -> bool:
        """Whether it is of a whole step, and not of what an epoch had left."""
        if self.even_share is None or self.samples_per_rank is None:
            return self.weight >= 1.0
        return self.samples_per_rank > self.even_share * self.multiple - 1e-6  # rounding


class Steps(Protocol):
    """What a rank trains on, step by step."""

    multiple: int
    """How many steps are made as one from the next one on."""

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch; None if that is not known yet."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None if only the end will tell."""

    @property
    def step_size(self) -> tuple[int, int | None]:
        """See `ReplicaLoader`, as for the rest."""

    def moved(self, steps: int, step_size: tuple[int, int | None]) -> int:
        """How many steps are as many samples as those of another loader."""

    def state_dict(self) -> Any:
        """That of a loader which keeps its own place."""

    def load_state_dict(self, state: Any) -> None:
        """The next epoch goes on where ``state_dict`` was called."""

    def indices(self, epoch: int, step: int) -> list[Any] | None:
        """What the sampler gave for each batch of a step here; None if there is none."""

    def epoch(
        self, epoch: int, start: int = 0, ready: Callable[[], None] | None = None
    ) -> Generator[StepBatch, None, None]:
        """The steps of one epoch, from step ``start`` on."""
