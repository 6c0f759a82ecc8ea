"""When a run is saved, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scaledtrain.errors import ConfigError

__all__ = ["Checkpointing"]


@dataclass(frozen=True)
class Checkpointing:
    """When a run is saved, and what is kept of it.

    A run is also saved at its end, and on SIGTERM, SIGUSR1 and Ctrl-C. That activations are
    computed again instead of kept is another thing: ``activation_checkpointing``.

    Args:
        every_steps: whenever the step has reached or passed a multiple of this.
        every_minutes: so long after the last one.
        keep_last: how many of the newest stay.
        keep_best: how many stay besides, by ``best_metric`` in the last evaluation before them.
        best_metric: its name in the evaluation.
        best_is: which value of it is the best.
        asynchronous: train on while it is written; training waits for one copy of the state only,
            which takes that much memory, and keeps it for the next one.
        on_failure: when one cannot be written (the disk is full): train on and say it, or end the
            run with the error. Those that there are stay in either case.
        folder: where they go; None: ``checkpoints`` in the folder of the run.
        memory_every_steps: so often each rank keeps a copy of its state in its host's memory, and
            one in that of another host, where both are left if it crashes: ``resume="auto"`` takes
            the newest of these and of the checkpoints. Of strategies whose replicas are in
            lockstep. None: never.
        memory_folder: where these are; None: in /dev/shm.

    Raises:
        ConfigError: a number is not positive, or nothing would be kept.

    Example:
        >>> Checkpointing(every_steps=100, keep_last=1, keep_best=1).kept(
        ...     {100: {"loss": 2.0}, 200: {"loss": 1.0}, 300: {"loss": 1.5}})
        {200, 300}
    """

    every_steps: int | None = None
    every_minutes: float | None = None
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = "loss"
    best_is: Literal["lowest", "highest"] = "lowest"
    asynchronous: bool = False
    on_failure: Literal["go_on", "end"] = "go_on"
    folder: str | None = None
    memory_every_steps: int | None = None
    memory_folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes", "memory_every_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"checkpointing.{name} is {value}; it is > 0, or None for never")
        if self.keep_last < 1 or self.keep_best < 0:
            raise ConfigError(
                f"checkpointing.keep_last is {self.keep_last}, keep_best {self.keep_best}; at "
                "least one must stay: keep_last >= 1, keep_best >= 0"
            )
        choices: Mapping[str, Sequence[str]] = {
            "best_is": ("lowest", "highest"),
            "on_failure": ("go_on", "end"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"checkpointing.{name} is {getattr(self, name)!r}; it is {' or '.join(allowed)}"
                )

    def is_due_by_time(self, seconds: float) -> bool:
        """Whether to save, so long after the last time."""
        return self.every_minutes is not None and seconds >= 60.0 * self.every_minutes

    def is_due_by_steps(self, step: int, last_step: int) -> bool:
        """Whether to save at this step, the last time having been at that one."""
        every = self.every_steps
        return every is not None and step // every > last_step // every

    def is_copied(self, step: int, last_step: int) -> bool:
        """Whether to keep a copy in memory at this step, the last time having been at that one."""
        every = self.memory_every_steps
        return every is not None and step // every > last_step // every

    def kept(self, evaluations: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Which of the checkpoints stay.

        Args:
            evaluations: of each one's step, the last one's values.
        """
        sign = 1.0 if self.best_is == "lowest" else -1.0
        values = {
            step: sign * values[self.best_metric]
            for step, values in evaluations.items()
            if not math.isnan(values.get(self.best_metric, math.nan))
        }
        best = sorted(values, key=lambda step: (values[step], -step))[: self.keep_best]
        return {*sorted(evaluations)[-self.keep_last :], *best}
