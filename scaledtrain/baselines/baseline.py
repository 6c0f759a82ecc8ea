"""What every baseline is: something that gives outputs as a model of the task would."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scaledtrain.errors import ConfigError

__all__ = ["Baseline", "Learner", "LeftOut"]


@dataclass(frozen=True)
class Baseline:
    """One that has learnt what it needs.

    Args:
        name: as in results.
        says: in words, to follow "than".
        outputs: from a batch of inputs what a model would return, for the task's own loss and
            metrics: logits of classes or tokens, or numbers.
        samples: how many it has learnt from.
        is_trivial: it looks at no input.
        note: what a reader should know; "" for nothing.
    """

    name: str
    says: str
    outputs: Callable[[Tensor], Tensor]
    samples: int
    is_trivial: bool = False
    note: str = ""


@dataclass(frozen=True)
class LeftOut:
    """One that there is not, and why."""

    name: str
    why: str


class Learner(Protocol):
    """Learns in one pass over the training data what all baselines of a kind of task need."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its baselines, the simplest first."""

    def see(self, inputs: Tensor, targets: Tensor) -> None:
        """Learn from a batch; its memory does not grow with the number of batches."""

    def baselines(self, names: Iterable[str]) -> list[Baseline | LeftOut]:
        """Those of these names, made of what has been seen."""


def check_targets(targets: Tensor, n_classes: int, what: str) -> None:
    """Raise ConfigError if one of them is no class from 0 on below ``n_classes``."""
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < n_classes:
        raise ConfigError(
            f"targets of the data go from {int(targets.min())} to {int(targets.max())}, but there "
            f"are {n_classes} {what}, from 0 on; set data.n_classes, or mend the data"
        )
