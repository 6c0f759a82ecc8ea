"""Where the time of a run went, in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scaledtrain.report.runs import RunLog, WorkerLog
from scaledtrain.timeline import PHASES, Phase

__all__ = ["RankRow", "findings", "rank_rows"]

SLOW = 1.2
"""A rank that takes so many times as long as the median rank is called slow."""
NOTABLE = 0.1
"""A share of the time that is worth a sentence."""

_WORDS: dict[Phase, str] = {
    "data": "waiting for the loader (more of its workers, or a sharded data set, may help)",
    "communication": "communication (a compression, or fewer meetings as in LocalSGD, may help)",
    "evaluation": "evaluation",
}


@dataclass(frozen=True)
class RankRow:
    """How one rank spent its time."""

    rank: int
    steps: int
    samples: int
    compute_seconds: float
    """Per step."""
    slowness: float
    """Seconds of computing per sample, as a multiple of the median rank's."""
    shares: dict[Phase, float]
    """Of its time; what belongs to no phase is missing."""
    staleness: float | None
    """Mean over its pushed gradients."""


def rank_rows(log: RunLog) -> list[RankRow]:
    """One for each rank, in their order."""
    costs = [_seconds_per_sample(worker) for worker in log.workers]
    median = statistics.median(costs)
    return [
        _row(worker, cost / median if median else 1.0)
        for worker, cost in zip(log.workers, costs, strict=True)
    ]


def _seconds_per_sample(worker: WorkerLog) -> float:
    return worker.seconds_in("compute") / max(worker.samples, 1)


def _row(worker: WorkerLog, slowness: float) -> RankRow:
    pushes = worker.staleness.total()
    return RankRow(
        rank=worker.rank,
        steps=worker.steps,
        samples=worker.samples,
        compute_seconds=worker.seconds_in("compute") / worker.steps,
        slowness=slowness,
        shares={phase: worker.seconds_in(phase) / worker.elapsed for phase in PHASES},
        staleness=sum(s * n for s, n in worker.staleness.items()) / pushes if pushes else None,
    )


def findings(log: RunLog) -> list[str]:
    """Sentences about one run, the most important first.

    For workers in lockstep, what a run without waiting would reach is the sum of the rates at
    which they compute, sum(batch_i / compute_i), over the rate that was.
    """
    rows = rank_rows(log)
    slow = [row for row in rows if row.slowness >= SLOW]
    others = [row for row in rows if row.slowness < SLOW] or rows
    said = [_about_speed(log, rows, slow, others)]
    for phase, words in _WORDS.items():
        share = statistics.fmean(row.shares[phase] for row in rows)
        if share >= NOTABLE:
            said.append(f"{share:.0%} of the time went into {words}.")
    staleness = log.staleness
    if pushes := staleness.total():
        mean = sum(s * n for s, n in staleness.items()) / pushes
        said.append(
            f"A gradient was {mean:.1f} updates old on average when it was used, "
            f"at most {max(staleness)}."
        )
    return said


def _about_speed(
    log: RunLog, rows: Sequence[RankRow], slow: Sequence[RankRow], others: Sequence[RankRow]
) -> str:
    computing = statistics.fmean(row.shares["compute"] for row in rows)
    if len(rows) == 1:
        return f"One process computed for {computing:.0%} of the time."
    waiting = statistics.fmean(row.shares["waiting"] for row in others)
    if not slow:
        return (
            f"All {len(rows)} ranks are about as fast as each other; they computed for "
            f"{computing:.0%} of the time and waited for {waiting:.0%}."
        )
    slowest = max(slow, key=lambda row: row.slowness)
    who = f"rank {slowest.rank} is {slowest.slowness:.1f}x slower"
    if len(slow) > 1:
        who = f"{len(slow)} of {len(rows)} ranks are slow, {who}"
    text = f"{who[0].upper()}{who[1:]}; the others waited for {waiting:.0%} of their time"
    if log.staleness:  # nobody waits for the slow one
        return f"{text}."
    possible = sum(row.samples / row.steps / row.compute_seconds for row in rows)
    gain = possible / log.samples_per_second
    if waiting >= NOTABLE and gain >= SLOW:
        text += f"; without waiting (an asynchronous strategy) it would be {gain:.1f}x faster"
    return f"{text}."
