"""Where to cut a model: the smallest slowest stage, by dynamic programming over its parts.

A step of a full pipeline takes as long as its slowest stage takes for a microbatch, or the transfer
between two stages:

    T(s, j) = min over i < j of max(T(s - 1, i), sum of parts i..j-1, 2 * a_(j-1) / bandwidth)

with a_(j-1) the bytes that go from part j-1 to part j, whose gradient comes back. Only stages that
fit into memory count. Of the cuts with the same slowest stage it is the one with the least sum of
squares of the stages' times: the others are as even as they can be.

The cut is a pure function of the costs: ranks that have the same costs, have the same cut.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import cache, partial

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.costs import PartCost
from scaledtrain.parallel.pipeline.split_points import Cut

__all__ = ["describe_cut", "partition", "stage_bytes", "stage_seconds"]


def stage_seconds(costs: Sequence[PartCost], stage: range, bandwidth: float | None = None) -> float:
    """For a microbatch: computing, or sending to the next stage, whichever takes longer.

    Args:
        costs: of all parts.
        stage: indices of its parts.
        bandwidth: bytes a second between two stages; None: sending takes no time.
    """
    seconds = sum(costs[part].seconds for part in stage)
    if bandwidth is None or stage.stop == len(costs):
        return seconds
    return max(seconds, 2 * costs[stage.stop - 1].sent_bytes / bandwidth)


def stage_bytes(costs: Sequence[PartCost], stage: range, live_microbatches: int = 1) -> int:
    """That a stage needs at most: state, what is kept for each microbatch, and for one at work.

    Args:
        costs: of all parts.
        stage: indices of its parts.
        live_microbatches: between their forward and backward pass at the same time.
    """
    own = [costs[part] for part in stage]
    received = costs[stage.start - 1].sent_bytes if stage.start else 0
    kept = received + sum(cost.kept_bytes for cost in own)
    working = max(cost.working_bytes for cost in own)
    return sum(cost.state_bytes for cost in own) + live_microbatches * kept + working


def partition(
    costs: Sequence[PartCost],
    n_stages: int,
    *,
    bandwidth: float | None = None,
    memory_bytes: int | None = None,
    live_microbatches: Sequence[int] | None = None,
) -> Cut:
    """Find the cut with the smallest slowest stage.

    Args:
        costs: of the parts, one after another.
        n_stages: of the whole pipeline: for a schedule with v stages on each of p ranks, p * v.
        bandwidth: see `stage_seconds`.
        memory_bytes: that a stage may need, as `stage_bytes` has it; None: there is enough. With v
            stages on a rank, a v-th of the rank's.
        live_microbatches: for each stage. Of m microbatches, p stages: GPipe has m in each, 1F1B
            min(m, p - i) in stage i. None: one.

    Returns:
        Which parts each stage has.

    Raises:
        ConfigError: fewer parts than stages, or no cut fits into memory.

    Example:
        An embedding, six blocks, and a head that takes as long as two blocks:

        >>> costs = [PartCost(0.1, 0.2), *[PartCost(1.0, 2.0)] * 6, PartCost(2.0, 4.0)]
        >>> cut = partition(costs, 3)
        >>> cut.counts
        (3, 3, 2)
        >>> print(describe_cut(cut, costs))
        stage 0: parts 0 to 2, 6.300 s, 26 % of the time
        stage 1: parts 3 to 5, 9.000 s, 37 % of the time
        stage 2: parts 6 to 7, 9.000 s, 37 % of the time
        slowest stage: 1.11 times the mean

    References:
        Narayanan et al. 2019, PipeDream (SOSP), section 3.1.
    """
    if not 1 <= n_stages <= len(costs):
        raise ConfigError(
            f"{n_stages} stages of a model with {len(costs)} parts: each stage needs at least one; "
            f"take at most {len(costs)} stages, or a model with more blocks"
        )
    live = [1] * n_stages if live_microbatches is None else list(live_microbatches)
    if len(live) != n_stages:
        raise ConfigError(
            f"live_microbatches has {len(live)} numbers for {n_stages} stages; give one for each"
        )

    seconds_of, bytes_of = cache(partial(stage_seconds, costs)), cache(partial(stage_bytes, costs))

    def n_bytes(stage: int, parts: range) -> float:
        return bytes_of(parts, live[stage])

    def seconds(stage: int, parts: range) -> float:
        if memory_bytes is not None and n_bytes(stage, parts) > memory_bytes:
            return math.inf
        return seconds_of(parts, bandwidth)

    slowest, cut = _least(len(costs), n_stages, seconds, max)
    if math.isinf(slowest):
        least, cut = _least(len(costs), n_stages, n_bytes, max)
        raise ConfigError(
            f"no cut into {n_stages} stages fits into {memory_bytes} bytes a stage; the least is "
            f"{int(least)}, with stages of {list(cut.counts)} parts. Take more stages, fewer or "
            "smaller microbatches, or leave the limit out if activations are to be computed again, "
            "which is not counted here"
        )

    def squared(stage: int, parts: range) -> float:
        found = seconds(stage, parts)
        return found**2 if found <= slowest else math.inf

    return _least(len(costs), n_stages, squared, operator.add)[1]


def _least(
    n_parts: int,
    n_stages: int,
    cost: Callable[[int, range], float],
    combine: Callable[[float, float], float],
) -> tuple[float, Cut]:
    """The cut whose stages' costs, combined, are the least."""
    none: tuple[float, tuple[int, ...]] = math.inf, ()
    best = [(0.0, none[1]), *[none] * n_parts]
    for stage in range(n_stages):
        after = n_stages - stage - 1  # stages that need a part each
        found = [none] * (n_parts + 1)
        for stop in range(stage + 1, n_parts - after + 1):
            options = [
                (combine(best[start][0], cost(stage, range(start, stop))), start)
                for start in range(stage, stop)
            ]
            value, start = min(options)
            found[stop] = value, (*best[start][1], stop - start)
        best = found
    value, counts = best[n_parts]
    return value, Cut(counts)


def describe_cut(
    cut: Cut,
    costs: Sequence[PartCost],
    names: Sequence[str] | None = None,
    live_microbatches: Sequence[int] | None = None,
) -> str:
    """A line for each stage: its parts, its time for a microbatch, and its share of all stages'.

    Args:
        cut: of these parts.
        costs: of the parts.
        names: of the parts; None: they are numbered.
        live_microbatches: for each stage: memory is shown, too.
    """
    stages = [cut.parts_of(index) for index in range(len(cut))]
    times = [stage_seconds(costs, stage) for stage in stages]
    whole = sum(times)
    lines = []
    for index, (stage, seconds) in enumerate(zip(stages, times, strict=True)):
        line = f"stage {index}: {_named(stage, names)}, {_time(seconds)}"
        if whole > 0:
            line += f", {seconds / whole:.0%} of the time".replace("%", " %")
        if live_microbatches is not None:
            n_bytes = stage_bytes(costs, stage, live_microbatches[index])
            line += f", {n_bytes / 2**20:.1f} MiB"
        lines.append(line)
    if whole > 0:
        lines.append(f"slowest stage: {max(times) * len(times) / whole:.2f} times the mean")
    return "\n".join(lines)


def _named(stage: range, names: Sequence[str] | None) -> str:
    first, last = stage.start, stage.stop - 1
    if names is None:
        return f"part {first}" if first == last else f"parts {first} to {last}"
    return names[first] if first == last else f"{names[first]} to {names[last]} ({len(stage)})"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"
