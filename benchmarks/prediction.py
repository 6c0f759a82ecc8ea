"""Whether the virtual cluster foretells what real processes do: throughput and waiting.

python -m benchmarks.prediction                  everything; results/ and README.md
python -m benchmarks.prediction --only sync,ssp  some of sync, async, ssp, local_sgd
python -m benchmarks.prediction --workers 4      one number of workers
python -m benchmarks.prediction --quick          does it run? Each strategy once, half a second
python -m benchmarks.prediction --table          write README.md's table anew
python -m benchmarks.prediction --check          fail if README.md is not up to date

The same function, with the same Trainer, runs on real processes and on simulated ranks. What the
simulator has to be told of the machine is measured apart, on processes that do something else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    Report,
    Spread,
    provenance,
    python_module,
    rotated,
    run_group,
)
from benchmarks.workers import CONDITIONS, GAMMA_SHAPE, SLOW, WORKLOADS, slowdown
from scaledtrain import Callback, LocalSGD, ParameterServer, Strategy, Sync, Trainer, connect
from scaledtrain.comm.protocols import Link
from scaledtrain.report.runs import read_run
from scaledtrain.schedule import Pace, Slowdown
from scaledtrain.server import StaleSynchronous
from scaledtrain.sim import Cluster, Topology, Wire, simulate

WORKLOAD = WORKLOADS["slept"]
SECONDS = 6.0  # of a run
WARMUP_SECONDS = 1.0  # not counted
CALIBRATION_SECONDS = 2.0
MESSAGE_BYTES = 4 * 2**20
VOTE_EVERY = 10  # steps between two moments at which replicas in lockstep may end
WORKERS = (2, 4)
STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "sync": Sync,
    "async": ParameterServer,
    "ssp": lambda: ParameterServer(StaleSynchronous(staleness_bound=8)),
    "local_sgd": lambda: LocalSGD(sync_every=16),
}
PACKAGES = ("torch", "numpy")
SETTINGS = {
    "model": "MLP 64-128-10",
    "batch_size": WORKLOAD.batch_size,
    "min_compute_seconds": WORKLOAD.min_compute_seconds,
    "seconds": SECONDS,
    "straggler": SLOW,
    "gamma_shape": GAMMA_SHAPE,
}


@dataclass(frozen=True)
class Prediction:
    """One case in one round: what was foretold, and what happened."""

    workers: int
    strategy: str
    condition: str
    round: int
    predicted_rate: float
    """Samples per second whose gradients went into the parameters, of all workers."""
    measured_rate: float
    predicted_waiting: float
    """Share of the workers' time in which they waited for others or moved bytes."""
    measured_waiting: float
    overhead_seconds: float
    """Calibrated: the median of what a step takes beside what is slept."""
    latency_seconds: float
    """Calibrated: of a message between two ranks."""
    bytes_per_second: float
    """Calibrated: of a message between two ranks."""
    load_average: float
    """Of the machine over the last minute, when this began."""

    @property
    def case(self) -> tuple[int, str, str]:
        return self.workers, self.strategy, self.condition

    @property
    def error(self) -> float:
        """Of the rate: predicted / measured - 1."""
        return self.predicted_rate / self.measured_rate - 1.0


# --- What runs in both worlds -----------------------------------------------------------------


