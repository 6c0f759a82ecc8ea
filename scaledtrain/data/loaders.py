"""What a loader may offer beside batches, and what is known of its length."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, Protocol, runtime_checkable

from scaledtrain.errors import ConfigError

__all__ = ["StatefulLoader", "StridedLoader", "known_length", "must_end"]


@runtime_checkable
class StridedLoader(Protocol):
    """A loader that gives every n-th batch of an epoch, from any batch on, and reads no other."""

    batch_size: int
    """Samples in a full batch."""
    infinite: bool
    """Whether an epoch has no end."""

    def __len__(self) -> int:
        """Batches in an epoch, those of all replicas.

        Raises:
            TypeError: that is not known, or there is no end.
        """

    def batches(
        self, epoch: int, start: int = 0, step: int = 1, seed: int | None = None
    ) -> Generator[Any, None, None]:
        """Batches ``start``, ``start + step``, ... of an epoch.

        Which samples are in batch i is the same for the same (seed, epoch), whatever the start and
        the step. None stands for a batch of which nothing could be read. Without a length, the
        iterations from all starts below ``step`` are equally long: None stands for no batch.
        """


@runtime_checkable
class StatefulLoader(Protocol):
    """A loader that keeps its own place inside an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """The place of the iteration under way; of numbers, texts, tensors, lists and dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there."""


def must_end(loader: Iterable[Any], what: str) -> None:
    """Raise ConfigError if an epoch of this loader has no end, and ``what`` would wait for it."""
    if isinstance(loader, StridedLoader) and loader.infinite:
        raise ConfigError(
            f"{what} would never end with a loader that is infinite; give it one with "
            "infinite=False, or a limit in steps or seconds"
        )


def known_length(iterable: Any) -> int | None:
    """How many it has; None if only its end will tell."""
    try:
        return len(iterable)
    except TypeError:
        return None
