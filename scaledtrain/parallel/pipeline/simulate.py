"""What a pipeline schedule comes to before it runs: whether it can end, how long, how much idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.schedules import Action, Kind, PipelineOrder

__all__ = ["Seconds", "Timed", "Timetable", "check_order", "peak_live", "peak_live_of", "simulate"]

Seconds = Mapping[Kind, float] | Callable[[Action], float]
"""How long an action takes: by its kind, or by itself."""


class Timed(NamedTuple):
    """An action from ``start`` to ``end``, in seconds."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timetable:
    """When each rank computes what, planned or measured.

    Args:
        name: of the schedule.
        ranks: for each rank what it computed, in order.
    """

    name: str
    ranks: tuple[tuple[Timed, ...], ...]

    @property
    def start(self) -> float:
        """Of the first action."""
        return min(timed.start for own in self.ranks for timed in own)

    @property
    def end(self) -> float:
        """Of the last action."""
        return max(timed.end for own in self.ranks for timed in own)

    @property
    def seconds(self) -> float:
        """From the first action to the end of the last."""
        return self.end - self.start

    @property
    def idle_share(self) -> float:
        """How much of the ranks' time passes without computing."""
        busy = sum(timed.end - timed.start for own in self.ranks for timed in own)
        return 1.0 - busy / (len(self.ranks) * self.seconds)


def check_order(order: PipelineOrder) -> None:
    """Make sure that every microbatch is computed once in each stage, and that no rank waits ever.

    Args:
        order: to be checked.

    Raises:
        ConfigError: it is not so; the message names the actions.
    """
    counts = Counter(action for actions in order.ranks for action in actions)
    for stage in range(order.n_stages):
        for i in range(order.n_microbatches):
            found = {kind: counts[Action(kind, stage, i)] for kind in ("F", "B", "I", "W")}
            if list(found.values()) not in ([1, 1, 0, 0], [1, 0, 1, 1]):
                raise ConfigError(
                    f"the pipeline schedule {order.name} computes microbatch {i} in stage {stage} "
                    f"with {found}; there is one F, and one B or one I and one W"
                )
    simulate(order, {"F": 1.0, "B": 1.0, "I": 1.0, "W": 1.0})


def simulate(order: PipelineOrder, seconds: Seconds, transfer_seconds: float = 0.0) -> Timetable:
    """Run a schedule in thought.

    A rank does its actions in order, each as soon as what it needs is there. Left out: that
    transfers share a link, and that sending takes a rank's own time.

    Args:
        order: of the actions.
        seconds: how long each takes.
        transfer_seconds: from one rank to another.

    Returns:
        When each action begins and ends.

    Raises:
        ConfigError: ranks would wait for each other for ever; the message says who for what.

    Example:
        >>> from scaledtrain.parallel.pipeline.schedules import pipeline_order
        >>> order = pipeline_order("1F1B", n_ranks=4, n_microbatches=8)
        >>> planned = simulate(order, {"F": 1.0, "B": 2.0})
        >>> planned.seconds, planned.idle_share  # (8 + 3) x 3 seconds, 3 / (8 + 3)
        (33.0, 0.2727272727272727)
    """
    duration = seconds if callable(seconds) else lambda action: seconds[action.kind]
    done: dict[Action, tuple[float, int]] = {}  # its end, and the rank
    ranks: list[list[Timed]] = [[] for _ in order.ranks]
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(order.ranks):
            own = ranks[rank]
            while len(own) < len(actions):
                action = actions[len(own)]
                if _missing(order, action, done):
                    break
                start = own[-1].end if own else 0.0
                for needed in _needs(order, action):
                    if needed in done:
                        end, where = done[needed]
                        start = max(start, end + (transfer_seconds if where != rank else 0.0))
                own.append(Timed(action, start, start + duration(action)))
                done[action] = (own[-1].end, rank)
                progress = True
    waiting = [
        f"rank {rank} cannot do {actions[len(own)]} before "
        f"{' and '.join(_missing(order, actions[len(own)], done))}"
        for rank, (actions, own) in enumerate(zip(order.ranks, ranks, strict=True))
        if len(own) < len(actions)
    ]
    if waiting:
        raise ConfigError(
            f"the pipeline schedule {order.name} would wait for ever: {'; '.join(waiting)}"
        )
    return Timetable(order.name, tuple(map(tuple, ranks)))


def _needs(order: PipelineOrder, action: Action) -> Iterator[Action]:
    """What is done before; of a backward after it either form."""
    kind, stage, i = action
    if kind == "F":
        if stage > 0:
            yield Action("F", stage - 1, i)
    elif kind == "W":
        yield Action("I", stage, i)
    else:
        yield Action("F", stage, i)
        if stage < order.n_stages - 1:
            yield Action("B", stage + 1, i)
            yield Action("I", stage + 1, i)


def _missing(order: PipelineOrder, action: Action, done: Mapping[Action, object]) -> list[str]:
    needs = list(_needs(order, action))
    either = needs[1:]  # of a backward: it came as a B or as an I
    missing = [str(a) for a in needs[:1] if a not in done]
    if either and not any(a in done for a in either):
        missing.append(str(either[0]))
    return missing


def peak_live(order: PipelineOrder) -> list[int]:
    """For each rank, of how many forward passes it keeps the activations at most.

    A pass counts for one stage; its activations are let go of by its backward, a backward in two
    parts keeps them to the second one.

    Args:
        order: of all actions of a step.

    Example:
        >>> from scaledtrain.parallel.pipeline.schedules import pipeline_order
        >>> peak_live(pipeline_order("GPipe", n_ranks=3, n_microbatches=8))
        [8, 8, 8]
        >>> peak_live(pipeline_order("1F1B", n_ranks=3, n_microbatches=8))
        [3, 2, 1]
    """
    return [_peak(actions) for actions in order.ranks]


def peak_live_of(order: PipelineOrder, stage: int) -> int:
    """The same of one stage.

    Example:
        >>> from scaledtrain.parallel.pipeline.schedules import pipeline_order
        >>> order = pipeline_order("Interleaved1F1B", n_ranks=2, n_microbatches=4)
        >>> [peak_live_of(order, stage) for stage in range(4)]
        [4, 3, 2, 1]
    """
    return _peak(action for action in order.ranks[order.rank_of[stage]] if action.stage == stage)


def _peak(actions: Iterable[Action]) -> int:
    change = {"F": 1, "B": -1, "I": 0, "W": -1}
    live = peak = 0
    for action in actions:
        live += change[action.kind]
        peak = max(peak, live)
    return peak