class Steps(Callback):
    """When the steps of a worker ended, and how many gradients had been used by then."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, float]] = []

    def on_step_end(self, trainer: Trainer) -> None:
        used = trainer.strategy.step * trainer.strategy.gradients_per_step
        self.ended.append((trainer.metrics.seconds, used))


def train(
    link: Link,
    strategy: Strategy,
    seconds: float,
    seed: int,
    slowed: Slowdown | None,
    run_dir: Path,
) -> list[tuple[float, float]]:
    """One rank of a run, on whatever link it is given."""
    torch.manual_seed(seed)
    steps = Steps()
    with Trainer(
        WORKLOAD.model(),
        F.cross_entropy,
        partial(torch.optim.SGD, lr=0.05),
        strategy=strategy,
        callbacks=[steps],
        seed=seed,
        slowdown=slowed,
        run_dir=run_dir,
        log_every=VOTE_EVERY,
        console=False,
        link=link,
    ) as trainer:
        trainer.fit(WORKLOAD.batches(seed), max_seconds=seconds)
    return steps.ended


def rate(ranks: Sequence[Sequence[tuple[float, float]]], warmup: float, end: float) -> float:
    """Used gradients per second, between the first and the last step that count; over the ranks."""
    rates = []
    for ended in ranks:
        counted = [(t, used) for t, used in ended if warmup <= t <= end]
        (begin, before), (last, after) = counted[0], counted[-1]
        rates.append((after - before) / (last - begin))
    return statistics.fmean(rates)


def waiting(run_dir: Path) -> float:
    """Share of the workers' time in which they waited or moved bytes, from the run's metrics."""
    log = read_run(run_dir)
    spent = sum(w.seconds_in("waiting") + w.seconds_in("communication") for w in log.workers)
    return spent / sum(w.elapsed for w in log.workers)


def handicap(condition: str, workers: int) -> Slowdown:
    """What each rank's computing is to take; the last one is the straggler."""
    return slowdown(WORKLOAD, condition, slow_rank=workers - 1)


# --- What the simulator has to be told of the machine -----------------------------------------


@dataclass(frozen=True)
class Machine:
    """A host, as its calibration found it.

    Args:
        overheads: seconds that steps took beside what is slept.
        latency_seconds: of a message between two ranks.
        bytes_per_second: at which it is copied.
    """

    overheads: tuple[float, ...]
    latency_seconds: float
    bytes_per_second: float

    @classmethod
    def of(
        cls, steps: Sequence[Sequence[float]], small: Sequence[float], large: Sequence[float]
    ) -> Machine:
        """From what ranks measured.

        The virtual network's own formulas, solved for latency a and bandwidth w: an all-reduce of n
        ranks takes 2 ceil(log2 n) a if it is small, and 2 (n-1)/n B / w more if it has B bytes.

        Args:
            steps: by rank, the lengths of its steps, without any communication.
            small: seconds of all-reduces of one number.
            large: seconds of all-reduces of `MESSAGE_BYTES`.
        """
        n = len(steps)
        latency = statistics.median(small)
        transfer = max(statistics.median(large) - latency, 1e-9)
        overheads = [s - WORKLOAD.min_compute_seconds for of_rank in steps for s in of_rank]
        return cls(
            overheads=tuple(max(seconds, 0.0) for seconds in overheads),
            latency_seconds=latency / (2 * (n - 1).bit_length()),
            bytes_per_second=2 * (n - 1) / n * MESSAGE_BYTES / transfer,
        )

    def cluster(self, slowed: Slowdown, workers: int) -> Cluster:
        """It, with this handicap."""
        port = Wire(self.latency_seconds, bytes_per_second=self.bytes_per_second)
        host = Topology(ranks_per_host=workers, hosts=1, port=port)
        return Cluster(_Slept(slowed, self.overheads), host)


@dataclass(frozen=True)
class _Slept:
    """A compute model: what is slept, draw for draw, and an overhead of the calibrated ones."""

    slowed: Slowdown
    overheads: tuple[float, ...]

    def pace(self, worker: int, seed: int, factor: float = 1.0) -> Pace:
        slept = self.slowed.pace(worker, seed)
        assert slept is not None
        return _SleptPace(slept, self.overheads, random.Random(f"overhead {seed} {worker}"))


class _SleptPace:
    def __init__(self, slept: Pace, overheads: Sequence[float], generator: random.Random) -> None:
        self._slept = slept
        self._overheads = overheads
        self._generator = generator

    def begin_step(self) -> None:
        self._slept.begin_step()

    def seconds(self, elapsed: float, share: float) -> float:
        return self._slept.seconds(elapsed, share) + self._generator.choice(self._overheads)


