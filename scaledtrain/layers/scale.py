"""Whether the loss scale of float16 still finds its range."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

__all__ = ["ScaleWatch"]

WINDOW = 100
"""Steps."""
OVERFLOWS = 10
"""Of them, at most; a run that begins with a scale of 65536 has a few in its first steps."""


class ScaleWatch:
    """Looks at what a loss scaler tells after each step; each thing is told once.

    Args:
        floor: below which the scale does not go.
        told: what has been said already; what is said is added.

    Example:
        >>> watch = ScaleWatch(floor=1.0, told=set())
        >>> list(watch.look({"loss_scale": 2.0, "overflows": 15}))
        []
        >>> [text.partition(",")[0] for text in watch.look({"loss_scale": 1.0, "overflows": 16})]
        ['the loss scale is down to 1']
    """

    def __init__(self, floor: float, told: set[str]) -> None:
        self._floor = floor
        self._before: tuple[float, float] | None = None
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._told = told

    def look(self, metrics: Mapping[str, float]) -> Iterator[str]:
        """What to say.

        Args:
            metrics: of a `LossScaler`; without a scale there is nothing to say.
        """
        if "loss_scale" not in metrics:
            return
        scale, overflows = metrics["loss_scale"], metrics.get("overflows", 0)
        if self._before is not None:
            self._recent.append(overflows - self._before[1])
            if scale <= self._floor < self._before[0] and "scale floor" not in self._told:
                self._told.add("scale floor")
                yield (
                    f"the loss scale is down to {scale:g}, the least it may be: gradients are not "
                    "scaled any more, and the next overflow ends the run. Compute in bfloat16 "
                    "(precision=bf16-mixed), or lower the learning rate"
                )
        self._before = (scale, overflows)
        halved = sum(self._recent)
        if halved > OVERFLOWS and "scale halved" not in self._told:
            self._told.add("scale halved")
            yield (
                f"float16 overflowed in {halved:.0f} of the last {len(self._recent)} steps, which "
                f"made no update; the loss scale is {scale:g} now. Values or gradients are too "
                "large for it: lower the learning rate, clip gradients (max_grad_norm=1.0), or "
                "compute in bfloat16 (precision=bf16-mixed)"
            )
