"""Reads the folder of a run back: what `Metrics` wrote, as values with types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaledtrain.errors import ConfigError
from scaledtrain.report.lines import parse_lines
from scaledtrain.report.traces import read_spans
from scaledtrain.run_dir import file_of_rank, metrics_files
from scaledtrain.timeline import PHASES, Phase, Span

__all__ = ["Evaluation", "Interval", "RunLog", "WorkerLog", "read_run"]


@dataclass(frozen=True)
class Interval:
    """What one worker did between two records; times are sums in seconds."""

    step: int
    """Updates that the parameters had received at its end."""
    seconds: float
    """Its end, since the run began."""
    elapsed: float
    steps: int
    """Steps that this worker made."""
    samples: int
    """Samples that this worker computed gradients of."""
    samples_per_second: float
    """Of all workers together; only samples whose gradients were used count."""
    phases: Mapping[Phase, float]
    staleness: Mapping[int, int]
    """Staleness -> pushed gradients that had it."""
    loss: float | None
    memory_bytes: float
    """Peak of the process or of its device, so far."""


@dataclass(frozen=True)
class Evaluation:
    """The values of one evaluation, ``seconds`` after the run began."""

    step: int
    seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class WorkerLog:
    """Everything that one rank wrote."""

    rank: int
    intervals: tuple[Interval, ...]
    evaluations: tuple[Evaluation, ...]
    spans: tuple[Span, ...]
    """In seconds since the run began; empty for a run without a trace."""

    @property
    def steps(self) -> int:
        """Steps that it made."""
        return sum(interval.steps for interval in self.intervals)

    @property
    def samples(self) -> int:
        """Samples that it computed gradients of."""
        return sum(interval.samples for interval in self.intervals)

    @property
    def elapsed(self) -> float:
        """Seconds that its records cover."""
        return sum(interval.elapsed for interval in self.intervals)

    @property
    def samples_per_second(self) -> float:
        """Of all workers together, as this one saw it."""
        used = sum(interval.samples_per_second * interval.elapsed for interval in self.intervals)
        return used / self.elapsed

    @property
    def staleness(self) -> Counter[int]:
        """Staleness -> its pushed gradients that had it."""
        counts: Counter[int] = Counter()
        for interval in self.intervals:
            counts.update(interval.staleness)
        return counts

    def seconds_in(self, phase: Phase) -> float:
        """Seconds that it spent in one phase."""
        return sum(interval.phases[phase] for interval in self.intervals)


@dataclass(frozen=True)
class RunLog:
    """A run, read from its folder."""

    folder: Path
    """Which it was read from."""
    workers: tuple[WorkerLog, ...]
    """In the order of their ranks."""

    @property
    def samples_per_second(self) -> float:
        """Samples of all workers together whose gradients were used, per second of the run.

        The mean over the workers' records: each extrapolates from its own batches, which differ
        where an epoch ends unevenly.
        """
        return sum(worker.samples_per_second for worker in self.workers) / len(self.workers)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Of the first rank that evaluated."""
        return next((w.evaluations for w in self.workers if w.evaluations), ())

    @property
    def staleness(self) -> Counter[int]:
        """Staleness -> pushed gradients of all workers; empty where there is no such thing."""
        counts: Counter[int] = Counter()
        for worker in self.workers:
            counts.update(worker.staleness)
        return counts


def read_run(folder: str | Path) -> RunLog:
    """Read what all ranks of a run wrote into its folder.

    A crash may cut the last line of a file short: it is left out.

    Args:
        folder: ``run_dir`` of the `Trainer` that made the run.

    Returns:
        What each rank recorded, in the order of ranks.

    Raises:
        ConfigError: there are no metrics, those of a rank are missing or hold no step, or a line
            other than the last is not what `Metrics` writes.
    """
    folder = Path(folder)
    paths = metrics_files(folder)
    if not paths:
        what = "holds no metrics-rank0.jsonl" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"{folder} {what}, so it is not the folder of a run; give the run_dir that the "
            "Trainer wrote to"
        )
    missing = sorted(set(range(max(paths) + 1)) - set(paths))
    if missing:
        raise ConfigError(
            f"{folder} holds the metrics of rank {max(paths)} but not of "
            f"{', '.join(map(str, missing))}; copy the files of all ranks into one folder"
        )
    return RunLog(folder, tuple(_read_worker(folder, rank) for rank in paths))


def _read_worker(folder: Path, rank: int) -> WorkerLog:
    path = file_of_rank(folder, "metrics", rank)
    records = list(parse_lines(path, _record))
    intervals = tuple(r for r in records if isinstance(r, Interval))
    if not intervals:
        raise ConfigError(
            f"{path} holds no record of a step: the run ended before the first one; let it run "
            "longer, or make a record more often (log_every)"
        )
    evaluations = tuple(r for r in records if isinstance(r, Evaluation))
    trace = file_of_rank(folder, "trace", rank)
    spans = tuple(read_spans(trace)) if trace.exists() else ()
    return WorkerLog(rank, intervals, evaluations, spans)


def _record(line: dict[str, Any]) -> Interval | Evaluation | None:
    if line["kind"] in ("ranks", "trouble", "layers", "warning"):  # of a watch
        return None
    step, seconds = int(line["step"]), float(line["seconds"])
    if line["kind"] == "evaluation":
        values = {k: float(v) for k, v in line.items() if k not in ("kind", "step", "seconds")}
        return Evaluation(step, seconds, values)
    if line["kind"] != "step":
        raise ValueError(f"unknown kind {line['kind']!r}")
    steps = int(line["steps"])
    return Interval(
        step=step,
        seconds=seconds,
        elapsed=float(line["step_seconds"]) * steps,
        steps=steps,
        samples=int(line["samples"]),
        samples_per_second=float(line["samples_per_second"]),
        phases={phase: float(line[f"{phase}_seconds"]) * steps for phase in PHASES},
        staleness={int(s): int(n) for s, n in line["staleness_counts"].items()},
        loss=None if line.get("loss") is None else float(line["loss"]),
        memory_bytes=float(line.get("memory_bytes", 0.0)),
    )