def calibrate(link: Link, seconds: float, run_dir: Path) -> dict[str, Any]:
    """One rank of the calibration: steps without communication, then messages without steps."""
    alone = LocalSGD(sync_every=10**9)
    ended = train(link, alone, seconds, 0, handicap("equal", link.group.size), run_dir)
    moments = [t for t, _ in ended]
    return {
        "steps": [b - a for a, b in itertools.pairwise(moments)][VOTE_EVERY:],
        "small": _all_reduces(link, 1, 100),
        "large": _all_reduces(link, MESSAGE_BYTES // 4, 20),
    }


def _all_reduces(link: Link, numbers: int, count: int) -> list[tuple[float, float]]:
    """When this rank came to each, and when it had the result; all ranks share the clock."""
    tensor, spans = torch.ones(numbers), []
    for _ in range(count + 5):
        time.sleep(0.005)  # whoever has computed for long, or slept, does not come running
        came = time.monotonic()
        link.group.all_reduce([tensor], "mean").wait()
        spans.append((came, time.monotonic()))
    return spans[5:]


def durations(ranks: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """Of collectives: from the arrival of the last rank until the last one has the result."""
    return [
        max(done for _, done in spans) - max(came for came, _ in spans)
        for spans in zip(*ranks, strict=True)
    ]


# --- Measuring --------------------------------------------------------------------------------


def work(what: str, condition: str, number: int, seconds: float, folder: Path) -> None:
    """One rank of a fresh job; writes down what happened."""
    with connect() as link:
        report: Any
        if what == "calibration":
            report = calibrate(link, seconds, folder / "run")
        else:
            slowed = handicap(condition, link.group.size)
            report = train(link, STRATEGIES[what](), seconds, number, slowed, folder / "run")
        (folder / f"rank{link.group.rank}.json").write_text(json.dumps(report), encoding="utf-8")


def real(
    what: str, condition: str, workers: int, number: int, seconds: float, folder: Path
) -> list[Any]:
    """What the ranks of a job of real processes wrote down."""
    arguments = [what, condition, str(number), str(seconds), str(folder)]
    run_group(python_module("benchmarks.prediction", "--work", *arguments), workers, pinned=False)
    names = [folder / f"rank{rank}.json" for rank in range(workers)]
    return [json.loads(name.read_text("utf-8")) for name in names]


def calibration(workers: int, seconds: float) -> Machine:
    """What a job of so many processes finds out about this host."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = real("calibration", "equal", workers, 0, seconds, Path(folder))
    return Machine.of(
        [r["steps"] for r in ranks],
        durations([r["small"] for r in ranks]),
        durations([r["large"] for r in ranks]),
    )


def compare(
    strategy: str, condition: str, workers: int, number: int, machine: Machine, seconds: float
) -> Prediction:
    """Run a case in both worlds."""
    load_average = os.getloadavg()[0]
    warmup = WARMUP_SECONDS * seconds / SECONDS
    slowed = handicap(condition, workers)

    def program(link: Link) -> list[tuple[float, float]]:
        return train(link, STRATEGIES[strategy](), seconds, number, None, virtual)

    with tempfile.TemporaryDirectory() as name:
        folder, virtual = Path(name), Path(name) / "virtual"
        measured = real(strategy, condition, workers, number, seconds, folder)
        simulated = simulate(program, machine.cluster(slowed, workers), workers, seed=number)
        foretold = [ended for ended in simulated.results if ended is not None]
        batch_size = WORKLOAD.batch_size
        return Prediction(
            workers=workers,
            strategy=strategy,
            condition=condition,
            round=number,
            predicted_rate=batch_size * rate(foretold, warmup, seconds),
            measured_rate=batch_size * rate(measured, warmup, seconds),
            predicted_waiting=waiting(virtual),
            measured_waiting=waiting(folder / "run"),
            overhead_seconds=statistics.median(machine.overheads),
            latency_seconds=machine.latency_seconds,
            bytes_per_second=machine.bytes_per_second,
            load_average=load_average,
        )


# --- What is shown ----------------------------------------------------------------------------


def error(predictions: Sequence[Prediction], case: tuple[int, str, str]) -> Spread | None:
    """Of the rate: predicted / measured - 1, within each round."""
    return Spread.of([p.error for p in predictions if p.case == case])


def cases(predictions: Sequence[Prediction]) -> list[tuple[int, str, str]]:
    """That were run, in the order of the table."""
    present = {p.case for p in predictions}
    wanted = [(n, s, c) for n in WORKERS for s in STRATEGIES for c in CONDITIONS]
    return [case for case in wanted if case in present]


def render(predictions: Sequence[Prediction], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = [
        "| workers | | | samples/s: predicted | measured | error | waiting: predicted | measured |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    errors = []
    for case in cases(predictions):
        spread = error(predictions, case)
        assert spread is not None
        errors.append(abs(spread.median))
        lines.append(_row([p for p in predictions if p.case == case], spread))
    counts = [sum(p.case == case for p in predictions) for case in cases(predictions)]
    rounds = " to ".join(map(str, dict.fromkeys([min(counts), max(counts)])))
    overhead = 1e3 * statistics.median(p.overhead_seconds for p in predictions)
    latency = 1e6 * statistics.median(p.latency_seconds for p in predictions)
    copied = statistics.median(p.bytes_per_second for p in predictions) / 1e9
    calibrated = (
        f"Medians over {rounds} rounds; of the error in brackets the lowest and the highest. "
        f"Calibrated: a step takes {overhead:.2f} ms beside what is slept, a message {latency:.0f} "
        f"µs and its bytes at {copied:.1f} GB/s."
    )
    bars = "\n".join(
        f"| {what} ≤ {limit:g} % | {100 * value:.1f} % | "
        f"{'pass' if 100 * value <= limit else '**MISSED**'} |"
        for what, value, limit in (
            ("median over the cases", statistics.median(errors), 5.0),
            ("the worst case", max(errors), 10.0),
        )
    )
    head = "What it has to reach: the error of the throughput"
    table = f"{head}\n\n| | measured | |\n|---|--:|---|\n{bars}"
    return "\n\n".join([provenance(where), "\n".join(lines), calibrated, table]) + "\n"


def _row(rounds: Sequence[Prediction], spread: Spread) -> str:
    first = rounds[0]
    predicted = statistics.median(p.predicted_rate for p in rounds)
    measured = statistics.median(p.measured_rate for p in rounds)
    foretold = statistics.median(p.predicted_waiting for p in rounds)
    waited = statistics.median(p.measured_waiting for p in rounds)
    low, high = 100 * spread.low, 100 * spread.high
    return (
        f"| {first.workers} | {first.strategy} | {CONDITIONS[first.condition]} | {predicted:,.0f} "
        f"| {measured:,.0f} | {100 * spread.median:+.1f} % ({low:+.1f} to {high:+.1f}) "
        f"| {100 * foretold:.1f} % | {100 * waited:.1f} % |"
    )


REPORT = Report("prediction", Prediction, render)


# --- The command ------------------------------------------------------------------------------


def rounds(
    strategies: Sequence[str],
    workers: Sequence[int],
    count: int,
    before: Sequence[Prediction],
    is_quick: bool,
) -> Iterator[Prediction]:
    """Each round calibrates anew, and begins with another strategy; a later command adds rounds."""
    count, scale = (1, 0.2) if is_quick else (count, 1.0)
    workers = workers[:1] if is_quick else workers
    conditions = list(CONDITIONS)[:1] if is_quick else list(CONDITIONS)
    first = max((p.round for p in before), default=-1) + 1
    for number in range(first, first + count):
        for n in workers:
            machine = calibration(n, CALIBRATION_SECONDS * scale)
            for strategy in rotated(strategies, number):
                for condition in conditions:
                    made = compare(strategy, condition, n, number, machine, SECONDS * scale)
                    print(
                        f"round {number}  {n} workers  {strategy:10} {condition:10} "
                        f"predicted {made.predicted_rate:7.1f}  measured {made.measured_rate:7.1f}"
                        f"  error {100 * made.error:+5.1f} %  waiting "
                        f"{100 * made.predicted_waiting:4.1f} % {100 * made.measured_waiting:4.1f} "
                        f"%  load {made.load_average:.1f}",
                        flush=True,
                    )
                    yield made


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("prediction", __doc__, "each strategy once, half a second", rounds=3)
    add_some(parser, "only", list(STRATEGIES))
    add_some(parser, "workers", {str(n): n for n in WORKERS})
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        torch.set_num_threads(1)
        what, condition, number, seconds, folder = options.work
        work(what, condition, int(number), float(seconds), Path(folder))
        return 0
    measure = partial(rounds, options.only, options.workers, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


if __name__ == "__main__":
    sys.exit(main())
