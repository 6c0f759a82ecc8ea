"""Step times that were measured: in the folder of a real run, or in a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scaledtrain.errors import ConfigError
from scaledtrain.report.runs import WorkerLog, read_run
from scaledtrain.sim.compute import StepTimes
from scaledtrain.sim.streams import BLOCK, generator
from scaledtrain.timeline import Span

__all__ = ["CsvTimes", "Measured", "Order"]

Order = Literal["shuffled", "recorded"]


class _Recorded(StepTimes):
    order: Order
    times: Sequence[Sequence[float]]

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Worker i uses the times of source i modulo their number, again and again."""
        times = self.times[worker % len(self.times)]
        if self.order == "recorded":
            while True:
                yield from times
        n = len(times)
        source = generator(seed, worker, "compute")
        while True:
            yield from (times[i] for i in source.integers(n, size=BLOCK).tolist())


@dataclass(frozen=True)
class Measured(_Recorded):
    """What a step of a real run took: worker i computes like rank i modulo the run's ranks.

    With a trace (``trace=true``) a time is what the rank computed in one step, from one batch to
    the next, without what lay inside and was not computing. Without a trace it is the mean over the
    steps between two records, as often as there were steps: the mean is right, the variation
    within an interval is lost (``log_every=1`` keeps it).

    Leaves out: what computing costs on another batch size, model or device than the run's; that
    ranks on one host slow each other down more, or less, when there are others than there were.

    Args:
        run_dir: the folder of the run.
        order: ``"shuffled"``: each step draws one of its rank's times, with replacement, so that
            workers of the same rank differ; ``"recorded"``: as they came, from the first again
            after the last, so that slow phases last, and workers of the same rank are alike.

    Attributes:
        times: for each rank of the run, seconds of its steps.

    Raises:
        ConfigError: the folder is not that of a run, or a rank recorded no computing.

    References:
        Efron 1979, Bootstrap Methods (``"shuffled"``).
    """

    run_dir: Path
    order: Order = "shuffled"
    times: Sequence[Sequence[float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        times = [_step_seconds(worker) for worker in read_run(self.run_dir).workers]
        for rank, of_rank in enumerate(times):
            if not of_rank:
                raise ConfigError(
                    f"rank {rank} of {self.run_dir} recorded no time of computing; take a run "
                    "that trained for some steps"
                )
        object.__setattr__(self, "times", times)


def _step_seconds(worker: WorkerLog) -> list[float]:
    if worker.spans:
        return _traced_seconds(worker.spans)
    means = [(i.phases["compute"] / i.steps, i.steps) for i in worker.intervals if i.steps]
    return [mean for mean, steps in means if mean > 0 for _ in range(steps)]


def _traced_seconds(spans: Sequence[Span]) -> list[float]:
    """What was computed between one batch and the next, without the spans of others inside."""
    seconds = [0.0]
    outermost: list[tuple[float, float]] = []  # start and length, of those that lie in no other
    for span in spans:  # in the order of their ends
        length = own = span.end - span.start
        while outermost and outermost[-1][0] >= span.start:
            own -= outermost.pop()[1]
        outermost.append((span.start, length))
        if span.phase == "data":
            seconds.append(0.0)
        elif span.phase == "compute":
            seconds[-1] += own
    return [s for s in seconds if s > 0]


@dataclass(frozen=True)
class CsvTimes(_Recorded):
    """Step times from a CSV file, in one of two formats.

    One line for each step of a worker, in the order of its steps, with a header::

        worker,seconds
        0,0.101
        1,0.250
        0,0.099

    or one column for each worker, whose header is its number; a column may end early::

        0,1
        0.101,0.250
        0.099,

    Workers are numbered from 0 without gaps. Worker i of the cluster uses the times of worker i
    modulo those in the file.

    Leaves out: nothing of a step's time; but why it took so long, and what else went on, is not in
    such a file.

    Args:
        path: of the file, in UTF-8.
        order: as in `Measured`.

    Attributes:
        times: for each worker in the file, seconds of its steps.

    Raises:
        ConfigError: there is no such file, it has another format, or holds what is not a positive
            time; the message names line and value.
    """

    path: Path
    order: Order = "shuffled"
    times: Sequence[Sequence[float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be read ({error.strerror}); give a CSV file of step times"
            ) from error
        object.__setattr__(self, "times", _parse_csv(self.path, rows))


def _parse_csv(path: Path, rows: Sequence[Sequence[str]]) -> list[list[float]]:
    header = [name.strip() for name in rows[0]] if rows else []
    long = header == ["worker", "seconds"]
    if (not long and header != [str(worker) for worker in range(len(header))]) or not header:
        raise ConfigError(
            f"{path} begins with {','.join(header)!r}; its header must be 'worker,seconds', or the "
            "numbers of the workers, '0,1,2'"
        )
    times: dict[int, list[float]] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise ConfigError(f"{where} has {len(row)} values, but the header {len(header)}")
        if long:
            number = row[0].strip()
            if not number.isdecimal():
                raise ConfigError(f"{where}: the worker {number!r} is no whole number from 0")
            times.setdefault(int(number), []).append(_seconds(where, row[1]))
            continue
        for column, cell in enumerate(row):
            if cell.strip():
                times.setdefault(column, []).append(_seconds(where, cell))
    n_workers = max(times, default=0) + 1 if long else len(header)
    for worker in range(n_workers):
        if worker not in times:
            raise ConfigError(f"{path} has no time of worker {worker}; give at least one")
    return [times[worker] for worker in range(n_workers)]


def _seconds(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{where}: {text.strip()!r} is no time in seconds, positive and finite")
    return value
