"""What a run is watched for, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from scaledtrain.errors import ConfigError

__all__ = ["Reaction", "Watch"]

Reaction = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True)
class Watch:
    """What a run is watched for, and what is done about it.

    *Hangs.* A rank that gets no further for ``step_seconds``, or for ``step_times`` its usual step,
    ends the job: where each rank is and the stack of each of its threads go to stderr and into
    ``stuck-<time>.txt`` in the folder of the run, and all ranks end with exit code 70, so that a
    launcher that restarts them (torchrun ``--max-restarts``) goes on from the last checkpoint.

    *Slow ranks.* Every ``ranks_every`` steps a table of what each rank spent its time on. A rank
    whose own work (data and compute) takes more than ``slow_factor`` times the median of all ranks
    is named in a warning.

    *Numbers.* Before an update is made the loss and the norm of the gradient are looked at. Not
    finite, or a loss that is ``spike_sigmas`` robust standard deviations above the median of the
    last ``spike_window`` ones, is answered by one of: ``"skip"``, the update is left out;
    ``"rollback"``, parameters, optimizer and all other state but that of callbacks go back to the
    copy that is taken every ``copy_every`` steps, and training goes on from there with the data
    after the bad batch;
    ``"stop"``, the run ends with an error. An overflow of float16's loss scale is no trouble.

    In a simulated cluster there are no hangs (ranks that wait for each other for ever are named
    anyway), and times are in what ``simulate`` returns: only the numbers are watched there.

    Args:
        step_seconds: the longest that a step, a batch of an evaluation, a save, or the start or end
            of a run may take.
        step_times: the longest that a step may take, in medians of this rank's last 50, but not
            below 10 s; counted once there are 10. Where replicas make steps of their own,
            without the waiting for parameters: another one may be evaluating.
        ranks_every: steps of a rank between two tables.
        slow_factor: see above.
        on_nonfinite: loss or gradient is NaN or infinite. None: as without a watch, the run ends at
            the next record if the loss was.
        on_spike: the loss jumps; None: it may.
        spike_sigmas: see above. The deviation is 1.4826 times the median distance from the median,
            and at least 1 % of the median.
        spike_window: losses of so many steps; none is judged before there are 20.
        copy_every: steps between copies of the state for ``"rollback"``, in the host's memory.
        at_most: updates left out and rollbacks in a run; one more ends it with an error.
        dump: write the bad batch into ``troubles`` in the folder of the run; see
            `scaledtrain.watch.load_batch`.

    Raises:
        ConfigError: a number is out of its range, or there is no such reaction.

    Example:
        >>> Watch(step_seconds=600, on_nonfinite="skip").rolls_back
        False
    """

    step_seconds: float | None = None
    step_times: float | None = None
    ranks_every: int | None = None
    slow_factor: float = 1.5
    on_nonfinite: Reaction | None = None
    on_spike: Reaction | None = None
    spike_sigmas: float = 8.0
    spike_window: int = 100
    copy_every: int = 100
    at_most: int = 10
    dump: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "step_seconds": (self.step_seconds is None or self.step_seconds > 0, "> 0, or None"),
            "step_times": (self.step_times is None or self.step_times > 1, "> 1, or None"),
            "ranks_every": (self.ranks_every is None or self.ranks_every >= 1, ">= 1, or None"),
            "slow_factor": (self.slow_factor > 1, "> 1"),
            "spike_sigmas": (self.spike_sigmas > 0, "> 0"),
            "spike_window": (self.spike_window >= 20, "a number of steps, >= 20"),
            "copy_every": (self.copy_every >= 1, "a number of steps, >= 1"),
            "at_most": (self.at_most >= 0, "a number of updates, >= 0"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ConfigError(f"watch.{name} is {getattr(self, name)}; it is {expected}")
        for name in ("on_nonfinite", "on_spike"):
            if getattr(self, name) not in (None, *get_args(Reaction)):
                raise ConfigError(
                    f"watch.{name} is {getattr(self, name)!r}; it is one of "
                    f"{', '.join(map(repr, get_args(Reaction)))}, or None"
                )

    @property
    def looks_for_hangs(self) -> bool:
        """Whether any time is limited."""
        return self.step_seconds is not None or self.step_times is not None

    @property
    def judges(self) -> bool:
        """Whether numbers are looked at."""
        return self.on_nonfinite is not None or self.on_spike is not None

    @property
    def rolls_back(self) -> bool:
        """Whether copies of the state are needed."""
        return "rollback" in (self.on_nonfinite, self.on_spike)
