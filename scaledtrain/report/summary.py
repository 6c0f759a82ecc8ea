"""What a run comes to: rates, times, staleness, waiting, and what the textbook expects of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaledtrain.report.runs import Evaluation, RunLog

__all__ = ["Goal", "Summary", "equally_spaced", "summarise"]


@dataclass(frozen=True)
class Goal:
    """A value that an evaluated metric is to reach."""

    metric: str
    value: float
    at_most: bool = False
    """Reached when the metric is this or less (a loss), not this or more."""

    def reached(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation is good enough."""
        found = evaluation.values[self.metric]
        return found <= self.value if self.at_most else found >= self.value

    def __str__(self) -> str:
        return f"{self.metric} {self.value:g}"


@dataclass(frozen=True)
class Summary:
    """One strategy's results. Lists have one entry per worker."""

    name: str
    samples_per_second: float
    """Of all workers together."""
    seconds_to_goal: float | None
    """When an evaluation first saw the goal reached; None: never."""
    final: float | None
    """The metric at the end; None: it was never evaluated."""
    staleness_mean: float | None
    staleness_max: int | None
    waiting_seconds: list[float]
    waiting_shares: list[float]
    """Of the worker's time."""
    batch_sizes: list[float]
    """Samples per step."""
    compute_seconds: list[float]
    """Per step."""
    lockstep: bool
    """Whether all workers made the same number of steps."""

    @property
    def expected_samples_per_second(self) -> float:
        """By the textbook, from the measured compute times, if nothing else took time.

        Workers in lockstep all take as long as the slowest; where nobody waits, rates add up::

            lockstep  sum(batch_i) / max(compute_i)
            else      sum(batch_i / compute_i)

        A strategy that makes some workers wait for others is between the two.
        """
        if self.lockstep:
            return sum(self.batch_sizes) / max(self.compute_seconds)
        pairs = zip(self.batch_sizes, self.compute_seconds, strict=True)
        return sum(batch / seconds for batch, seconds in pairs)


def summarise(name: str, log: RunLog, evaluations: Sequence[Evaluation], goal: Goal) -> Summary:
    """Compute one strategy's results.

    Args:
        name: of the strategy.
        log: its run.
        evaluations: those that count; see `equally_spaced`.
        goal: when it was reached is looked up in them.
    """
    workers, staleness = log.workers, log.staleness
    pushes = staleness.total()
    return Summary(
        name=name,
        samples_per_second=log.samples_per_second,
        seconds_to_goal=next((e.seconds for e in evaluations if goal.reached(e)), None),
        final=evaluations[-1].values[goal.metric] if evaluations else None,
        staleness_mean=sum(s * n for s, n in staleness.items()) / pushes if pushes else None,
        staleness_max=max(staleness, default=None),
        waiting_seconds=[w.seconds_in("waiting") for w in workers],
        waiting_shares=[w.seconds_in("waiting") / w.elapsed for w in workers],
        batch_sizes=[w.samples / w.steps for w in workers],
        compute_seconds=[w.seconds_in("compute") / w.steps for w in workers],
        lockstep=not staleness and len({w.steps for w in workers}) == 1,
    )


def equally_spaced(runs: Mapping[str, RunLog]) -> dict[str, list[Evaluation]]:
    """Evaluations of each run, as far apart in time as those of the run that made them least often.

    Who is evaluated more often has more chances to be lucky, and would reach a goal sooner.
    """
    spacings = {
        name: statistics.median(
            later.seconds - earlier.seconds
            for earlier, later in zip(log.evaluations, log.evaluations[1:], strict=False)
        )
        for name, log in runs.items()
        if len(log.evaluations) > 1
    }
    widest = max(spacings.values(), default=0.0)
    chosen = {}
    for name, log in runs.items():
        every = max(1, round(widest / spacings[name])) if name in spacings else 1
        last = len(log.evaluations) - 1
        chosen[name] = [
            e for i, e in enumerate(log.evaluations) if i % every == every - 1 or i == last
        ]
    return chosen
