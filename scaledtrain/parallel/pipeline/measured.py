"""A step of a pipeline as a trace has it, beside what its schedule would have made of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.schedules import Action, PipelineOrder
from scaledtrain.parallel.pipeline.simulate import Timed, Timetable, simulate
from scaledtrain.report.traces import WHOLE, Trace, Window

__all__ = ["planned_and_measured"]

_Step = tuple[list[Timed], ...]
"""Of each rank what it did."""

_MICROBATCHES = 12  # that are shown of a schedule without steps


def planned_and_measured(trace: Trace, window: Window = WHOLE) -> list[Timetable]:
    """Two timetables of a traced run whose model was in stages.

    The measured one is that of a step of median length; of an asynchronous schedule, which has no
    steps, that of twelve microbatches in the middle. The planned one has the same actions in the
    same order, each as long as the median of its kind in its stage, and no time for messages. Where
    a run has several pipelines, or sharded stages, it is the first of the chosen ranks that have a
    whole one.

    Args:
        trace: of the run.
        window: of which steps; those that are not wholly inside are left out.

    Raises:
        ConfigError: nothing in the window has stages.
    """
    ranks = _pipeline(trace)
    steps = [step for step in _steps(ranks, window) if all(step)]
    if not steps:
        raise ConfigError(
            f"{trace.folder} has no whole step of a pipeline from {window.start:g} to "
            f"{window.end:g} seconds; choose a run with mesh.pipe above 1 that was made with "
            "trace=true, the ranks of a whole replica, and another part of it"
        )
    seconds = _seconds(steps)
    likely = steps[1:] or steps  # the first one warms up
    shown = sorted(likely, key=_length)[len(likely) // 2]
    order = PipelineOrder("planned", tuple(tuple(t.action for t in own) for own in shown))
    planned = simulate(order, lambda action: seconds[action.kind, action.stage])
    return [planned, Timetable("measured", tuple(map(tuple, shown)))]


def _pipeline(trace: Trace) -> list[list[Timed]]:
    """What the ranks of a pipeline did, which have other stages each; nothing if there is none."""
    found: list[list[Timed]] = []
    stages: set[int] = set()
    for rank in trace.paths:
        own = [Timed(_action(name), start, end) for name, start, end in trace.actions(rank)]
        mine = {timed.action.stage for timed in own}
        if mine and not mine & stages:
            found.append(own)
            stages |= mine
    return found if stages == set(range(len(stages))) else []


def _action(name: str) -> Action:
    stage, kind, microbatch = re.split("([FBIW])", name)
    return Action(kind, int(stage), int(microbatch))  # type: ignore[arg-type]


def _steps(ranks: Sequence[list[Timed]], window: Window) -> Iterable[_Step]:
    cut = [_cut(own) for own in ranks]
    if cut and all(len(of_rank) == 1 for of_rank in cut):
        cut = [[own] for own in _middle([of_rank[0] for of_rank in cut], window)]
    for step in zip(*cut, strict=False):  # a rank that was killed may lack the last ones
        times = [timed for own in step for timed in own]
        if times and window.start <= min(t.start for t in times) <= _end(times) <= window.end:
            yield step


def _cut(own: Sequence[Timed]) -> list[list[Timed]]:
    """Where the first action comes again, a step begins."""
    steps: list[list[Timed]] = []
    for timed in own:
        if not steps or timed.action == steps[-1][0].action:
            steps.append([])
        steps[-1].append(timed)
    return steps


def _middle(ranks: Sequence[list[Timed]], window: Window) -> list[list[Timed]]:
    """What was done for some microbatches that were begun and ended in the window."""
    of: dict[int, list[Timed]] = defaultdict(list)
    for timed in (timed for own in ranks for timed in own):
        of[timed.action.microbatch].append(timed)
    most = max(map(len, of.values()), default=0)
    inside = [
        number
        for number, times in sorted(of.items())
        if len(times) == most
        and min(t.start for t in times) >= window.start
        and _end(times) <= window.end
    ]
    first = max(0, (len(inside) - _MICROBATCHES) // 2)
    shown = set(inside[first : first + _MICROBATCHES])
    return [[timed for timed in own if timed.action.microbatch in shown] for own in ranks]


def _seconds(steps: Iterable[_Step]) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for (kind, stage, _), start, end in (t for step in steps for own in step for t in own):
        found[kind, stage].append(end - start)
    return {key: median(times) for key, times in found.items()}


def _length(step: _Step) -> float:
    times = [timed for own in step for timed in own]
    return _end(times) - min(timed.start for timed in times)


def _end(times: Iterable[Timed]) -> float:
    return max(timed.end for timed in times)
